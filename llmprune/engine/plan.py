"""What a run will do, decided from config, index and shapes before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.allocation import ALLOCATIONS
from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.arch.limits import longest_sequence
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.base.world import num_processes
from llmprune.catalog import Method
from llmprune.engine.amounts import (
    allocate,
    check_reads,
    choose_allocation,
    num_pruned,
    survey_cost,
)
from llmprune.engine.budgets import Budget, budget_of, cache_by_block, heads_shared
from llmprune.engine.collected import Collected
from llmprune.engine.cost import Estimate, Survey, estimate, measure_rate
from llmprune.engine.pace import machine_of, time_budget
from llmprune.engine.parts import (
    Needs,
    compose,
    needs_of,
    options_for,
    repair_passes,
    sequences_at_most,
    stand_in,
)
from llmprune.engine.ranks import check_ranks, decide_rank_form, rank_groups
from llmprune.engine.shapes import (
    Anatomies,
    Skipped,
    most_statistics,
    num_params,
    sizes_of,
    what_stays,
)
from llmprune.engine.shipping import Shipment, gone_of, is_gone
from llmprune.engine.sites import (
    Group,
    all_sites,
    check_units,
    groups_of,
    is_skipped,
    kinds_with_them,
)
from llmprune.engine.solving import Cutter
from llmprune.engine.unit_amounts import check_equal, check_widths
from llmprune.engine.whole import Whole, plan_whole
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import (
    GroupName,
    LowRank,
    Pattern,
    Units,
    Unstructured,
    parse_pattern,
)
from llmprune.recipe.models import EvaluateStep
from llmprune.score import RANK_SCORES, SCORES, WHOLE_SCORES, score_row
from llmprune.solver import SOLVERS
from llmprune.solver.types import Settings
from llmprune.stats import STATISTICS

if TYPE_CHECKING:
    import torch

    from llmprune.allocation.types import Probe, Remeasure
    from llmprune.recipe import Recipe
    from llmprune.recipe.pruning import PruneStep

Settle = Callable[[Sequence[Sequence[Group]], int], Budget]
MAX_SEQ_LEN = 2048
EVAL_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A run that is fully decided; its repr is the table of --dry-run.

    `facts` are numbers that its allocation says of itself. `counts` is None where they follow from
    a survey, which `with_profiles` completes the plan by; `verdict` is what the survey's judgement
    of the allocation was, `target` how the sparsity was found, and `whole` what is left of units
    that run through all blocks. `budget` says what is to go at least, and `cache` what a token
    leaves in every block's key/value cache, where that is known. `given` are statistics of the
    dense model that were collected before.
    """

    recipe: Recipe
    source_name: str
    out: str | None
    method: Method
    pattern: Pattern
    group: GroupName
    allocation: str
    form: str
    groups: tuple[tuple[Group, ...], ...]
    prefixes: tuple[str, ...]
    counts: Mapping[str, int] | None
    eligible: int
    num_params: int
    skipped: tuple[Skipped, ...]
    parts: Needs
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    budget: Budget
    stored_bytes: int
    cache: tuple[int, ...] | None
    seq_len: int
    num_samples: int
    eval_windows: int
    estimate: Estimate
    notes: tuple[str, ...] = field(default=())
    verdict: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    shipment: Shipment | None = None
    whole: Whole | None = None
    given: Collected | None = None

    @property
    def prune(self) -> PruneStep:
        return self.recipe.prune

    @property
    def asked(self) -> int:
        """Return the weights that are asked for, as far as it can be told beforehand."""
        return self.budget.weights

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def forward(self) -> bool:
        """Tell whether text is read: not for methods that look at weights alone."""
        return self.parts.tokens

    @property
    def surveys(self) -> bool:
        """Tell whether the model is looked at before the first cut."""
        learns = bool(self.parts.backward) or self.parts.gates
        return self.counts is None or learns or self.searches

    @property
    def searches(self) -> bool:
        """Tell whether a sparsity is looked for that keeps perplexity within a target."""
        return "ppl" in (self.prune.target or {})

    @property
    def draws(self) -> bool:
        """Tell whether masks follow from the seed, also where no text is drawn with it."""
        score = SCORES.get(self.method.score)
        return score is not None and "seed" in score.needs

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(all_sites(self.groups)) if self.whole is None else (self.whole.site,)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Return what of the config differs from the source's: numbers, and the model's type."""
        if self.shipment is None or self.form == "masked":
            return {}
        before, after = self.shipment.before, self.shipment.config
        told = {k: v for k, v in after.items() if isinstance(v, int) or k == "model_type"}
        return {key: value for key, value in told.items() if before.get(key) != value}

    @property
    def asked_share(self) -> float:
        """Return the share of the eligible weights that is asked for."""
        return self.asked / self.eligible

    @property
    def removed(self) -> int:
        """Return the number of weights that will be removed."""
        sites = self.sites
        if self.counts is None:
            units = isinstance(self.pattern, Units)
            return self.asked if units else num_pruned(self.prune, sites) * sites[0].unit_cost
        return sum(site.freed(self.counts[site.name]) for site in sites)

    @property
    def sparsity(self) -> float:
        """Return the share of the eligible weights that will be removed."""
        return self.removed / self.eligible

    def needs(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return the statistics that each tap of a block must give."""
        cut, around = self.parts.cut, self.parts.around
        found: dict[str, tuple[str, ...]] = {}
        for group in self.groups[index] if cut else ():
            if self._idle(index, group):
                continue
            for tap in group.around if around else ():
                found.setdefault(tap, around)
            if group.tap:
                found[group.tap] = cut
        return found

    def _idle(self, index: int, group: Group) -> bool:
        """Tell whether whole units could go of a group, but none do, or more than these."""
        if group.coupling is None or self.counts is None:
            return False
        (site,) = group.sites
        gone = gone_of(self.groups[index], self.counts)
        return not self.counts[site.name] or is_gone(site, gone)

    def options_of(self, defaults: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of one part of the run."""
        return options_for(self.prune.options, defaults)

    @property
    def probe_needs(self) -> tuple[str, ...]:
        """Return the statistics of taps that candidates are masked by, where any are probed."""
        if not (self.parts.probes or "remeasure" in ALLOCATIONS[self.allocation].needs):
            return ()
        name = stand_in(self.method.score)
        needs = score_row(name).learnt
        return tuple(name for name in needs if STATISTICS[name].observe == "tap")

    def with_profiles(
        self,
        profiles: Mapping[str, torch.Tensor],
        probe: Probe | None = None,
        remeasure: Remeasure | None = None,
    ) -> Plan:
        """Return the plan with the counts that follow from a survey."""
        return self._allocated(self.allocation, profiles, probe, remeasure)

    def with_allocation(self, name: str) -> Plan:
        """Return the plan with the counts of an allocation that needs no survey."""
        return self._allocated(name, {}, None)

    def recounted(self) -> Plan:
        """Return the plan with the counts of its recipe as it is now; None awaits a survey."""
        asked = math.ceil(exact_sparsity(self.prune.sparsity) * self.eligible)
        return self.with_budget(Budget(asked=asked, weights=asked))

    def with_budget(self, budget: Budget) -> Plan:
        """Return the plan with another budget, and its counts; None where they await a survey."""
        wish = (self.prune, self.allocation, self.pattern, self.sites, self.eligible)
        return replace(self, counts=allocate(*wish, budget=budget), budget=budget)

    def _allocated(
        self,
        name: str,
        profiles: Mapping[str, torch.Tensor],
        probe: Probe | None,
        remeasure: Remeasure | None = None,
    ) -> Plan:
        facts: dict[str, float] = {}
        counts = allocate(
            self.prune,
            name,
            self.pattern,
            self.sites,
            self.eligible,
            profiles=profiles,
            probe=probe,
            seed=self.recipe.seed,
            surveyed=True,
            budget=self.budget,
            remeasure=remeasure,
            facts=facts,
        )
        return replace(self, counts=counts, facts=facts)

    def masker(self) -> Cutter:
        """Return what candidates are cut by: masks alone, without updates, on dense statistics."""
        score = stand_in(self.method.score)
        method = replace(self.method, score=score, solver="zero", refine=None, repair=None)
        group = self.group if score == self.method.score else "row"
        options = self.options_of(score_row(score).options)
        return replace(self.cutter(), method=method, group=group, options=options, permute=False)

    def cutter(self) -> Cutter:
        """Return what decides each group."""
        return Cutter(
            method=self.method,
            pattern=self.pattern,
            group=self.group,
            shrink=self.form == "shrunk",
            counts=self.counts or {},
            stored=self.stored,
            seed=self.recipe.seed,
            settings=Settings(damping=self.prune.damping, damp=self.prune.damp),
            options=self.options_of(score_row(self.method.score).options),
            permute=self.prune.permute,
            widths=self.shipment.widths if self.shipment else {},
        )

    def __repr__(self) -> str:
        from llmprune.engine.plan_table import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from llmprune.engine.plan_table import plan_html

        return plan_html(self)


def _at_once(recipe: Recipe, num_samples: int, most: int | None) -> int:
    """Return the most sequences of a micro-batch: as asked, or such that all processes get some."""
    wish = recipe.calibration.micro_batch or -(-num_samples // num_processes())
    return min(wish, most or wish)


def make_plan(
    recipe: Recipe,
    anatomies: Anatomies,
    *,
    source_name: str,
    out: str | None,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    stored_bytes: int,
    stored: torch.dtype,
    converted_params: int = 0,
    may_evaluate: bool = True,
    budget: Budget | None = None,
    given: Collected | None = None,
) -> Plan:
    """Decide a run; with a `budget` that was decided before, by that. `given` are statistics in
    place of text.

    Raises:
        RecipeError: the wish does not fit the model.
        TooLarge: it does not fit the memory.
    """
    step = recipe.prune
    pattern = parse_pattern(step.pattern)
    method = compose(step, pattern)
    allocation = choose_allocation(step, method, pattern)
    form = decide_form(step, pattern)
    searches = "ppl" in (step.target or {})
    parts = needs_of(method, allocation, searches=searches, pattern=pattern)
    if given is not None:
        given.check_serves(parts, propagate=step.propagate, method=method.name)
        parts = replace(parts, given=True)
    elif recipe.calibration.statistics is not None:
        raise RecipeError(
            "calibration.statistics: a model in memory is calibrated on text. Give the folder of "
            "the model instead, or leave statistics out."
        )
    cache = cache_by_block(anatomies)

    def settle(groups: Sequence[Sequence[Group]], eligible: int) -> Budget:
        """Return what is to go, measured where that is asked for."""
        sites = all_sites(groups)
        if isinstance(pattern, Units):
            check_widths(step, sites, heads_shared(anatomies))
        if budget is not None:
            return budget
        if "latency" in (step.target or {}):
            machine = machine_of(step, config, device, stored, recipe.trust_remote_code)
            return time_budget(step, allocation, groups, anatomies, eligible, machine)
        size = {"num_params": num_params(anatomies), "num_bytes": stored_bytes}
        return budget_of(step, sites, eligible, **size, itemsize=stored.itemsize, cache=cache)

    if method.score in WHOLE_SCORES:
        found = _amounts_of_model(recipe, anatomies, method, config, stored, in_memory=out is None)
    else:
        found = _amounts_of_blocks(recipe, anatomies, pattern, allocation, parts, stored, settle)
    num_samples = recipe.calibration.num_samples
    seq_len = sequence_length(recipe, config)
    forward = parts.walks
    shape = sizes_of(anatomies, config, stored_bytes, stored.itemsize)
    itemsize = dtype.itemsize if forward or parts.given else stored.itemsize
    wants = recipe.evaluate if may_evaluate else None
    windows = wants.num_windows if wants else 0
    cost = estimate(
        shape,
        recipe=recipe,
        device=device,
        itemsize=itemsize,
        num_samples=num_samples,
        seq_len=seq_len,
        eval_tokens=windows * seq_len,
        forward=forward,
        removed_bytes=found.removed * stored.itemsize if form == "shrunk" else 0,
        converted_params=converted_params,
        rate=measure_rate(device, dtype),
        survey=found.survey,
        statistics_bytes=found.statistics_bytes,
        most=_at_once(recipe, num_samples, sequences_at_most(method, parts, step.options)),
        streams=1 + parts.dense + parts.inputs,
        passes=repair_passes(method, step.options) + 3 * bool(parts.regional),
        workspace=_workspace(method),
    )
    check_reads(step, allocation, cost)
    group = step.group or method.group
    return Plan(
        recipe=recipe,
        source_name=source_name,
        out=out,
        method=method,
        pattern=pattern,
        group=group,
        allocation=allocation,
        form=form,
        groups=found.groups,
        prefixes=anatomies.prefixes,
        counts=found.counts,
        eligible=found.eligible,
        num_params=num_params(anatomies),
        skipped=found.skipped,
        parts=parts,
        device=device,
        dtype=dtype,
        stored=stored,
        budget=found.budget,
        stored_bytes=stored_bytes,
        cache=tuple(cache) if cache else None,
        seq_len=seq_len,
        num_samples=num_samples,
        eval_windows=_windows(wants.perplexity if wants else False, windows, cost)
        if not searches
        else windows or EvaluateStep().num_windows,
        estimate=cost,
        notes=_notes(step, group, pattern, found.whole),
        whole=found.whole,
        given=given,
    )


class Amounts(NamedTuple):
    """What may go and how much: groups by block, eligible weights, those asked for, the counts.

    `removed` are all parameters that go, where that is known.
    """

    groups: tuple[tuple[Group, ...], ...]
    skipped: tuple[Skipped, ...]
    eligible: int
    budget: Budget
    counts: Mapping[str, int] | None
    removed: int
    survey: Survey | None
    statistics_bytes: int
    whole: Whole | None = None


def _amounts_of_blocks(
    recipe: Recipe,
    anatomies: Anatomies,
    pattern: Pattern,
    allocation: str,
    parts: Needs,
    stored: torch.dtype,
    settle: Settle,
) -> Amounts:
    """Return what goes of single blocks: weights, tiles, units.

    Raises:
        RecipeError: the wish does not fit the model.
    """
    step = recipe.prune
    along = kinds_with_them(pattern, anatomies)
    if EXPERT_CHANNELS in along:
        check_equal(allocation, EXPERT_CHANNELS)
    groups = tuple(
        groups_of(
            *(pattern, anatomy),
            block=index,
            prefix=prefix,
            skip=step.skip,
            with_them=along,
        )
        for index, (anatomy, prefix) in enumerate(
            zip(anatomies.blocks, anatomies.prefixes, strict=True)
        )
    )
    check_globs(step.skip, anatomies)
    if isinstance(pattern, LowRank) and all_sites(groups):
        groups = tuple(
            rank_groups(anatomy, here, tier=step.tier, block=index)
            for index, (anatomy, here) in enumerate(zip(anatomies.blocks, groups, strict=True))
        )
        check_ranks(step, groups, anatomies.model_type)
    sites = all_sites(groups)
    check_units(pattern, groups, anatomies)
    skipped, eligible = what_stays(anatomies, step, sites)
    if not sites:
        raise RecipeError(f"prune.skip: {list(step.skip)} leaves nothing to prune; skip less.")
    budget = settle(groups, eligible)
    counts = allocate(step, allocation, pattern, sites, eligible, budget=budget)
    removed = sum(site.freed(counts[site.name]) for site in sites) if counts else 0
    survey = survey_cost(
        *(step, allocation, pattern, sites, parts, stored, counts is None), budget=budget
    )
    learnt = most_statistics(anatomies, groups, {*parts.cut, *parts.survey})
    return Amounts(groups, skipped, eligible, budget, counts, removed, survey, learnt)


def _amounts_of_model(
    recipe: Recipe,
    anatomies: Anatomies,
    method: Method,
    config: Any,
    stored: torch.dtype,
    *,
    in_memory: bool,
) -> Amounts:
    """Return what goes of units that run through all blocks, of which each block has no group.

    Raises:
        RecipeError, UnsupportedModel: the wish does not fit the model.
    """
    whole, asked = plan_whole(
        *(recipe.prune, method, anatomies, config),
        in_memory=in_memory,
        itemsize=stored.itemsize,
        trust_remote_code=recipe.trust_remote_code,
    )
    return Amounts(
        groups=((),) * len(anatomies.blocks),
        skipped=whole.skipped,
        eligible=whole.eligible,
        budget=Budget(asked=asked, weights=asked),
        counts={whole.site.name: whole.removed},
        removed=num_params(anatomies) - whole.num_params,
        survey=whole.survey,
        statistics_bytes=whole.statistics_bytes,
        whole=whole,
    )


def check_globs(skip: Sequence[str], anatomies: Anatomies) -> None:
    """Check that every glob names a linear.

    Raises:
        RecipeError: one names none; says which linears there are.
    """
    pairs = list(zip(anatomies.prefixes, anatomies.blocks, strict=True))
    for glob in skip:
        if not any(is_skipped(name, p, [glob]) for p, block in pairs for name in block.linears):
            known = ", ".join(sorted(anatomies.blocks[0].linears)[:8])
            raise RecipeError(
                f"prune.skip: {glob!r} names no linear. The first block has {known}; type '*' for "
                "any characters, as in '*down_proj'."
            )


def _workspace(method: Method) -> tuple[int, int]:
    """Return what deciding a tap's linears holds beside them, in matrices as `Solver` counts."""
    if method.score in RANK_SCORES:
        return (4, 24)  # float64: the weight three times, and eigenvectors with their workspace
    return SOLVERS[method.solver].workspace if method.solver in SOLVERS else (3, 3)


def decide_form(step: PruneStep, pattern: Pattern) -> str:
    """Return how the result is stored: shrunk for whole units unless asked otherwise.

    Raises:
        RecipeError: single weights cannot be cut out of a dense matrix.
    """
    if isinstance(pattern, Units):
        if step.form == "masked" and EXPERTS in pattern.kinds:
            raise RecipeError(
                f"prune.form: masked would leave the experts that go in place, and pattern is "
                f"{step.pattern}: no weight that is zero keeps a router from choosing them. Type "
                "--set prune.form=shrunk, or --pattern expert-channels."
            )
        return "shrunk" if step.form == "auto" else step.form
    if isinstance(pattern, LowRank):
        return decide_rank_form(step)
    if step.form == "shrunk":
        raise RecipeError(
            f"prune.form: pattern {step.pattern!r} removes single weights, which a dense matrix "
            "cannot leave out. Use form masked, or pattern ffn-channels for smaller tensors."
        )
    return "masked"


def sequence_length(recipe: Recipe, config: Any) -> int:
    """Return the tokens per sequence: asked, or 2048 and no more than the model takes.

    Raises:
        RecipeError: longer than the model's maximum.
    """
    most = longest_sequence(config)
    asked = recipe.calibration.seq_len
    if asked is None:
        return min(MAX_SEQ_LEN, most or MAX_SEQ_LEN)
    if most and asked > most:
        raise RecipeError(
            f"calibration.seq_len: {asked} is longer than the {most} tokens that this model takes. "
            f"Type --seq-len {most} or less."
        )
    return asked


def _notes(
    step: PruneStep, group: GroupName, pattern: Pattern, whole: Whole | None
) -> tuple[str, ...]:
    """Return what a reader of the plan may not expect."""
    if whole is not None:
        return whole.notes
    if group == "mass" and not isinstance(pattern, Unstructured):
        within = "their own groups" if ":" in step.pattern else "their row"
        return (f"equal mass is for single weights; {step.pattern} competes within {within}",)
    return ()


def _windows(asked: bool | str, windows: int, cost: Estimate) -> int:
    """Return how many windows are scored: by default only where that adds little to the cut."""
    if asked == "auto":
        taken = cost.survey_seconds + cost.cut_seconds
        return windows if cost.evaluate_seconds <= EVAL_SHARE * taken else 0
    return windows if asked else 0
