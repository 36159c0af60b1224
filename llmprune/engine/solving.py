"""One group of one block: score, choose, refine, solve, and (for units) shrink or zero.

Legend: O outputs, I inputs, C columns asked for, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmprune.arch.couplings import EXPERTS
from llmprune.arch.experts import experts_of
from llmprune.arch.types import Site
from llmprune.catalog import Method
from llmprune.engine.factors import lower_ranks
from llmprune.engine.outcome import Order, Outcome, follow, output_error, reordered, row_of
from llmprune.engine.sites import Group
from llmprune.engine.units import (
    choose_units,
    columns_kept,
    compensate,
    is_deep,
    join,
    members_of,
    sliced_masks,
    unit_masks,
    unit_scores,
    with_diagonal,
    zero_units,
)
from llmprune.mask.apply import masked
from llmprune.mask.packed import unpack
from llmprune.mask.pattern import (
    GroupName,
    LowRank,
    NofM,
    Pattern,
    Tiles,
    Units,
    choose_keep,
    tiles_kept,
)
from llmprune.mask.permutation import permute_columns
from llmprune.score import SCORES, score_row
from llmprune.score.noise import seed_of
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS
from llmprune.solver.acceptance import accept
from llmprune.solver.errors import relative, row_errors
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats import STATISTICS
from llmprune.stats.types import Stats
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

NO_TOKENS = "magnitude (no token reached it)"
EMPTY = Stats(num_tokens=0, values={})
JUDGED = 16  # questions of an adaptive choice that are counted for the report, at least
BLOCK_COLUMNS = 128  # judged together by a score that adapts, where the pattern does not say


class Parts(NamedTuple):
    """What a group is cut with, and why that is not the method's own."""

    score: str
    solver: str
    refine: str | None
    group: GroupName
    fallback: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """All that decides a group: method, pattern, counts, whether units are cut out or zeroed.

    `widths` is to how many units a coupling is filled up with zeros once units were cut out.

    `seed` is that of the run; scores that draw numbers get one of their own per linear. `stored` is
    the dtype that weights are written in, which updated ones are rounded to before they are judged.
    """

    method: Method
    pattern: Pattern
    group: GroupName
    shrink: bool
    counts: Mapping[str, int]
    stored: torch.dtype
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    options: Mapping[str, float] = field(default_factory=dict)
    permute: bool = False
    widths: Mapping[str, int] = field(default_factory=dict)

    def cut(
        self,
        group: Group,
        block: Block,
        seen: Mapping[str, Stats],
        prior: Mapping[str, Tensor],
        outcome: Outcome,
        learnt: Mapping[str, Stats] | None = None,
    ) -> None:
        """Decide one group and, but for whole units, carry it out: `finish` does that for these.

        `seen` holds the statistics of taps; `prior` is the keep_OI of earlier prunings by linear;
        `learnt` what is known of single linears (names relative to the block) beside those.
        """
        if isinstance(self.pattern, LowRank):
            lower_ranks(self, group, block, seen.get(group.tap, EMPTY), prior, outcome)
        elif group.coupling is None:
            stats = seen.get(group.tap, EMPTY)
            self._cut_weights(group, block, stats, prior, outcome, learnt or {})
        else:
            self._cut_units(group, block, seen, outcome, learnt or {})
        stats = with_diagonal(seen.get(group.tap, EMPTY))
        if "col_sq" in stats.values:
            outcome.spreads.observe(group.tap, stats["col_sq"], stats.num_tokens)

    def finish(self, block: Block, outcome: Outcome, prior: Mapping[str, Tensor]) -> None:
        """Cut out, or set to zero, the units that go of a block once all its groups are decided."""
        if not isinstance(self.pattern, Units):
            return
        masks = outcome.unit_masks
        if self.shrink:
            for name, keep_OI in sliced_masks(prior, outcome.cut_out, block).items():
                outcome.keep(name, keep_OI)
            if any(row.kind == EXPERTS for row, _ in outcome.cut_out):
                experts = experts_of(block.anatomy.linears).values()
                outcome.numbered |= {block.prefix + name for names in experts for name in names}
        else:
            for linear, keep_OI in masks.items():
                earlier = prior.get(block.prefix + linear)
                if earlier is not None:
                    masks[linear] = keep_OI & earlier
                outcome.keep(block.prefix + linear, masks[linear])
        outcome.touched |= self._carry_out(block, outcome)

    def _carry_out(self, block: Block, outcome: Outcome) -> set[str]:
        """Cut units out or set them to zero; return the parameters that changed."""
        changed = block.clear(outcome.cleared)
        if self.shrink:
            return changed | block.shrink(outcome.cut_out, self.widths)
        return changed | zero_units(outcome.unit_masks, block)

    @property
    def updates(self) -> bool:
        """Tell whether weights that stay may change."""
        if isinstance(self.pattern, LowRank):
            return True
        solver = self.method.solver
        updates = solver in COMPENSATIONS if self.pattern_is_units else SOLVERS[solver].updates
        return updates or self.method.repair is not None

    @property
    def pattern_is_units(self) -> bool:
        """Tell whether whole units go."""
        return isinstance(self.pattern, Units)

    def redo(self, block: Block, outcome: Outcome) -> None:
        """Carry the same decisions out on another copy of the block, without deciding again."""
        if self.pattern_is_units:
            self._carry_out(block, outcome)
            return
        for coupling, order in outcome.permuted:
            block.permute(coupling, order)
        for linear, mask in outcome.masks.items():
            name = linear.removeprefix(block.prefix)
            keep_OI = unpack(mask.bits, mask.shape).to(block.device)
            block.replace(name, masked(block.weight(name), keep_OI))

    def reorder_writers(self, block: Block, outcome: Outcome) -> None:
        """Put the rows of linears in the order that their readers' columns were put into."""
        for coupling, order_U in outcome.permuted:
            outcome.touched |= block.permute(coupling, order_U, written_only=True)
            for span in coupling.spans:
                mask = outcome.masks.get(block.prefix + span.linear)
                if span.axis == "out" and mask is not None:
                    keep_OI = unpack(mask.bits, mask.shape)
                    outcome.keep(block.prefix + span.linear, keep_OI[order_U.cpu()])

    def _cut_weights(
        self,
        group: Group,
        block: Block,
        stats: Stats,
        prior: Mapping[str, Tensor],
        outcome: Outcome,
        learnt: Mapping[str, Stats],
    ) -> None:
        parts = self._parts(stats, group, learnt)
        weights = {site.name: block.weight(site.spans[0].linear) for site in group.sites}
        if self.permute and isinstance(self.pattern, NofM):
            order = self._reorder(group, block, parts, weights, stats, learnt)
            if order is not None:
                outcome.permuted.append(order)
                stats = reordered(stats, order[1])
                prior, learnt = follow(order, block.prefix, prior), follow(order, "", learnt)
        chooses: dict[str, Choose] = {}
        stages: dict[str, dict[str, float]] = {site.name: {} for site in group.sites}
        for site in group.sites:
            known = join(stats, learnt.get(site.spans[0].linear))
            judge = partial(outcome.spreads.judge, site.spans[0].linear)
            chooses[site.name] = self._choose(
                site, parts, weights[site.name], known, prior.get(site.name), judge
            )
        if parts.refine is not None:
            for name in prior.keys() & weights.keys():  # a repair may have moved zeros
                kept_OI = prior[name].to(weights[name].device)
                weights[name] = masked(weights[name], kept_OI)
            chooses = self._refined(parts, weights, stats, chooses, stages)
        solver = SOLVERS[parts.solver]
        solved = solver.fn(weights, stats, chooses, self.settings)
        for site in group.sites:
            weight_OI, result = weights[site.name], solved[site.name]
            error: float | None  # found before the weight, maybe a view, is replaced
            if solver.updates:
                found = self._accepted(weight_OI, result, stats["gram"], stages[site.name])
                result, error = found
            else:
                error = output_error(weight_OI, result, stats)
            block.replace(site.spans[0].linear, result.weight_OI.to(weight_OI.dtype))
            outcome.keep(site.name, result.keep_OI)
            outcome.touched |= block.params_of({site.spans[0].linear})
            outcome.rows.append(
                row_of(
                    site,
                    self._removed_units(result.keep_OI),
                    stats,
                    parts.fallback,
                    error,
                    weights=result.keep_OI.numel() - int(result.keep_OI.count_nonzero()),
                    facts={**result.facts, **({"stages": s} if (s := stages[site.name]) else {})},
                )
            )

    def _parts(self, stats: Stats, group: Group, learnt: Mapping[str, Stats]) -> Parts:
        """Return the score and solver to use: simpler ones where too few tokens were seen."""
        method, columns = self.method, (group.sites[0].shape or (0, 0))[1]
        needs = {*SCORES[method.score].learnt, *SOLVERS[method.solver].needs}
        if method.refine is not None:
            needs |= {*REFINEMENTS[method.refine].needs}
        own = Parts(method.score, method.solver, method.refine, self.group)
        places = {STATISTICS[name].observe for name in needs}
        unseen = "tap" in places and stats.num_tokens == 0
        if places - {"tap"}:  # an expert that no token reached has gradients of zero
            gradients = [learnt.get(site.spans[0].linear, EMPTY) for site in group.sites]
            unseen |= not any(bool(v.any()) for each in gradients for v in each.values.values())
        if unseen:
            return Parts("magnitude", "zero", None, self.group, NO_TOKENS)
        if "gram" in stats.values and stats.num_tokens < columns:
            score = "wanda" if SCORES[method.score].adaptive else method.score
            why = f"{score} ({stats.num_tokens} tokens for {columns} columns)"
            among: GroupName = "row" if score != method.score else self.group
            return Parts(score, "zero", None, among, why)
        return own

    def _choose(
        self,
        site: Site,
        parts: Parts,
        weight_OI: Tensor,
        stats: Stats,
        prior_OI: Tensor | None,
        judge: Callable[..., None],
    ) -> Choose:
        """Return how a linear's mask is chosen: at once, or column by column as a solver asks.

        `judge` counts the scores of what is kept and of what goes.
        """
        assert not isinstance(self.pattern, Units | LowRank)
        if SCORES[parts.score].adaptive:
            return self._adaptive(site, parts.score, prior_OI, judge)
        score_OI = self._scores(parts.score, weight_OI, stats, site.name)
        if prior_OI is not None:
            score_OI.masked_fill_(~prior_OI.to(score_OI.device), -torch.inf)
        count = self.counts[site.name]
        keep_OI = choose_keep(self.pattern, score_OI, count, parts.group, self.method.pool)
        if prior_OI is not None:
            keep_OI &= prior_OI.to(keep_OI.device)
        judge(score_OI, keep_OI)
        return decided(keep_OI)

    def _adaptive(
        self, site: Site, score: str, prior_OI: Tensor | None, judge: Callable[..., None]
    ) -> Choose:
        """Return a choice for the columns asked for, such that the linear's total is its count.

        Where an earlier pruning took more of some columns than their part, the others lose less.
        """
        pattern, total = self.pattern, self.counts[site.name]
        assert site.shape is not None and not isinstance(pattern, Units | LowRank)
        height, width = site.shape
        removed, step = [0], self._columns()

        def choose(weight_OC: Tensor, cols: slice, curvature_C: Tensor | None) -> Tensor:
            assert curvature_C is not None
            given = Stats(num_tokens=0, values={"curvature": curvature_C})
            score_OC = SCORES[score].fn(weight_OC, given)
            if cols.start == 0:
                removed[0] = 0
            stop = min(cols.stop, width)
            due = (2 * total * stop + width) // (2 * width)
            earlier = 0
            if prior_OI is not None:
                kept_OC = prior_OI[:, cols].to(score_OC.device)
                score_OC.masked_fill_(~kept_OC, -torch.inf)
                earlier = self._removed_units(kept_OC)
            num_units = height * (stop - cols.start) // site.unit_cost
            count = total * (stop - cols.start) // width
            if not isinstance(pattern, NofM):
                if prior_OI is not None:
                    due = min(due, total - self._removed_units(prior_OI[:, stop:]))
                count = min(max(due - removed[0], earlier), num_units)
            removed[0] += count
            keep_OC = choose_keep(pattern, score_OC, count, self.group, self.method.pool)
            if prior_OI is not None:
                keep_OC &= kept_OC
            among = max(1, width // (JUDGED * step))
            if cols.start // step % among == 0:  # some questions show how scores are spread
                judge(score_OC, keep_OC, first=cols.start == 0, parts=min(JUDGED, width // step))
            return keep_OC

        return Choose(fn=choose, adaptive=True, columns=step)

    def _columns(self) -> int:
        """Return how many columns a score that adapts judges together."""
        match self.pattern:
            case NofM(m=m):
                return m
            case Tiles(width=width):
                return max(width, BLOCK_COLUMNS // width * width)
        return BLOCK_COLUMNS

    def _refined(
        self,
        parts: Parts,
        weights: Mapping[str, Tensor],
        stats: Stats,
        chooses: Mapping[str, Choose],
        stages: Mapping[str, dict[str, float]],
    ) -> dict[str, Choose]:
        """Return fixed choices of masks with kept and pruned weights exchanged for the better."""
        assert parts.refine is not None
        within = self.pattern.m if isinstance(self.pattern, NofM) else None
        if any(choose.adaptive for choose in chooses.values()):
            solved = SOLVERS[parts.solver].fn(weights, stats, chooses, self.settings)
            keeps = {name: each.keep_OI for name, each in solved.items()}
        else:
            keeps = {name: choose.whole(weights[name]) for name, choose in chooses.items()}
        refined = {}
        for name, keep_OI in keeps.items():
            weight_OI = weights[name]
            better_OI = REFINEMENTS[parts.refine].fn(
                weight_OI, keep_OI, stats, within, self.settings
            )
            for stage, mask_OI in (("zeroed", keep_OI), (parts.refine, better_OI)):
                error = output_error(weight_OI, Solved(masked(weight_OI, mask_OI), mask_OI), stats)
                if error is not None:
                    stages[name][stage] = error
            refined[name] = decided(better_OI)
        return refined

    def _accepted(
        self, weight_OI: Tensor, solved: Solved, gram_II: Tensor, stages: dict[str, float]
    ) -> tuple[Solved, float]:
        """Return what is stored of an update, and its error: rows made worse are zeroed only."""
        solved = solved._replace(weight_OI=solved.weight_OI.to(weight_OI.dtype))
        found = accept(weight_OI, solved, gram_II, self.stored)
        whole = float(row_errors(weight_OI, gram_II).sum())
        stages["masked"] = relative(found.zeroed, whole)
        stages["updated"] = error = relative(found.left, whole)
        facts = {**solved.facts, "accepted": found.share}
        return found.solved._replace(facts=facts), error

    def _reorder(
        self,
        group: Group,
        block: Block,
        parts: Parts,
        weights: dict[str, Tensor],
        stats: Stats,
        learnt: Mapping[str, Stats],
    ) -> Order | None:
        """Put the inputs of a linear whose writers can follow into an order that keeps more.

        The linears that write these inputs are put in the same order once the block is decided, so
        the block computes what it did. Returns the order; None where there is no coupling.
        """
        assert isinstance(self.pattern, NofM)
        if len(group.sites) != 1:
            return None
        (site,) = group.sites
        linear = site.spans[0].linear
        coupling = block.coupling_read_by(linear)
        if coupling is None:
            return None
        score = parts.score if not SCORES[parts.score].adaptive else "wanda"
        known = with_diagonal(join(stats, learnt.get(linear)))
        weight_OI = weights[site.name]
        score_OI = self._scores(score, weight_OI, known, site.name)
        order_I = permute_columns(score_OI, self.pattern.n, self.pattern.m)
        weights[site.name] = weight_OI.index_select(1, order_I.to(weight_OI.device))
        return coupling, order_I

    def _cut_units(
        self,
        group: Group,
        block: Block,
        seen: Mapping[str, Stats],
        outcome: Outcome,
        learnt: Mapping[str, Stats],
    ) -> None:
        """Decide which units of a coupling go, and make up for them in what reads them."""
        assert group.coupling is not None
        (site,) = group.sites
        count = self.counts[site.name]
        stats = seen.get(group.tap, EMPTY)
        facts: dict[str, Any] = {}
        fallback = None
        keep_U = torch.full((site.num_units,), not is_deep(site) or not count)
        if is_deep(site):
            outcome.cleared += [span.linear for span in site.spans] if count else []
        elif count:
            method, fallback = self._unit_method(group, stats, learnt)
            members = members_of(group, block, seen, learnt)
            unit_score_U = unit_scores(
                *(method, members, site, self.options),
                draw=lambda linear: seed_of(self.seed, block.prefix + linear),
            )
            keep_U = choose_units(unit_score_U, count, site.num_groups).cpu()
            name = site.name.removeprefix(block.prefix)
            outcome.spreads.judge(name, unit_score_U[:, None].cpu(), keep_U[:, None])
            if method.solver in COMPENSATIONS:
                columns = block.anatomy.linears[str(group.coupling.reader)].shape[1]
                keep_I = columns_kept(group.coupling, keep_U, columns)
                facts, changed = compensate(
                    *(method.solver, group.coupling, block, stats, keep_I),
                    settings=self.settings,
                    stored=self.stored,
                )
                outcome.touched |= changed
        if count and not self.shrink:
            for linear, keep_OI in unit_masks(group, block, keep_U).items():
                before = outcome.unit_masks.get(linear)
                outcome.unit_masks[linear] = keep_OI if before is None else before & keep_OI
        kept = keep_U.nonzero().flatten()
        outcome.kept_units[site.name] = kept.to(torch.int32)
        if not is_deep(site):
            outcome.cut_out.append((group.coupling, kept))
        error = facts.pop("error", None)
        outcome.rows.append(row_of(site, count, stats, fallback, error, facts=facts))

    def _unit_method(
        self, group: Group, stats: Stats, learnt: Mapping[str, Stats]
    ) -> tuple[Method, str | None]:
        """Return the method, or magnitudes where a score needs tokens and none came."""
        row = score_row(self.method.score)
        learns = any(STATISTICS[name].observe == "tap" for name in row.learnt)
        if not learns or stats.num_tokens or not group.tap:
            return self.method, None
        return replace(self.method, score="magnitude", reduce="reader", solver="zero"), NO_TOKENS

    def _scores(self, score: str, weight_OI: Tensor, stats: Stats, linear: str) -> Tensor:
        """Return score_OI of one linear, known by its full name."""
        if "seed" in SCORES[score].needs:
            values = {**stats.values, "seed": seed_of(self.seed, linear)}
            stats = replace(stats, values=values)
        options = self.options if score == self.method.score else {}
        found: Tensor = SCORES[score].fn(weight_OI, with_diagonal(stats), **options)
        return found

    def _removed_units(self, keep_OI: Tensor) -> int:
        """Return how many weights, or whole tiles, a mask leaves out."""
        if isinstance(self.pattern, Tiles):
            keep_OI = tiles_kept(keep_OI, self.pattern)
        return keep_OI.numel() - int(keep_OI.count_nonzero())


def decided(keep_OI: Tensor) -> Choose:
    """Return the choice of a mask that was decided once: the same for every question."""

    def choose(weight_OC: Tensor, cols: slice, curvature_C: Tensor | None) -> Tensor:
        return keep_OI[:, cols]

    return Choose(fn=choose)
