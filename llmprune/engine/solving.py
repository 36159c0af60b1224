"""One group of one block: score, pool, choose, solve, and (for units) shrink or zero.

Legend: O outputs, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from llmprune.arch.types import Coupling, Site
from llmprune.catalog import Method
from llmprune.engine.sites import Group
from llmprune.mask.apply import masked
from llmprune.mask.packed import PackedMask, pack, unpack
from llmprune.mask.pattern import (
    Channels,
    GroupName,
    Pattern,
    Tiles,
    choose_keep,
    pool,
    tiles_kept,
)
from llmprune.mask.pieces import PIECE
from llmprune.mask.rank import keep_highest
from llmprune.score import SCORES
from llmprune.score.noise import seed_of
from llmprune.solver import SOLVERS
from llmprune.solver.types import Choose
from llmprune.stats.types import Stats
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

NO_TOKENS = "magnitude (no token reached it)"
EMPTY = Stats(num_tokens=0, values={})


@dataclass(kw_only=True)
class Outcome:
    """What became of a block: rows for the report, masks by linear, kept units by site."""

    rows: list[dict[str, object]] = field(default_factory=list)
    masks: dict[str, PackedMask] = field(default_factory=dict)
    kept_units: dict[str, Tensor] = field(default_factory=dict)
    cut_out: list[tuple[Coupling, Tensor]] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)

    def keep(self, linear: str, keep_OI: Tensor) -> None:
        """Keep the mask of a linear, packed: eight masks of a block take the room of one."""
        self.masks[linear] = PackedMask(pack(keep_OI), tuple(keep_OI.shape))

    def carry(self, prior: Mapping[str, Tensor]) -> None:
        """Keep the masks of an earlier pruning where this one decided nothing."""
        for linear in prior.keys() - self.masks.keys():
            self.keep(linear, prior[linear])


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """All that decides a group: method, pattern, counts, whether units are cut out or zeroed.

    `seed` is that of the run; scores that draw numbers get one of their own per linear.
    """

    method: Method
    pattern: Pattern
    group: GroupName
    shrink: bool
    counts: Mapping[str, int]
    seed: int = 0

    def cut(
        self,
        group: Group,
        block: Block,
        stats: Stats,
        prior: Mapping[str, Tensor],
        outcome: Outcome,
    ) -> None:
        """Decide and carry out one group; `prior` is the keep_OI of earlier prunings by linear."""
        if group.coupling is None:
            self._cut_weights(group, block, stats, prior, outcome)
        else:
            self._cut_units(group, block, stats, prior, outcome)

    @property
    def updates(self) -> bool:
        """Tell whether weights that stay may change."""
        return SOLVERS[self.method.solver].updates

    def redo(self, block: Block, outcome: Outcome) -> None:
        """Carry the same decisions out on another copy of the block, without deciding again."""
        for coupling, kept in outcome.cut_out:
            block.shrink(coupling, kept)
        if not outcome.cut_out:
            for linear, mask in outcome.masks.items():
                name = linear.removeprefix(block.prefix)
                keep_OI = unpack(mask.bits, mask.shape).to(block.device)
                block.replace(name, masked(block.weight(name), keep_OI))

    def _cut_weights(
        self,
        group: Group,
        block: Block,
        stats: Stats,
        prior: Mapping[str, Tensor],
        outcome: Outcome,
    ) -> None:
        assert not isinstance(self.pattern, Channels)
        score, fallback = self._score(stats)
        weights = {site.name: block.weight(site.spans[0].linear) for site in group.sites}
        chooses: dict[str, Choose] = {}
        errors: dict[str, float | None] = {}
        for site in group.sites:
            score_OI = self._scores(score, weights[site.name], stats, site.name)
            if site.name in prior:
                score_OI.masked_fill_(~prior[site.name].to(score_OI.device), -torch.inf)
            count = self.counts[site.name]
            keep_OI = choose_keep(self.pattern, score_OI, count, self.group, self.method.pool)
            if site.name in prior:
                keep_OI &= prior[site.name].to(keep_OI.device)
            chooses[site.name] = _answer(keep_OI)
            errors[site.name] = _diagonal_error(weights[site.name], keep_OI, stats)
            del score_OI
        solver = SOLVERS[self.method.solver].fn
        for site, solved in zip(
            group.sites, solver(weights, {group.tap: stats}, chooses).values(), strict=True
        ):
            block.replace(site.spans[0].linear, solved.weight_OI)
            outcome.keep(site.name, solved.keep_OI)
            outcome.touched |= block.params_of({site.spans[0].linear})
            outcome.rows.append(
                _row(
                    site,
                    self._removed_units(solved.keep_OI),
                    stats,
                    fallback,
                    errors[site.name],
                    weights=solved.keep_OI.numel() - int(solved.keep_OI.count_nonzero()),
                )
            )

    def _cut_units(
        self,
        group: Group,
        block: Block,
        stats: Stats,
        prior: Mapping[str, Tensor],
        outcome: Outcome,
    ) -> None:
        assert group.coupling is not None
        (site,) = group.sites
        score, fallback = self._score(stats)
        reader = next(span.linear for span in site.spans if span.axis == "in")
        score_OU = self._scores(score, block.weight(reader), stats, block.prefix + reader)
        unit_score_U = pool(score_OU, self.method.pool)
        count = self.counts[site.name]
        keep_U = keep_highest(unit_score_U[None], torch.tensor([count]))[0]
        kept = keep_U.nonzero().flatten()
        outcome.kept_units[site.name] = kept.to(torch.int32)
        if self.shrink:
            outcome.touched |= block.shrink(group.coupling, kept)
            outcome.cut_out.append((group.coupling, kept))
            for span in site.spans:
                if (earlier := prior.get(block.prefix + span.linear)) is not None:
                    dim = 0 if span.axis == "out" else 1
                    outcome.keep(block.prefix + span.linear, earlier.index_select(dim, kept))
        else:
            for span in site.spans:
                weight_OI = block.weight(span.linear)
                axis = keep_U[:, None] if span.axis == "out" else keep_U[None, :]
                keep_OI = axis.expand_as(weight_OI)
                block.replace(span.linear, masked(weight_OI, keep_OI))
                earlier = prior.get(block.prefix + span.linear)
                keep_OI = keep_OI if earlier is None else keep_OI & earlier.to(keep_OI.device)
                outcome.keep(block.prefix + span.linear, keep_OI)
                outcome.touched |= block.params_of({span.linear})
        outcome.rows.append(_row(site, count, stats, fallback, None))

    def _score(self, stats: Stats) -> tuple[str, str | None]:
        """Return the score to use: magnitude where activations are needed and none were seen."""
        if SCORES[self.method.score].learnt and stats.num_tokens == 0:
            return "magnitude", NO_TOKENS
        return self.method.score, None

    def _scores(self, score: str, weight_OI: Tensor, stats: Stats, linear: str) -> Tensor:
        """Return score_OI of one linear, known by its full name."""
        if "seed" in SCORES[score].needs:
            values = {**stats.values, "seed": seed_of(self.seed, linear)}
            stats = replace(stats, values=values)
        return SCORES[score].fn(weight_OI, stats)

    def _removed_units(self, keep_OI: Tensor) -> int:
        """Return how many weights, or whole tiles, a mask leaves out."""
        if isinstance(self.pattern, Tiles):
            keep_OI = tiles_kept(keep_OI, self.pattern)
        return keep_OI.numel() - int(keep_OI.count_nonzero())


def _answer(keep_OI: Tensor) -> Choose:
    """Return the choice of a score that does not adapt: decided once, the same for every call."""

    def choose(weight_OC: Tensor, cols: slice, curvature_C: Tensor | None) -> Tensor:
        return keep_OI[:, cols]

    return choose


def _diagonal_error(weight_OI: Tensor, keep_OI: Tensor, stats: Stats) -> float | None:
    """Return the relative error of a linear's output if its inputs were uncorrelated.

    The square root of sum(w^2 q over removed weights) / sum(w^2 q), with q = `col_sq`; None where
    the inputs were not observed.
    """
    if "col_sq" not in stats.values:
        return None
    removed = total = 0.0
    col_sq_I = stats["col_sq"].to(weight_OI.device, torch.float32)
    rows = max(1, PIECE // weight_OI.shape[1])
    for weight, keep in zip(weight_OI.split(rows), keep_OI.split(rows), strict=True):
        energy_OI = weight.float().square().mul_(col_sq_I)
        total += float(energy_OI.sum())
        removed += float(energy_OI.mul_(~keep).sum())
    return (removed / total) ** 0.5 if total else 0.0


def _row(
    site: Site,
    removed: int,
    stats: Stats,
    fallback: str | None,
    error: float | None,
    *,
    weights: int | None = None,
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
    return row
