"""Pictures of a report: where the weights went, and what it did to the output of each block."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmprune.report.kinds import by_kind, site_rows
from llmprune.report.portable import is_place, last_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

MAX_NUMBERS = 12  # blocks up to which there is room for a number in every cell
BLUE = "#0072B2"
STEPS = [1, 2, 5, 10]


class Picture(Figure):
    """A figure that shows itself in notebooks, whether or not pyplot was imported."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def report_figure(data: Mapping[str, Any]) -> Picture:
    """Return sparsity by block and kind of linear above the relative output error by block.

    The error's panel is left out where none was measured.
    """
    kinds, errors = by_kind(data), _errors(data)
    num_blocks = len(data["blocks"])
    heights = [0.6 + 0.3 * len(kinds)] + ([2.0] if errors else [])
    width = min(14.0, 7.0 + 0.08 * num_blocks)
    figure = Picture(figsize=(width, sum(heights) + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    figure.suptitle(_title(data), fontsize="medium")
    draw_sparsity(panels[0][0], data)
    if errors:
        draw_errors(panels[1][0], data)
    gaps = len({(b, kind) for b, kind, _, _ in site_rows(data)}) < len(kinds) * num_blocks
    panels[-1][0].set_xlabel("block" + (" (grey: nothing of this kind pruned)" if gaps else ""))
    panels[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=STEPS))
    return figure


def draw_sparsity(axes: Axes, data: Mapping[str, Any]) -> None:
    """Draw the removed share of each kind of linear in each block; experts are summed."""
    kinds = [kind.name for kind in by_kind(data)]
    share_KN = _shares(data, kinds)
    num_blocks = share_KN.shape[1]
    low, high = float(np.nanmin(share_KN)), float(np.nanmax(share_KN))
    middle, reach = (low + high) / 2, max(0.05, (high - low) / 2)
    floor, ceiling = max(0.0, middle - reach), min(1.0, middle + reach)
    axes.set_facecolor("0.85")  # a block without this kind of linear
    mesh = axes.pcolormesh(
        np.arange(num_blocks + 1) - 0.5,
        np.arange(len(kinds) + 1) - 0.5,
        np.ma.masked_invalid(share_KN),
        cmap="cividis",
        vmin=floor,
        vmax=ceiling,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.set_yticks(range(len(kinds)), kinds, fontsize="small")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.05)
    bar.set_label("sparsity\n(share removed)", fontsize="small")
    bar.locator = MaxNLocator(4, steps=STEPS)
    bar.update_ticks()
    if num_blocks <= MAX_NUMBERS:
        _write_numbers(axes, share_KN, (floor + ceiling) / 2)


def draw_errors(axes: Axes, data: Mapping[str, Any]) -> None:
    """Draw the error of each block's output relative to the dense block's, as measured."""
    errors = _errors(data)
    axes.bar(list(errors), list(errors.values()), width=0.7, color=BLUE)
    axes.set_ylabel("relative output\nerror", fontsize="small")
    axes.set_ylim(0, 1.15 * max(*errors.values(), 1e-12))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if len(errors) <= MAX_NUMBERS:
        for block, value in errors.items():
            axes.annotate(
                f"{value:.3f}", (block, value), (0, 2), textcoords="offset points",
                ha="center", fontsize="small",
            )  # fmt: skip


def _title(data: Mapping[str, Any]) -> str:
    """Return model, method and result in one line."""
    size = f"{data['parameters_after']:,} parameters" if data["form"] == "shrunk" else "masked"
    name, bracket, kind = data["model"].rpartition(" (")
    model = f"{last_name(name) if is_place(name) else name}{bracket}{kind}"
    return f"{model}, {data['method']}, sparsity {data['sparsity']:.3g}, {size}"


def _errors(data: Mapping[str, Any]) -> dict[int, float]:
    """Return the relative output error by block, where it was measured."""
    return {b["block"]: b["error"] for b in data["blocks"] if b["error"] is not None}


def _shares(data: Mapping[str, Any], kinds: list[str]) -> NDArray[np.float64]:
    """Return the removed share by kind and block (K, N); NaN where a block has no such kind."""
    places = {block["block"]: place for place, block in enumerate(data["blocks"])}
    counts = np.zeros((2, len(kinds), len(places)))
    for block, kind, _, row in site_rows(data):
        counts[:, kinds.index(kind), places[block]] += row["removed_weights"], row["weights"]
    with np.errstate(invalid="ignore"):
        share: NDArray[np.float64] = counts[0] / counts[1]
    return share


def _write_numbers(axes: Axes, share_KN: NDArray[np.float64], middle: float) -> None:
    """Write each share into its cell, light on dark and dark on light."""
    for (row, column), value in np.ndenumerate(share_KN):
        if not np.isnan(value):
            colour = "black" if value > middle else "white"
            axes.text(
                column, row, f"{value:.3g}", ha="center", va="center", color=colour,
                fontsize="small",
            )  # fmt: skip
