"""A report as HTML for notebooks: the lines of its text, and the kinds of linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.base.markup import html_facts, html_folded, html_table
from llmprune.report.coverage import coverage_rows
from llmprune.report.kinds import by_kind
from llmprune.report.tables import report_lines


def report_html(data: Mapping[str, Any]) -> str:
    """Return the final table of a run, then sparsity by kind, blocks and experts folded away."""
    kinds = [
        (kind.name, kind.where, f"{kind.weights:,}", f"{kind.sparsity:.4f}")
        for kind in by_kind(data)
    ]
    blocks = [
        (
            f"{block['block']}",
            f"{block['sparsity']:.4f}",
            "" if block["error"] is None else f"{block['error']:.4f}",
        )
        for block in data["blocks"]
    ]
    experts = coverage_rows(data)
    return (
        html_facts(report_lines(data), caption="Report")
        + html_folded(
            f"{len(kinds)} kinds of linears",
            html_table(("kind", "blocks", "weights", "sparsity"), kinds),
        )
        + html_folded(f"{len(blocks)} blocks", html_table(("block", "sparsity", "error"), blocks))
        + (html_folded("experts", html_table(*experts)) if experts[1] else "")
    )
