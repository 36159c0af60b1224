"""Methods that remove experts of mixtures."""

from __future__ import annotations

from llmprune.catalog.types import Method

REAP = (
    "Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, "
    "arXiv:2510.13999"
)


def experts(name: str, title: str, paper: str, year: int, summary: str) -> Method:
    """Return the row of a method that removes experts, by the score of its own name."""
    return Method(
        name=name,
        title=title,
        score=name,
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="mean",
        patterns=("experts",),
        pattern="experts",
        paper=paper,
        year=year,
        summary=summary,
    )


_ROWS = (
    experts(
        *("reap", "REAP", REAP, 2025),
        "Removes the experts with the smallest mean of gate times norm of the output over the "
        "tokens routed to them; as many in every block, and their rows of the router.",
    ),
    experts(
        *("frequency", "Frequency", REAP, 2025),
        "Removes the experts that fewest tokens are routed to.",
    ),
    experts(
        *("ean", "Expert activation norm", REAP, 2025),
        "Removes the experts with the smallest mean norm of the output.",
    ),
    experts(
        *("weighted-ean", "Expert activation norm, weighted", REAP, 2025),
        "Removes the experts with the smallest sum of gate times norm of the output.",
    ),
)
MIXTURES = {row.name: row for row in _ROWS}
