"""The picture of a comparison: perplexity or KL over what is kept, with what nothing dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg

from llmprune.comparison.rows import KL, PERPLEXITY, Row
from llmprune.report.plots import Picture

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7A6400", "#56B4E9", "#000000")
MARKS = "osD^vP*"


LABELS = {PERPLEXITY: "perplexity", KL: "KL from the dense model, nats per token"}


def pareto_figure(dense: Mapping[str, Any], rows: Sequence[Row], axis: str = PERPLEXITY) -> Picture:
    """Return perplexity, or KL, over kept parameters, a mark per row, with the front as a line of
    steps.

    Bars are standard deviations over seeds of perplexity, and standard errors of KL.
    """
    figure = Picture(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (method, points) in enumerate(by_method(rows).items()):
        colour, mark = COLOURS[place % len(COLOURS)], MARKS[place % len(MARKS)]
        x, y = [row.kept / 1e6 for row in points], [row.height(axis) for row in points]
        spread = [_bar(row, axis) for row in points]
        axes.errorbar(x, y, yerr=spread, fmt=mark, color=colour, label=method, capsize=2)
    x0, y0 = dense["parameters"] / 1e6, 0.0 if axis == KL else dense["perplexity"]
    axes.plot([x0], [y0], "x", color="#555555", label="dense")
    best = sorted((row.kept / 1e6, row.height(axis)) for row in rows if row.front)
    best += [(x0, y0)]
    axes.step(*zip(*best, strict=True), where="post", color="#999999", lw=1, label="Pareto front")
    axes.set_xlabel("parameters that are kept, in millions")
    axes.set_ylabel(LABELS[axis])
    if rows and axis == PERPLEXITY:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _bar(row: Row, axis: str) -> float:
    return (row.perplexity.deviation if axis == PERPLEXITY else row.kl and row.kl[1]) or 0.0


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each method, fewest parameters first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return {name: sorted(each, key=lambda row: row.kept) for name, each in found.items()}
