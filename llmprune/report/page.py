"""A report as HTML for notebooks: the lines of its text, the kinds of linears, the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.base.markup import html_facts, html_folded, html_table
from llmprune.report.coverage import coverage_rows
from llmprune.report.kinds import by_kind
from llmprune.report.recoveries import recoveries_of
from llmprune.report.tables import report_lines


def report_html(data: Mapping[str, Any]) -> str:
    """Return the final table of a run; sparsity by kind, blocks, experts and losses folded away."""
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
    folded: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        (f"{len(kinds)} kinds of linears", ("kind", "blocks", "weights", "sparsity"), kinds),
        (f"{len(blocks)} blocks", ("block", "sparsity", "error"), blocks),
        ("experts", *experts),
    ]
    for one in recoveries_of(data):
        held = [(f"{step:,}", f"{loss:.4f}") for step, loss in one.record["history"]["held"]]
        folded.append((f"{one.name}: loss held out", ("step", "loss"), held))
    return html_facts(report_lines(data), caption="Report") + "".join(
        html_folded(title, html_table(head, rows)) for title, head, rows in folded if rows
    )
