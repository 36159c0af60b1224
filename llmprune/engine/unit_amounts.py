"""How many whole units every site loses: the size that is asked for, and the integer counts.

Sizes are weights of the linears in blocks; a target may be given in other words (parameters of the
model, bytes of its tensors, key/value cache), which are turned into weights here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.projector import default_multiple, project
from llmprune.allocation.types import Probe, Remeasure, Request
from llmprune.arch.couplings import CHANNELS, DEPTHS, EXPERT_CHANNELS
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.catalog import Method
from llmprune.engine.parts import allocation_of, options_for
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import Units
from llmprune.recipe.targets import amount_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.recipe.models import PruneStep

EQUAL = ("uniform", "widths")  # allocations that give every block as much of every kind
WISHED = ("cfsp", "similarity", "adapt-pruner")  # shares that are wishes, not legal counts
DEFAULT_DEPTH = "finercut"


def choose_unit_allocation(step: PruneStep, method: Method, pattern: Units) -> str:
    """Return the allocation of whole units: asked for, or the method's own.

    Raises:
        UnknownName: no allocation has this name.
        RecipeError: it decides about weights, or about other units.
    """
    name = allocation_of(step, method)
    row = ALLOCATIONS[name]
    others = sorted(each for each, other in ALLOCATIONS.items() if other.units)
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


def _kinds(pattern: Units) -> list[str]:
    """Return the kinds of a pattern as methods name them."""
    return ["blocks" if kind == "block" else kind for kind in pattern.kinds]


def asked_weights(step: PruneStep, eligible: int, *, num_params: int, itemsize: int) -> int:
    """Return how many weights are to go at least.

    Raises:
        RecipeError: the model is smaller than what is asked for, or has less that can go.
    """
    if not step.target or "ppl" in step.target or "kv" in step.target or "latency" in step.target:
        return math.ceil(exact_sparsity(step.sparsity) * eligible)
    ((key, text),) = step.target.items()
    kind, amount = amount_of(key, text)
    whole = num_params if key == "params" else num_params * itemsize
    most = round(amount * whole) if kind == "times" else int(amount)
    gone = math.ceil((whole - most) / (1 if key == "params" else itemsize))
    unit = "parameters" if key == "params" else "bytes"
    if gone <= 0:
        raise RecipeError(
            f"prune.target: {key}={text} is {most:,} {unit}, and the model has {whole:,} already. "
            f"Ask for less, as in --target {key}=0.8x."
        )
    if gone >= eligible:
        least = (num_params - eligible) * (1 if key == "params" else itemsize)
        raise RecipeError(
            f"prune.target: {key}={text} is {most:,} {unit}, but {least:,} are outside the linears "
            f"of the blocks and stay. Between {least:,} and {whole:,} can be asked for."
        )
    return gone


def allocate_units(
    step: PruneStep,
    allocation: str,
    sites: Sequence[Site],
    asked: int,
    *,
    profiles: Mapping[str, Tensor] | None = None,
    probe: Probe | None = None,
    remeasure: Remeasure | None = None,
    seed: int = 0,
    surveyed: bool = False,
    facts: dict[str, float] | None = None,
) -> dict[str, int] | None:
    """Return how many units each site loses, `asked` weights at least; None awaits a survey.

    Raises:
        RecipeError: the asked size cannot be reached, with what can.
    """
    row = ALLOCATIONS[allocation]
    if not surveyed and (row.profile is not None or "probe" in row.needs):
        return None
    request = replace(
        request_of(step, allocation, sites, asked),
        profiles=profiles or {},
        probe=probe,
        remeasure=remeasure,
        seed=seed,
    )
    shares = row.fn(request)
    if facts is not None:
        facts |= request.facts
    units = {site.name: site.num_units for site in sites}
    if row.units and allocation not in WISHED:
        return {name: int(share * units[name]) for name, share in shares.items()}
    return project(
        shares,
        units,
        {site.name: site.unit_cost for site in sites},
        budget=asked,
        ties=[list(tie) for tie in request.ties],
        multiple={site.name: grid_of(site, request.multiple) for site in sites},
        what=step.pattern,
    )


def request_of(step: PruneStep, allocation: str, sites: Sequence[Site], asked: int) -> Request:
    """Return what an allocation is asked, before anything was learnt."""
    total = sum(site.num_weights for site in sites)
    channels = [site.num_units for site in sites if site.kind in (CHANNELS, EXPERT_CHANNELS)]
    default = default_multiple(min(channels)) if channels else None
    return Request(
        sites=sites,
        target=Fraction(min(asked, total), total),
        options=options_for(step.options, ALLOCATIONS[allocation].options),
        multiple=step.multiple or default,
        ties=ties_of(step, allocation, sites),
    )


def ties_of(step: PruneStep, allocation: str, sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """Return the sites that must lose equally many units: all of a kind, where a tier demands it,
    and the channels of the experts of one block."""
    equal = allocation in EQUAL or step.tier == "E0"
    kinds: dict[object, list[str]] = {}
    for site in sites:
        if site.kind not in DEPTHS:
            alone = (site.kind, site.num_units) if equal else (site.kind, site.block)
            if equal or site.kind == EXPERT_CHANNELS:
                kinds.setdefault(alone, []).append(site.name)
    return tuple(tuple(names) for names in kinds.values())


def grid_of(site: Site, multiple: int | None) -> int:
    """Return what kept numbers of units are multiples of."""
    wide = site.kind in (CHANNELS, EXPERT_CHANNELS)
    return math.lcm(site.num_groups, (multiple or 1) if wide else 1)
