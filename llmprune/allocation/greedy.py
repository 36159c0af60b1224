"""Halves of blocks, or blocks, that go one at a time, each after all that are left were tried.

Source: Zhang et al., FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models.
The paper compares distances of outputs; here KL is the default. Song et al., SLEB: Streamlining
LLMs through Redundancy Verification and Elimination of Transformer Blocks, take the loss instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llmprune.allocation.depth import gains_of
from llmprune.allocation.fitting import option
from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    admitted,
    after,
    asked_cost,
    candidate,
    check_removable,
    covers_of,
    finite,
    removed_cost,
    shares_of,
    unguarded,
)
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError


def by_divergence(request: Request) -> dict[str, Fraction]:
    """Return which halves or blocks go: in each round the one without which KL is least.

    Every round of the probe tries each that is left, on top of those removed before, until the
    asked size is met. One that would overshoot is not tried while smaller ones do not, so that the
    result overshoots by less than the smallest that is left. After the first round only the lowest
    of it that together hold `pool` times the asked size are tried; 0 goes on with all. The `first`
    and the `last` blocks stay.
    """
    return remeasured(request, "kl")


def by_logit_angle(request: Request) -> dict[str, Fraction]:
    """Return what goes as of `finercut`, by the angle between the centred logits instead."""
    return remeasured(request, "angular")


def by_logit_norm(request: Request) -> dict[str, Fraction]:
    """Return what goes as of `finercut`, by the squared difference of the centred logits instead,
    relative to those of the dense model."""
    return remeasured(request, "norm")


def by_jensen_shannon(request: Request) -> dict[str, Fraction]:
    """Return what goes as of `finercut`, by the Jensen-Shannon divergence instead."""
    return remeasured(request, "js")


def by_loss(request: Request) -> dict[str, Fraction]:
    """Return what goes as of `finercut`, by the loss on the text instead."""
    return remeasured(request, "loss")


def remeasured(request: Request, distance: str) -> dict[str, Fraction]:
    """Return the shares where in each round the site goes without which `distance` is least.

    A round of one candidate is not asked. `facts` get the distance where the last was measured.

    Raises:
        RecipeError: the sites hold less than is asked.
    """
    assert request.probe is not None
    sites = unguarded(request)
    check_removable(request, sites)
    pool, covers, need = _pool(request), covers_of(sites), asked_cost(request)
    counts: dict[str, int] = {}
    while (missing := need - removed_cost(sites, counts)) > 0:
        gains = gains_of(sites, counts, covers)
        names = admitted(gains, missing)
        trials = [after(counts, {name: 1}, covers) for name in names]
        measured = [0.0]
        if len(names) > 1:
            answers = request.probe([candidate(request.sites, each) for each in trials])
            measured = [finite(answer.distance(distance)) for answer in answers]
        if pool and not counts:
            known = dict(zip(names, measured, strict=True))
            sites = _best(sites, covers, known, math.ceil(pool * need))
            covers = covers_of(sites)
        best = min(range(len(names)), key=measured.__getitem__)
        counts = trials[best]
        if len(names) > 1:
            request.facts[distance] = measured[best]
        else:
            request.facts.pop(distance, None)
    return shares_of(request.sites, counts)


def all_that_are_left(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of every round, were all sites to go.

    >>> all_that_are_left(4, {})
    [4, 3, 2, 1]
    """
    return list(range(num_sites, 0, -1))


def rounds_to_target(request: Request) -> list[int]:
    """Return the candidates of every round until the asked size is met, at most.

    Exact where all sites are of one size; else as if the smallest went first.

    >>> sites = [Site(name=n, block=i, spans=(), num_units=1, unit_cost=4, kind="block")
    ...     for i, n in enumerate("abcdef")]
    >>> rounds_to_target(Request(
    ...     sites=sites, target=Fraction(1, 2), options={"first": 1, "last": 0, "pool": 0}))
    [5, 4, 3]
    """
    sites, need, pool = unguarded(request), asked_cost(request), _pool(request)
    left = num_sites = len(sites)
    if pool and not any(covers_of(sites).values()):
        left = min(num_sites, _fewest(sites, math.ceil(pool * need)))
    later = range(left - 1, max(0, left - _fewest(sites, need)), -1)
    return [num_sites, *later] if need > 0 and num_sites else []


def _pool(request: Request) -> float:
    """Return the number of the recipe: 0, or 1 at least.

    Raises:
        RecipeError: it is between them.
    """
    pool = option(request, "pool")
    if 0 < pool < 1:
        raise RecipeError(
            f"prune.options.pool: {pool:g} of the asked size is too little to choose from. It must "
            "be 0, for all, or at least 1; type for example --set prune.options.pool=2."
        )
    return pool


def _best(
    sites: Sequence[Site],
    covers: Mapping[str, Sequence[str]],
    measured: Mapping[str, float],
    size: int,
) -> list[Site]:
    """Return the sites of the least distances that hold `size` weights together, and those that
    were not measured."""
    kept: dict[str, int] = {}
    for name in sorted(measured, key=measured.__getitem__):
        if removed_cost(sites, after({}, kept, covers)) >= size:
            break
        kept[name] = 1
    return [site for site in sites if site.name in kept or site.name not in measured]


def _fewest(sites: Sequence[Site], size: int) -> int:
    """Return how many of the smallest sites hold `size` weights."""
    held = number = 0
    for cost in sorted(site.num_weights for site in sites):
        if held >= size:
            break
        held, number = held + cost, number + 1
    return number
