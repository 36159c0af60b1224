"""Charts of findings drawn onto a figure of matplotlib, one panel below the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmprune.analysis.types import Chart, Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MAX_NUMBERS = 8  # columns up to which there is room for a number in every cell


def charts_of(findings: Sequence[Finding]) -> list[Chart]:
    """Return all charts in order."""
    return [chart for finding in findings for chart in finding.charts]


def height_of(charts: Sequence[Chart]) -> float:
    """Return how high a figure of these charts is, in inches."""
    return sum(_height(chart) for chart in charts) + 0.3


def draw_charts(figure: Figure, charts: Sequence[Chart]) -> None:
    """Draw every chart into a panel of its own."""
    heights = [_height(chart) for chart in charts]
    panels = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, chart in zip(panels, charts, strict=True):
        draw = {"lines": _lines, "bars": _bars, "heat": _heat}[chart.kind]
        axes.set_title(chart.title, fontsize="medium", loc="left")
        axes.set_xlabel(chart.x_label)
        draw(axes, chart)


def _height(chart: Chart) -> float:
    rows = len(chart.series) if chart.kind == "heat" else len(chart.names)
    return 2.6 if chart.kind == "lines" else 1.2 + 0.3 * rows


def _lines(axes: Axes, chart: Chart) -> None:
    marker = "o" if max(map(len, chart.series.values()), default=0) <= 40 else ""
    for place, (name, points) in enumerate(chart.series.items()):
        x = [point[0] for point in points]
        y: list[Any] = [float("nan") if point[1] is None else point[1] for point in points]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(x, y, marker=marker, markersize=4, color=colour, label=name)
    axes.set_ylabel(chart.y_label)
    axes.grid(alpha=0.3)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize="small")


def _bars(axes: Axes, chart: Chart) -> None:
    for place, (name, points) in enumerate(chart.series.items()):
        y = [point[0] for point in points]
        values = [point[1] or 0.0 for point in points]
        axes.barh(y, values, color=COLOURS[place % len(COLOURS)], label=name)
    axes.set_yticks(range(len(chart.names)), list(chart.names))
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)


def _heat(axes: Axes, chart: Chart) -> None:
    values: list[list[Any]] = [
        [float("nan") if value is None else value for _, value in row]
        for row in chart.series.values()
    ]
    image = axes.imshow(values, aspect="auto", cmap="Blues")
    axes.figure.colorbar(image, ax=axes)
    axes.set_yticks(range(len(chart.series)), list(chart.series))
    if len(chart.names) <= 32:
        axes.set_xticks(range(len(chart.names)), list(chart.names))
    if len(chart.names) > MAX_NUMBERS:
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                shade: Any = image.norm(value)
                axes.text(
                    *(j, i, f"{value:.3f}"),
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="white" if shade > 0.6 else "black",
                )
