"""Methods that put two smaller linears in place of one."""

from __future__ import annotations

from llmprune.catalog.types import LOW_RANK, Method


def factored(name: str, title: str, score: str, paper: str, year: int, summary: str) -> Method:
    """Return the row of a method that lowers the rank of linears."""
    return Method(
        name=name,
        title=title,
        score=score,
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=(LOW_RANK,),
        pattern=LOW_RANK,
        paper=paper,
        year=year,
        summary=summary,
    )


_ROWS = (
    factored(
        *("svd-llm", "SVD-LLM", "output-energy"),
        "Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language "
        "Model Compression, arXiv:2403.07378",
        2024,
        "Each linear becomes two, by the singular values of its weight times the root of its "
        "inputs' Gram matrix: what is dropped is what its output loses least by. Every linear "
        "loses the same share of its weights. Loads with code that comes with the result; "
        "`tier: E0` writes the product instead, which loads everywhere and saves nothing.",
    ),
    factored(
        *("svd", "Truncated SVD", "weight-energy"),
        "Hsu et al., Language Model Compression with Weighted Low-Rank Factorization, "
        "arXiv:2207.00112",
        2022,
        "As svd-llm, by the singular values of the weight alone: reads no text. It is the plain "
        "form that the paper starts from, and that svd-llm is measured against.",
    ),
)
FACTORED = {row.name: row for row in _ROWS}
