"""Allocations that add up what every linear loses, and look for the least sum.

Source: Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks; the curves from Gram matrices as in Sieberling et al., EvoPress.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llmprune.allocation.curves import error_at
from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.knapsack import cheapest_shares
from llmprune.allocation.types import Candidate, Request
from llmprune.arch.types import Site

_ALONE = 1000  # more sites than this, as of many experts, are decided in teams

Floats = NDArray[np.float64]


def least_distortion(request: Request) -> dict[str, Fraction]:
    """Return the shares at which the relative output errors of all linears sum to least.

    Each is weighted by the linear's number of weights to the power `size`; 0 is what is published,
    and takes most from the largest. Blind to how much an output matters: a linear whose outputs are
    all but unused loses no more than its neighbours. None loses more than `max_share`, or the
    target if that is more.

    >>> import torch
    >>> sites = [Site(name=n, block=0, spans=(), num_units=100, unit_cost=1) for n in "qk"]
    >>> cube = torch.linspace(0, 1, 21, dtype=torch.float64) ** 3
    >>> profiles = {"q": cube, "k": cube.sqrt()}
    >>> shares = least_distortion(Request(
    ...     sites=sites, target=Fraction(1, 2), profiles=profiles,
    ...     options={"size": 0.5, "max_share": 0.95}))
    >>> shares["q"] > shares["k"]
    True
    """
    teams = teams_of(request.sites)
    return _shares(request, teams, weights_of(request, teams))


def weights_of(request: Request, teams: Sequence[Sequence[Site]]) -> list[float]:
    """Return the size of every team to the power `size`, the largest 1."""
    sizes = [sum(site.num_weights for site in team) for team in teams]
    return [(size / max(sizes)) ** option(request, "size", most=1) for size in sizes]


def least_divergence(request: Request) -> dict[str, Fraction]:
    """Return the shares at which the divergences that single linears cause sum to least.

    One round of the probe: every linear alone loses the target, and its curve, to the power
    `power`, is scaled to the divergence that this causes. Together linears lose more than their
    sum, the more so the less of them is left, so that powers above 1 do better than 1.
    """
    power = option(request, "power", above=0, most=10)
    teams = teams_of(request.sites)
    target = np.array([float(request.target)])
    errors = [float(error_at(curve_of(request, team), target)[0]) for team in teams]
    measured = divergences_alone(request, teams)
    scales = [
        kl / error**power if error > 0 else 0.0 for kl, error in zip(measured, errors, strict=True)
    ]
    return _shares(request, teams, scales, power)


def divergences_alone(request: Request, teams: Sequence[Sequence[Site]]) -> list[float]:
    """Return the divergence where one team alone loses the target; one round of the probe.

    One that is no number counts as the largest of the others.
    """
    assert request.probe is not None
    alone = [Candidate(shares={site.name: request.target for site in team}) for team in teams]
    found = [answer.kl for answer in request.probe(alone)]
    largest = max((kl for kl in found if math.isfinite(kl)), default=1.0)
    return [max(0.0, kl) if math.isfinite(kl) else largest for kl in found]


def one_round(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of the only round: a linear each, at most.

    >>> one_round(42, {})
    [42]
    """
    return [num_sites]


def teams_of(sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites that lose one share: each alone, or of many those of one block and shape.

    >>> len(teams_of([Site(name=n, block=0, spans=(), num_units=8, unit_cost=1) for n in "qk"]))
    2
    """
    if len(sites) <= _ALONE:
        return [[site] for site in sites]
    found: dict[tuple[int, tuple[int, int] | None], list[Site]] = {}
    for site in sites:
        found.setdefault((site.block, site.shape), []).append(site)
    return list(found.values())


def curve_of(request: Request, team: Sequence[Site]) -> Floats:
    """Return the mean curve of a team, float64 (L,)."""
    curves = [request.profiles[site.name].numpy(force=True) for site in team]
    found: Floats = np.mean(curves, axis=0, dtype=np.float64)
    return found


def _shares(
    request: Request,
    teams: Sequence[Sequence[Site]],
    scales: Sequence[float],
    power: float = 1.0,
) -> dict[str, Fraction]:
    """Return the shares at which the scaled powers of the curves sum to least."""
    limit = max(option(request, "max_share", above=0, most=1), float(request.target))
    errors: list[Callable[[Floats], Floats]] = [
        partial(_scaled_error, curve_of(request, team), scale, power)
        for team, scale in zip(teams, scales, strict=True)
    ]
    sizes = [sum(site.num_weights for site in team) for team in teams]
    found = cheapest_shares(errors, sizes, float(request.target), at_most=limit)
    wished = {site.name: share for team, share in zip(teams, found, strict=True) for site in team}
    return fitted(request, wished, at_most=limit)


def _scaled_error(curve_L: Floats, scale: float, power: float, shares: Floats) -> Floats:
    found: Floats = scale * error_at(curve_L, shares) ** power
    return found
