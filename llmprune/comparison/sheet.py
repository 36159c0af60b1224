"""The page of a comparison: the table, the front, the protocol and what could not be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.comparison.rows import Row
from llmprune.comparison.writing import cells_of, failures, protocol_lines
from llmprune.pages.charts import lines, scatter
from llmprune.pages.document import Section, listed, page, side_by_side, together
from llmprune.pages.tables import facts, table


def comparison_page(data: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the HTML page of a comparison."""
    sections = [
        Section("Table", table(*cells_of(rows, data["dense"])), _lead(rows)),
        Section("Charts", side_by_side(*_charts(data["dense"], rows))),
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


def _lead(rows: Sequence[Row]) -> str:
    best = [f"{row.method} at {row.asked}" for row in rows if row.best]
    found = f"Lowest loss of its amount: {', '.join(best)}. " if best else ""
    return found + "Pareto: nothing else keeps no more parameters at no more loss."


def _charts(dense: Mapping[str, Any], rows: Sequence[Row]) -> list[Any]:
    points = {"dense": [(dense["parameters"], dense["perplexity"])]}
    names = {"dense": ["dense"]}
    gaps: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.method, []).append((row.kept, row.perplexity.mean))
        names.setdefault(row.method, []).append(f"{row.method} {row.asked}")
        gaps.setdefault(row.method, []).append((row.sparsity, row.gap))
    front = sorted((row.kept, row.perplexity.mean) for row in rows if row.front)
    return [
        scatter(
            "Perplexity over kept parameters",
            points,
            names=names,
            x_label="parameters that are kept",
            y_label="perplexity",
            log_y=True,
        ),
        lines(
            "Pareto front",
            {"front": [*front, (float(dense["parameters"]), float(dense["perplexity"]))]},
            x_label="parameters that are kept",
            y_label="perplexity",
            log_y=True,
        ),
        lines(
            "Loss above the dense model's",
            {name: sorted(each) for name, each in gaps.items()},
            x_label="removed share of the eligible weights",
            y_label="nats per token",
            zero=True,
        ),
    ]
