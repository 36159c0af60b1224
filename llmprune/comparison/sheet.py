"""The page of a comparison: the table, the front, the protocol and what could not be done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmprune.comparison.rows import KL, PERPLEXITY, Row
from llmprune.comparison.writing import cells_of, failures, protocol_lines
from llmprune.pages.charts import lines, scatter
from llmprune.pages.document import Section, listed, page, side_by_side, together
from llmprune.pages.tables import facts, table


def comparison_page(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the HTML page of a comparison."""
    axis = str(data.get("pareto", PERPLEXITY))
    sections = [
        Section("Table", table(*cells_of(rows, data["dense"])), _lead(rows, axis)),
        Section("Charts", side_by_side(*_charts(data["dense"], rows, axis))),
    ]
    failed = [line for text in failures(data) for line in text.splitlines()]
    if failed:
        sections.append(Section("Not compared", listed(failed)))
    lead = "What was the same for every line of the table."
    sections.append(Section("Protocol", facts(protocol_lines(data)), lead))
    methods = len({row.method for row in rows})
    return page(
        f"Prunings of {data['model']} compared",
        sections,
        subtitle=f"{methods} methods, {len(data['cells'])} prunings",
    )


def table_html(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return table and protocol as a piece of HTML for a notebook."""
    parts = [table(*cells_of(rows, data["dense"]), caption=f"Prunings of {data['model']}")]
    failed = [line for text in failures(data) for line in text.splitlines()]
    parts += [listed(failed)] if failed else []
    return str(together([*parts, facts(protocol_lines(data), caption="Protocol")]))


def _lead(rows: Sequence[Row], axis: str) -> str:
    best = [f"{row.method} at {row.asked}" for row in rows if row.best]
    found = f"Lowest loss of its amount: {', '.join(best)}. " if best else ""
    what = "KL" if axis == KL else "loss"
    return found + f"Pareto: nothing else keeps no more parameters at no more {what}."


def _charts(dense: Mapping[str, Any], rows: Sequence[Row], axis: str) -> list[Any]:
    base = float(dense["parameters"]), 0.0 if axis == KL else float(dense["perplexity"])
    points, names = {"dense": [base]}, {"dense": ["dense"]}
    for row in rows:
        if math.isfinite(row.height(axis)):
            points.setdefault(row.method, []).append((row.kept, row.height(axis)))
            names.setdefault(row.method, []).append(f"{row.method} {row.asked}")
    front = sorted((float(row.kept), row.height(axis)) for row in rows if row.front)
    title = "KL from the dense model" if axis == KL else "Perplexity"
    shown: dict[str, Any] = {
        "x_label": "parameters that are kept",
        "y_label": "nats per token" if axis == KL else "perplexity",
        "log_y": axis == PERPLEXITY,
    }
    return [
        scatter(f"{title} over kept parameters", points, names=names, **shown),
        lines("Pareto front", {"front": [*front, base]}, **shown),
        _by_sparsity("Loss above the dense model's", rows, lambda row: row.gap),
        _by_sparsity("KL from the dense model", rows, lambda row: row.height(KL)),
    ]


def _by_sparsity(title: str, rows: Sequence[Row], what: Callable[[Row], float]) -> Any:
    """Return a chart of a line per method over what it removed."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if math.isfinite(what(row)):
            series.setdefault(row.method, []).append((row.sparsity, what(row)))
    return lines(
        title,
        {name: sorted(each) for name, each in series.items()},
        x_label="removed share of the eligible weights",
        y_label="nats per token",
        zero=True,
    )
