"""The page of an analysis: of each finding what it says, its charts, and its table folded away."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from llmprune.analysis.types import Cell, Chart, Finding
from llmprune.pages.charts import bars, heat_map, lines
from llmprune.pages.document import (
    Section,
    folded,
    page,
    paragraph,
    preformatted,
    side_by_side,
    together,
)
from llmprune.pages.tables import facts, table

SHOWN = 400  # rows of a table; the CSV beside the page has all


def analysis_page(
    name: str, settings: Sequence[tuple[str, str]], findings: Sequence[Finding], *, command: str
) -> str:
    """Return the page of a model's analysis; `command` makes it again."""
    sections = [finding_section(finding) for finding in findings]
    made = together([facts(settings, caption="What was looked at"), preformatted(command)])
    sections.append(Section("How this was made", made, "The same command gives the same numbers."))
    return page(
        f"Analysis of {name}", sections, subtitle="What pruning did to the model, and where"
    )


def finding_section(finding: Finding) -> Section:
    """Return the section of a finding: its first sentence leads, the others follow."""
    parts = [paragraph(text) for text in finding.means[1:]]
    charts = [_chart(chart) for chart in finding.charts]
    if charts:
        parts.append(side_by_side(*charts) if len(charts) > 1 else charts[0])
    if finding.rows:
        rows = [[written(cell) for cell in row] for row in finding.rows[:SHOWN]]
        more = f", the first {SHOWN}" if len(finding.rows) > SHOWN else ""
        title = f"{len(finding.rows)} rows of {finding.name}.csv{more}"
        parts.append(folded(title, table(finding.columns, rows)))
    return Section(finding.title, together(parts), finding.means[0])


def written(cell: Cell) -> str:
    """Return a cell as text; line ends and tabs show.

    >>> written(0.123456), written(None), written("a\\nb"), written(7)
    ('0.12346', '', 'a\\\\nb', '7')
    """
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.5g}"
    return str(cell).replace("\n", "\\n").replace("\t", "\\t")


def _chart(chart: Chart) -> Markup:
    if chart.kind == "lines":
        return lines(
            chart.title,
            {name: _points(points) for name, points in chart.series.items()},
            x_label=chart.x_label,
            y_label=chart.y_label,
        )
    values = {name: [value for _, value in points] for name, points in chart.series.items()}
    if chart.kind == "bars":
        return bars(chart.title, chart.names, values, x_label=chart.x_label)
    return heat_map(
        chart.title,
        list(values),
        chart.names,
        list(values.values()),
        column_label=chart.x_label,
    )


def _points(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Return points; where there is no value, one that interrupts the line."""
    return [(x, float("nan") if y is None else y) for x, y in points]
