"""How much every site loses: which allocation decides, whether it can, and the integer counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.projector import project
from llmprune.allocation.types import Probe, Profile, Remeasure, Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.catalog import METHODS, Method, methods_for
from llmprune.engine.budgets import EMPTY, Budget
from llmprune.engine.cost import Estimate, Survey
from llmprune.engine.parts import Needs, allocation_of, options_for
from llmprune.engine.ranks import rank_counts
from llmprune.engine.sites import is_skipped
from llmprune.engine.target import ROUNDS, SPLITS
from llmprune.engine.unit_amounts import allocate_units, choose_unit_allocation, request_of
from llmprune.mask.counts import exact_sparsity, round_half_up
from llmprune.mask.pattern import LowRank, NofM, Pattern, Tiles, Units
from llmprune.score import SCORES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.recipe.pruning import PruneStep


def choose_allocation(step: PruneStep, method: Method, pattern: Pattern) -> str:
    """Return the allocation: asked for, implied by named shares, or the method's own.

    Raises:
        UnknownName: no allocation has this name.
        RecipeError: it cannot be used with this method or pattern; says why.
    """
    if isinstance(pattern, Units):
        return choose_unit_allocation(step, method, pattern)
    name = allocation_of(step, method)
    if isinstance(pattern, LowRank):
        return name
    if ALLOCATIONS[name].units:
        raise RecipeError(
            f"prune.allocation: {name} decides about whole units, and pattern {step.pattern} "
            "removes weights. Type --pattern ffn-channels+heads, or --set "
            "prune.allocation=uniform."
        )
    ranks = is_ranked(name)
    if step.min_keep is not None and not ranks:
        raise RecipeError(
            f"prune.min_keep: {step.min_keep:g} limits what a ranking of the whole model takes "
            f"from one linear, and allocation {name} ranks none. Leave it out, or choose the "
            f"allocation with --set prune.allocation=global."
        )
    if ranks and (SCORES[method.score].learnt or SCORES[method.score].adaptive):
        own = next((row.name for row in METHODS.values() if row.allocation == name), "magnitude")
        raise RecipeError(
            f"prune.allocation: {name} ranks the weights of all linears together, but the scores "
            f"of {method.name} grow with the activations that a linear reads and so differ in "
            f"scale from linear to linear. Use --method {own}, or --set prune.allocation=uniform."
        )
    if isinstance(pattern, NofM) and name != "uniform":
        raise RecipeError(
            f"prune.allocation: {step.pattern} fixes what every linear loses, so {name} has "
            f"nothing to decide. Use --pattern unstructured{_plain(method)}."
        )
    _check_pattern(step, method)
    return name


def is_ranked(name: str) -> bool:
    """Tell whether an allocation ranks all units of the model together."""
    profile = ALLOCATIONS[name].profile
    return profile is not None and profile.ranked


def allocate(
    step: PruneStep,
    allocation: str,
    pattern: Pattern,
    sites: Sequence[Site],
    eligible: int,
    *,
    profiles: Mapping[str, Tensor] | None = None,
    probe: Probe | None = None,
    seed: int = 0,
    surveyed: bool = False,
    budget: Budget | None = None,
    remeasure: Remeasure | None = None,
    facts: dict[str, float] | None = None,
) -> dict[str, int] | None:
    """Return how many units each site loses; None where that awaits a survey.

    Of whole units those go that a budget asks for.

    Raises:
        RecipeError: the asked share cannot be reached.
    """
    row, target = ALLOCATIONS[allocation], exact_sparsity(step.sparsity)
    if isinstance(pattern, NofM):
        target = pattern.sparsity or target
        return {site.name: int(site.num_units * target) for site in sites}
    if isinstance(pattern, Units):
        return allocate_units(
            *(step, allocation, sites, budget or EMPTY),
            profiles=profiles,
            probe=probe,
            remeasure=remeasure,
            seed=seed,
            surveyed=surveyed,
            facts=facts,
        )
    if is_ranked(allocation):
        _check_spared(step, allocation, sites)
    if not surveyed and (row.profile is not None or row.judged):
        return None
    request = Request(
        sites=sites,
        target=target,
        named=name_shares(step.sparsities or {}, sites),
        profiles=profiles or {},
        options=options_for(step.options, row.options),
        seed=seed,
        probe=probe,
    )
    shares = row.fn(request)
    if isinstance(pattern, LowRank):
        return rank_counts(sites, shares)
    units = {site.name: site.num_units for site in sites}
    whole = {name: share * units[name] for name, share in shares.items()}
    if allocation != "uniform" and all(count.denominator == 1 for count in whole.values()):
        return {name: int(count) for name, count in whole.items()}
    costs = {site.name: site.unit_cost for site in sites}
    if isinstance(pattern, Tiles) or allocation != "uniform":
        gone = num_pruned(step, sites) * sites[0].unit_cost
        return project(shares, units, costs, budget=gone, exact=True)
    return project(shares, units, costs, budget=target)


def num_pruned(step: PruneStep, sites: Sequence[Site]) -> int:
    """Return how many of all units go: the asked share of their number, rounded half up."""
    return round_half_up(exact_sparsity(step.sparsity) * sum(site.num_units for site in sites))


def spared(step: PruneStep, allocation: str, sites: Sequence[Site]) -> dict[str, int]:
    """Return how many units of each site a ranking leaves whatever their rank: at least one."""
    share = ALLOCATIONS[allocation].min_keep
    if step.min_keep is not None:
        share = exact_sparsity(step.min_keep)
    return {site.name: max(1, math.ceil(share * site.num_units)) for site in sites}


def name_shares(sparsities: Mapping[str, float], sites: Sequence[Site]) -> dict[str, Fraction]:
    """Return the share of every site that a glob names, by full name or relative to its block.

    Raises:
        RecipeError: a glob names no site, or two name one site differently.
    """
    found: dict[str, tuple[str, Fraction]] = {}
    for glob, share in sparsities.items():
        exact, any_named = exact_sparsity(share), False
        for site in sites:
            linear = site.spans[0].linear
            if not is_skipped(linear, site.name.removesuffix(linear), [glob]):
                continue
            any_named = True
            before, other = found.setdefault(site.name, (glob, exact))
            if other != exact:
                raise RecipeError(
                    f"prune.sparsities: {before!r} gives {site.name} {float(other):g}, and "
                    f"{glob!r} gives it {float(exact):g}. Write globs that do not overlap."
                )
        if not any_named:
            known = [site.spans[0].linear for site in sites if site.block == sites[0].block]
            raise RecipeError(
                f"prune.sparsities: {glob!r} names no linear that is pruned. The first block has "
                f"{', '.join(sorted(known)[:8])}; type '*' for any characters, as in '*down_proj'."
            )
    return {name: share for name, (_, share) in found.items()}


def survey_cost(
    step: PruneStep,
    allocation: str,
    pattern: Pattern,
    sites: Sequence[Site],
    parts: Needs,
    stored: torch.dtype,
    awaited: bool,
    budget: Budget = EMPTY,
) -> Survey | None:
    """Return what is read and held before the first cut; `stored` is the dtype of the weights.

    A ranking looks twice unless all scores of a bin are equal, as magnitudes in bfloat16 are.
    `awaited` says that counts follow from a survey.
    """
    row = ALLOCATIONS[allocation]
    profile = row.profile if awaited else None
    searches = step.target is not None and "ppl" in step.target
    if not (awaited or parts.backward or parts.gates or searches):
        return None
    ranked = profile is not None and profile.ranked
    plain = profile is not None and profile.normalise is None and not isinstance(pattern, Tiles)
    once = not ranked or (plain and str(stored) == "torch.bfloat16")
    rounds: list[int] = [1, *[SPLITS] * ROUNDS] if searches else []
    if awaited and row.rounds_for is not None:
        rounds += row.rounds_for(request_of(step, allocation, budget.priced(sites), budget.asked))
    elif awaited and row.rounds is not None:
        rounds += row.rounds(len(sites), options_for(step.options, row.options))
    if awaited and row.judged:
        rounds.append(2)
    walks = awaited and (profile is not None or row.judged)
    return Survey(
        num_reads=(1 if once else 1 + _num_classes(profile, sites)) if walks else 0,
        num_linears=len(sites) if ranked else 0,
        forward=bool(parts.survey or parts.probes),
        rounds=tuple(rounds),
        target=searches,
        moments=len(parts.backward),
        steps=parts.gates,
    )


def _num_classes(profile: Profile | None, sites: Sequence[Site]) -> int:
    """Return how many rankings there are, each of which may take a second look."""
    if profile is None or profile.among is None:
        return 1
    return len({profile.among(site.spans[0].linear) for site in sites})


def check_reads(step: PruneStep, allocation: str, cost: Estimate) -> None:
    """Check that an allocation does not read the checkpoint more often than it may.

    Steps that train gates do not count: the recipe says how many there are.

    Raises:
        RecipeError: it would; says how often.
    """
    num_reads = cost.num_reads - cost.gate_reads
    if num_reads > step.max_reads:
        given = options_for(step.options, ALLOCATIONS[allocation].options)
        rounds = int(given.get("generations", 0)) // 2
        lower = f"--set prune.options.generations={rounds} reads it less; " if rounds else ""
        raise RecipeError(
            f"prune.allocation: {allocation} would read the checkpoint {num_reads:,} times, "
            f"once per walk, where {step.max_reads} are allowed. {lower}"
            f"--set prune.max_reads={num_reads} allows it."
        )


def _check_spared(step: PruneStep, allocation: str, sites: Sequence[Site]) -> None:
    """Raise where more is asked than a ranking may take."""
    total = sum(site.num_units for site in sites)
    most = total - sum(spared(step, allocation, sites).values())
    if num_pruned(step, sites) > most:
        raise RecipeError(
            f"prune.sparsity: {step.sparsity:g} cannot be removed. At most {most / total:.6g} can, "
            "because a share of every linear, prune.min_keep, always stays. Lower one of them, as "
            "in --set prune.min_keep=0.01."
        )


def _check_pattern(step: PruneStep, method: Method) -> None:
    """Raise where a method does not say how to choose such a mask."""
    able = methods_for(step.pattern)
    if method.name not in able:
        raise RecipeError(
            f"prune.pattern: method {method.name} has no rule for {step.pattern}; it is for "
            f"{', '.join(method.patterns)}. Use another pattern, or a method that has one: "
            f"{', '.join(able)}."
        )


def _plain(method: Method) -> str:
    """Return what else to type where the allocation comes with the method."""
    plain = next(
        (
            row
            for row in METHODS.values()
            if (row.score, row.allocation) == (method.score, "uniform")
        ),
        method,
    )
    return f", or --method {plain.name}" if plain is not method else ""
