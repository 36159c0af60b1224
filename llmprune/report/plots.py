"""Pictures of a report: where weights went, what that did to each block, and how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmprune.report.kinds import by_kind, site_rows
from llmprune.report.portable import is_place, last_name
from llmprune.report.recoveries import Recovery, cut_method, is_pruned, recoveries_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

MAX_NUMBERS = 12  # blocks up to which there is room for a number in every cell
BLUE, RED = "#0072B2", "#D55E00"
STEPS = [1, 2, 5, 10]


class Picture(Figure):
    """A figure that shows itself in notebooks, whether or not pyplot was imported."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def report_figure(data: Mapping[str, Any]) -> Picture:
    """Return sparsity by block and kind of linear, the relative output error by block below it, and
    below that the losses of each training.

    Panels of what there is nothing of are left out.
    """
    kinds, errors, trainings = by_kind(data), _errors(data), recoveries_of(data)
    heights = [0.6 + 0.3 * len(kinds)] if kinds else []
    heights += ([2.0] if errors else []) + [2.4] * len(trainings)
    width = min(14.0, 7.0 + 0.08 * len(data["blocks"]))
    figure = Picture(figsize=(width, sum(heights) + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(data), fontsize="medium")
    panels = list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    by_block = panels[: len(panels) - len(trainings)]
    if kinds:
        draw_sparsity(by_block[0], data)
    if errors:
        draw_errors(by_block[-1], data)
    _share_blocks(by_block, data)
    for axes, one in zip(panels[len(by_block) :], trainings, strict=True):
        draw_losses(axes, one)
    return figure


def _share_blocks(panels: Sequence[Axes], data: Mapping[str, Any]) -> None:
    """Give panels of blocks one axis, which the last of them names."""
    for axes in panels[1:]:
        panels[0].tick_params(labelbottom=False)
        axes.sharex(panels[0])
    if not panels:
        return
    pairs = {(block, kind) for block, kind, _, _ in site_rows(data)}
    gaps = len(pairs) < len(by_kind(data)) * len(data["blocks"])
    panels[-1].set_xlabel("block" + (" (grey: nothing of this kind pruned)" if gaps else ""))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=STEPS))


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


def draw_losses(axes: Axes, one: Recovery) -> None:
    """Draw the loss of every step of a training, and of the text held out where it was measured.

    A loss that a teacher has a share in is of another scale, and gets an axis of its own.
    """
    history, taught = one.record["history"], bool(one.wish.get("distill"))
    beside = axes.twinx() if taught else axes
    lines: list[Line2D] = []
    for place, key, label, colour, mark in (
        (beside, "training", "training", BLUE, ""),
        (axes, "held", "held out", RED, "o"),
    ):
        if pairs := history[key]:
            steps, losses = zip(*pairs, strict=True)
            lines += place.plot(steps, losses, label=label, color=colour, marker=mark, ms=3, lw=0.9)
    axes.set_ylabel("loss\n(nats per token)", fontsize="small")
    if taught:
        beside.set_ylabel("training, with\nthe teacher's share", fontsize="small", color=BLUE)
        beside.spines["top"].set_visible(False)
    axes.set_xlabel(f"step of {one.name} ({one.record['method']})")
    axes.spines[["top"] if taught else ["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(handles=lines, fontsize="small", frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=STEPS))


def _title(data: Mapping[str, Any]) -> str:
    """Return model, method and result in one line."""
    if not is_pruned(data):
        name = str(data["run"]["source"]["name"])
        return f"{last_name(name) if is_place(name) else name}, trained"
    size = f"{data['parameters_after']:,} parameters" if data["form"] == "shrunk" else "masked"
    name, bracket, kind = data["model"].rpartition(" (")
    name = str((data["run"].get("chain") or {}).get("model", name))  # not what lay between steps
    model = f"{last_name(name) if is_place(name) else name}{bracket}{kind}"
    trained = ", trained" if data.get("recovery") else ""
    return f"{model}, {cut_method(data)}, sparsity {data['sparsity']:.3g}, {size}{trained}"


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
