"""How many whole units every site loses: which allocation decides, and the integer counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, NoReturn

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.projector import default_multiple, project
from llmprune.allocation.types import Allocation, Probe, Remeasure, Request
from llmprune.allocation.units import legal_counts, shareable
from llmprune.arch.couplings import (
    CHANNELS,
    DEPTHS,
    EXPERT_CHANNELS,
    EXPERTS,
    HEADS,
    QUERY_HEADS,
)
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.catalog import Method
from llmprune.engine.budgets import Budget, multiple_of
from llmprune.engine.parts import allocation_of, options_for
from llmprune.mask.pattern import Units

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.recipe.pruning import PruneStep

MIXED = (EXPERTS, EXPERT_CHANNELS)
EQUAL = ("uniform", "widths")  # allocations that give every block as much of every kind
WISHED = ("cfsp", "similarity", "adapt-pruner")  # shares that are wishes, not legal counts
DEFAULT_DEPTH = "finercut"
TRIES = 8


def choose_unit_allocation(step: PruneStep, method: Method, pattern: Units) -> str:
    """Return the allocation of whole units: asked for, or the method's own.

    Raises:
        UnknownName: no allocation has this name.
        RecipeError: it decides about weights, or about other units.
    """
    name = allocation_of(step, method)
    row = ALLOCATIONS[name]
    others = sorted(each for each, other in ALLOCATIONS.items() if other.units)
    if mixed := [kind for kind in pattern.kinds if kind in MIXED]:
        if step.allocation is None and not step.sparsities and not pattern.deep:
            name = "uniform"
        check_equal(name, mixed[0])
    if name != "uniform" and not row.units:
        raise RecipeError(
            f"prune.allocation: {name} gives single weights of linears shares of their own, and "
            f"{step.pattern} removes whole units. Type --set prune.allocation=uniform, or one of "
            f"{', '.join(others)}."
        )
    if name == "uniform" and pattern.deep:
        raise RecipeError(
            f"prune.allocation: equal shares mean nothing for {step.pattern}, of which every block "
            f"has one. Type --set prune.allocation={DEFAULT_DEPTH}, or --method {DEFAULT_DEPTH}."
        )
    missing = [kind for kind in _kinds(pattern) if kind not in method.patterns]
    if missing:
        from llmprune.catalog import METHODS

        able = [each.name for each in METHODS.values() if {*_kinds(pattern)} <= {*each.patterns}]
        raise RecipeError(
            f"prune.pattern: method {method.name} has no rule for {missing[0]}; it is for "
            f"{', '.join(method.patterns)}. Methods for {step.pattern}: {', '.join(able)}."
        )
    return name


def check_equal(allocation: str, kind: str) -> None:
    """Check that an allocation gives all mixtures of a model equal sizes, as their config must.

    Raises:
        RecipeError: it does not, or tries what masks cannot stand for.
    """
    if allocation != "uniform":
        raise RecipeError(
            f"prune.allocation: {allocation} compares counts by blocks or by masked candidates, "
            f"and of {kind} one entry of the config speaks for all blocks: every mixture loses "
            "equally many. Type --set prune.allocation=uniform."
        )


def _kinds(pattern: Units) -> list[str]:
    """Return the kinds of a pattern as methods name them."""
    return ["blocks" if kind == "block" else kind for kind in pattern.kinds]


def allocate_units(
    step: PruneStep,
    allocation: str,
    sites: Sequence[Site],
    budget: Budget,
    *,
    profiles: Mapping[str, Tensor] | None = None,
    probe: Probe | None = None,
    remeasure: Remeasure | None = None,
    seed: int = 0,
    surveyed: bool = False,
    facts: dict[str, float] | None = None,
) -> dict[str, int] | None:
    """Return how many units each site loses, to meet a budget at least; None awaits a survey.

    Sites without a price in the budget lose nothing.

    Raises:
        RecipeError: the asked size cannot be reached, with what can.
    """
    row = ALLOCATIONS[allocation]
    if not surveyed and (row.profile is not None or "probe" in row.needs):
        return None
    none = {site.name: 0 for site in sites}
    sites = budget.priced(sites)
    request = replace(
        request_of(step, allocation, sites, budget.asked),
        profiles=profiles or {},
        probe=probe,
        remeasure=remeasure,
        seed=seed,
    )
    _check_least(step, request, budget.asked)
    _check_widths_give(step, request, budget.asked)
    shares = row.fn(request)
    if facts is not None:
        facts |= request.facts
    units = {site.name: site.num_units for site in sites}
    if row.units and allocation not in WISHED:
        if step.target and probe is None:
            shares = _enough(row, request, shares)
        return none | {name: int(share * units[name]) for name, share in shares.items()}
    return none | project(
        shares,
        units,
        {site.name: site.unit_cost for site in sites},
        budget=budget.asked,
        ties=[list(tie) for tie in request.ties],
        legal=_legal_by_site(sites, request),
        what=step.pattern,
    )


def _legal_by_site(sites: Sequence[Site], request: Request) -> dict[str, list[int]]:
    """Return the counts that every site may lose; of tied sites those that are legal for all."""
    found = {site.name: _wished_counts(site, request) for site in sites}
    for tie in request.ties:
        shared = set.intersection(*(set(found[name]) for name in tie))
        found |= dict.fromkeys(tie, sorted(shared))
    return found


def _enough(row: Allocation, request: Request, shares: dict[str, Fraction]) -> dict[str, Fraction]:
    """Return shares that meet a target: an allocation may end at what is nearest to it, below."""
    total = sum(site.num_weights for site in request.sites)
    aim = request.target
    for _ in range(TRIES):
        removed = sum(shares[site.name] * site.num_weights for site in request.sites)
        missing = request.target - Fraction(removed) / total
        if missing <= 0:
            break
        aim = min(Fraction(1), aim + missing)
        shares = row.fn(replace(request, target=aim))
    return shares


def _check_least(step: PruneStep, request: Request, asked: int) -> None:
    """Check that mixtures may lose as many experts as are asked for.

    Raises:
        RecipeError: a token would find fewer than it is sent to.
    """
    experts = [site for site in request.sites if site.kind == EXPERTS]
    if not experts or len(experts) < len(request.sites):
        return
    most = sum(legal_counts(site, None)[-1] * site.unit_cost for site in experts)
    if asked > most:
        share = math.floor(1000 * step.sparsity * most / asked) / 1000
        raise RecipeError(
            f"prune.sparsity: {step.sparsity:g} of all weights in blocks is more than experts can "
            f"give. A token is sent to so many of them that {experts[0].least} of "
            f"{experts[0].num_units} stay in every mixture, so at most {share:g} can go. Type "
            f"--sparsity {share:g}, or --pattern expert-channels."
        )


def _check_widths_give(step: PruneStep, request: Request, asked: int) -> None:
    """Check that channels and heads hold as much as a sparsity asks for, with some of each left.

    Raises:
        RecipeError: they do not; says how much they hold.
    """
    if step.target or any(site.kind in DEPTHS for site in request.sites):
        return
    most = sum(_wished_counts(site, request)[-1] * site.unit_cost for site in request.sites)
    if asked <= most:
        return
    kinds = {site.kind: site for site in reversed(request.sites)}
    left = " and ".join(
        f"{site.num_units - _wished_counts(site, request)[-1]:,} of {site.num_units:,} {kind}"
        for kind, site in sorted(kinds.items())
    )
    share = math.floor(1000 * step.sparsity * most / asked) / 1000
    if not share:
        raise RecipeError(
            f"prune.pattern: no {step.pattern} can go, because every block keeps {left} at least. "
            "Choose another --pattern."
        )
    raise RecipeError(
        f"prune.sparsity: {step.sparsity:g} of all weights in blocks is more than {step.pattern} "
        f"can give: every block keeps {left} at least, so at most {share:g} can go. Type "
        f"--sparsity {share:g}, or name more units, as in --pattern ffn-channels+heads."
    )


def _wished_counts(site: Site, request: Request) -> list[int]:
    """Return how many units of a site an allocation of wishes may take: no half or block whole."""
    return [0] if site.kind in DEPTHS else legal_counts(site, request.multiple, request.parallel)


def request_of(step: PruneStep, allocation: str, sites: Sequence[Site], asked: int) -> Request:
    """Return what an allocation is asked, before anything was learnt."""
    total = sum(site.num_weights for site in sites)
    return Request(
        sites=sites,
        target=Fraction(min(asked, total), total),
        options=options_for(step.options, ALLOCATIONS[allocation].options),
        multiple=multiple_of(step, sites),
        parallel=step.parallel,
        ties=ties_of(step, allocation, sites),
    )


def check_widths(step: PruneStep, sites: Sequence[Site], heads: tuple[int, int] | None) -> None:
    """Check that every kind of unit has a legal number below what there is.

    `heads` are the query heads and key/value heads of a block, where they are known.

    Raises:
        RecipeError: `multiple` is too large, or `parallel` devices cannot share what would be left.
    """
    for site in {(site.kind, site.num_units): site for site in sites}.values():
        if site.kind in DEPTHS or any(legal_counts(site, multiple_of(step, sites), step.parallel)):
            continue
        if site.kind in (CHANNELS, EXPERT_CHANNELS):
            _refuse_multiple(step, site, multiple_of(step, sites) or 1)
        elif step.parallel > 1:
            raise RecipeError(
                f"prune.parallel: no number of {site.kind} below {site.num_units:,} can be shared "
                f"by {step.parallel} devices. Leave {site.kind} out of --pattern, or type --set "
                "prune.parallel=1."
            )
    untouched = not {HEADS, QUERY_HEADS} & {site.kind for site in sites}
    if heads is not None and untouched and not shareable(*heads, step.parallel):
        raise RecipeError(
            f"prune.parallel: {step.parallel} devices cannot share the {heads[0]} query heads and "
            f"{heads[1]} key/value heads, which {step.pattern} leaves as they are. Type --pattern "
            "ffn-channels+heads, or --set prune.parallel=1."
        )


def _refuse_multiple(step: PruneStep, site: Site, multiple: int) -> NoReturn:
    """Say that no width is left that a multiple allows."""
    split = f" on each of {step.parallel} devices" if step.parallel > 1 else ""
    most = site.num_units // (2 * step.parallel)
    what = f"prune.multiple: {multiple}{split}"
    if multiple * step.parallel > site.num_units:
        what += f" is more than the {site.num_units:,} {site.kind} of a block"
    else:
        what += f" leaves no width below the {site.num_units:,} {site.kind} of a block"
    raise RecipeError(
        f"{what}. At most {most:,} leaves a choice. Type --set prune.multiple="
        f"{default_multiple(max(1, site.num_units // step.parallel))}, or leave it out."
    )


def ties_of(step: PruneStep, allocation: str, sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """Return the sites that must lose equally many units: all of a kind, where a tier demands it,
    and experts and their channels in any case."""
    equal = allocation in EQUAL or step.tier == "E0"
    kinds: dict[object, list[str]] = {}
    for site in sites:
        if site.kind not in DEPTHS and (equal or site.kind in MIXED):
            kinds.setdefault((site.entry or site.kind, site.num_units), []).append(site.name)
    return tuple(tuple(names) for names in kinds.values())
