"""What became of a block: lines of the report, masks, kept units, and the order of its units.

Legend: O outputs, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch

from llmprune.arch.types import Coupling, Site
from llmprune.engine.spreads import Spreads
from llmprune.mask.packed import PackedMask, pack, unpack
from llmprune.mask.pieces import PIECE
from llmprune.solver.errors import relative_error
from llmprune.solver.types import Fact, Solved
from llmprune.stats.types import Stats
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

Order = tuple[Coupling, "Tensor"]
"""A coupling, and which of its units comes where: order_U."""
_OfLinear = TypeVar("_OfLinear", "Tensor", Stats)


@dataclass(kw_only=True)
class Outcome:
    """What became of a block: rows for the report, masks by linear, kept units by site.

    Where whole units go, `cut_out` are couplings with the units kept, `unit_masks` (by linear,
    relative to the block) what they leave, and `cleared` the linears of halves that go. Linears of
    experts are `numbered` anew where some of these went. `spreads` says how scores and activations
    are spread.
    """

    rows: list[dict[str, object]] = field(default_factory=list)
    masks: dict[str, PackedMask] = field(default_factory=dict)
    kept_units: dict[str, Tensor] = field(default_factory=dict)
    cut_out: list[tuple[Coupling, Tensor]] = field(default_factory=list)
    unit_masks: dict[str, Tensor] = field(default_factory=dict)
    cleared: list[str] = field(default_factory=list)
    permuted: list[Order] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    facts: dict[str, Fact] = field(default_factory=dict)
    numbered: set[str] = field(default_factory=set)
    spreads: Spreads = field(default_factory=Spreads)

    def keep(self, linear: str, keep_OI: Tensor) -> None:
        """Keep the mask of a linear, packed: eight masks of a block take the room of one."""
        self.masks[linear] = PackedMask(pack(keep_OI), tuple(keep_OI.shape))

    def keeps(self, block: Block) -> dict[str, Tensor]:
        """Return the masks keep_OI of a block by linear, names relative to it, on its device."""
        return {
            linear.removeprefix(block.prefix): unpack(mask.bits, mask.shape).to(block.device)
            for linear, mask in self.masks.items()
        }

    def take(self, other: Outcome) -> None:
        """Add what became of a group that was solved by itself."""
        self.rows.extend(other.rows)
        self.masks |= other.masks
        self.touched |= other.touched
        self.facts |= other.facts
        self.spreads.take(other.spreads)

    def carry(self, prior: Mapping[str, Tensor], prefix: str) -> None:
        """Keep the masks of an earlier pruning of a block where this one decided nothing."""
        for order in self.permuted:
            prior = follow(order, prefix, prior)
        for linear in sorted(prior.keys() - self.masks.keys() - self.numbered):
            self.keep(linear, prior[linear])


def follow(order: Order, prefix: str, known: Mapping[str, _OfLinear]) -> dict[str, _OfLinear]:
    """Return what is known of linears (O, I), by name, in the order that a coupling was put into.

    Rows of the linears that write its units, columns of those that read them; `prefix` begins the
    names of the block's linears.
    """
    coupling, order_U = order
    found = dict(known)
    for span in coupling.spans:
        name, dim = prefix + span.linear, 0 if span.axis == "out" else 1
        if name in found:
            found[name] = _selected(found[name], dim, order_U)
    return found


def _selected(known: _OfLinear, dim: int, order_U: Tensor) -> _OfLinear:
    """Return a matrix, or every statistic that is one, with an axis in order."""
    if isinstance(known, Stats):
        values = {
            name: value if value.ndim < 2 else value.index_select(dim, order_U.to(value.device))
            for name, value in known.values.items()
        }
        return replace(known, values=values)
    return known.index_select(dim, order_U.to(known.device))


def reordered(stats: Stats, order_I: Tensor) -> Stats:
    """Return the statistics of a tap whose columns stand in another order."""
    values = {}
    for name, value in stats.values.items():
        value = value.index_select(0, order_I.to(value.device))
        values[name] = value if value.ndim < 2 else value.index_select(1, order_I.to(value.device))
    return replace(stats, values=values)


def output_error(weight_OI: Tensor, solved: Solved, stats: Stats) -> float | None:
    """Return the relative error of a linear's output: exact by the Gram matrix, where there is one.

    Otherwise it is what it would be if inputs were uncorrelated: the square root of sum(w^2 q over
    removed weights) / sum(w^2 q), with q = `col_sq`. None where the inputs were not observed.
    """
    if "gram" in stats.values:
        return relative_error(weight_OI, solved.weight_OI, stats["gram"])
    if "col_sq" not in stats.values:
        return None
    removed = total = 0.0
    col_sq_I = stats["col_sq"].to(weight_OI.device, torch.float32)
    rows = max(1, PIECE // weight_OI.shape[1])
    for weight, keep in zip(weight_OI.split(rows), solved.keep_OI.split(rows), strict=True):
        energy_OI = weight.float().square().mul_(col_sq_I)
        total += float(energy_OI.sum())
        removed += float(energy_OI.mul_(~keep).sum())
    return (removed / total) ** 0.5 if total else 0.0


def row_of(
    site: Site,
    removed: int,
    stats: Stats,
    fallback: str | None,
    error: float | None,
    *,
    weights: int | None = None,
    facts: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return a site's line of the report.

    `weights` are those that went, where more may have gone than whole units: an earlier pruning
    leaves tiles with holes.
    """
    weights = removed * site.unit_cost if weights is None else weights
    row: dict[str, object] = {
        "site": site.name,
        "units": site.num_units,
        "removed": removed,
        "weights": site.num_weights,
        "removed_weights": weights,
        "sparsity": weights / site.num_weights,
        "tokens": stats.num_tokens,
        "error": error,
    }
    if fallback:
        row["fallback"] = fallback
    return row | dict(facts or {})
