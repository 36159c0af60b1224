"""Making a plan: what a wish means for a model, by its config, index and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.arch.limits import window_length
from llmprune.base.errors import RecipeError
from llmprune.base.world import num_processes
from llmprune.catalog import Method
from llmprune.engine.amounts import (
    allocate,
    check_reads,
    choose_allocation,
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
    repair_passes,
    sequences_at_most,
)
from llmprune.engine.plan import Plan
from llmprune.engine.ranks import check_ranks, decide_rank_form, rank_groups
from llmprune.engine.shapes import (
    Anatomies,
    Skipped,
    most_statistics,
    num_params,
    sizes_of,
    what_stays,
)
from llmprune.engine.sites import (
    Group,
    all_sites,
    check_units,
    groups_of,
    is_skipped,
    kinds_with_them,
)
from llmprune.engine.unit_amounts import check_equal, check_widths
from llmprune.engine.whole import Whole, plan_whole
from llmprune.mask.pattern import (
    GroupName,
    LowRank,
    Pattern,
    Units,
    Unstructured,
    parse_pattern,
)
from llmprune.recipe.models import EvaluateStep
from llmprune.score import RANK_SCORES, WHOLE_SCORES
from llmprune.solver import SOLVERS

if TYPE_CHECKING:
    import torch

    from llmprune.recipe import Recipe
    from llmprune.recipe.pruning import PruneStep

Settle = Callable[[Sequence[Sequence[Group]], int], Budget]
MAX_SEQ_LEN = 2048
EVAL_SHARE = 0.25


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
    parts = needs_of(
        *(method, allocation), searches=searches, pattern=pattern, options=step.options
    )
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
        cut_forward=parts.cut_walks,
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
    asked = recipe.calibration.seq_len
    return window_length(asked, config, usual=MAX_SEQ_LEN, key="calibration.seq_len")


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
