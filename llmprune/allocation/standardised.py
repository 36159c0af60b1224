"""One ranking of units of unequal cost, by scores that are standardised within each site.

Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP),
its mode AL-AM, for units of any cost.
Legend: U units of a site.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    asked_cost,
    check_removable,
    legal_counts,
    shares_of,
)
from llmprune.arch.couplings import DEPTHS
from llmprune.arch.types import Site


class Step(NamedTuple):
    """What a team of sites loses next: the mean score of these units, what they cost together, and
    how many each site has lost then."""

    score: float
    cost: int
    team: int
    lost: int


def by_standard_score(request: Request) -> dict[str, Fraction]:
    """Return the shares that follow from one ranking of the units of all sites together.

    Profiles are standardised scores of units. The lowest go until what stays is nearest to the
    share that is to stay, in weights; of two that are equally near the smaller. Of every site at
    least one unit stays. Tied sites, and units that only go together, are ranked by their mean.

    >>> sites = [Site(name=n, block=0, spans=(), num_units=2, unit_cost=c)
    ...     for n, c in [("heads", 4), ("ffn", 1)]]
    >>> z = {"heads": torch.tensor([-0.7, 0.7]), "ffn": torch.tensor([-0.6, 0.6])}
    >>> by_standard_score(Request(sites=sites, target=Fraction(2, 5), profiles=z))
    {'heads': Fraction(1, 2), 'ffn': Fraction(0, 1)}
    """
    sites = [site for site in request.sites if site.kind not in DEPTHS]
    check_removable(request, sites)
    teams = teams_of(sites, request.ties)
    steps = [step for index, team in enumerate(teams) for step in _ladder(request, index, team)]
    counts = {}
    for step in nearest(sorted(steps, key=lambda each: each.score), asked_cost(request)):
        counts.update({site.name: step.lost for site in teams[step.team]})
    return shares_of(request.sites, counts)


def standard_scores(unit_score_U: Tensor) -> Tensor:
    """Return (score - mean) / std of the units of a site, float64.

    The deviation is the unbiased one. Scores that are all equal stand at 0.

    >>> [round(z, 5) for z in standard_scores(torch.tensor([2 / 3, 0.0, 4.0])).tolist()]
    [-0.41478, -0.72587, 1.14065]
    """
    apart_U = unit_score_U.double() - unit_score_U.double().mean()
    if len(apart_U) < 2 or bool((unit_score_U == unit_score_U[0]).all()):
        return torch.zeros_like(apart_U)
    return apart_U / apart_U.std()


def teams_of(sites: Sequence[Site], ties: Sequence[Sequence[str]]) -> list[list[Site]]:
    """Return the sites that lose equally many units: those of a tie, and each other one alone.

    >>> sites = [Site(name=n, block=0, spans=(), num_units=8, unit_cost=1) for n in "abc"]
    >>> [[site.name for site in team] for team in teams_of(sites, [("c", "a")])]
    [['a', 'c'], ['b']]
    """
    number = {name: index for index, tie in enumerate(ties) for name in tie}
    found: dict[object, list[Site]] = {}
    for site in sites:
        found.setdefault(number.get(site.name, site.name), []).append(site)
    return list(found.values())


def nearest(steps: Sequence[Step], asked: int) -> Sequence[Step]:
    """Return the first steps, as many as leave the removed cost nearest to what is asked.

    Of two that are equally near it is the more, as published: what stays is counted from above.
    """
    removed, best, number = 0, asked, 0
    for index, step in enumerate(steps, start=1):
        removed += step.cost
        if abs(removed - asked) <= best:
            best, number = abs(removed - asked), index
    return steps[:number]


def in_order(score_U: Tensor, num_groups: int) -> Tensor:
    """Return the scores in the order in which units go: the lowest of every group, then the next.

    >>> in_order(torch.tensor([3.0, 1.0, 2.0, 9.0]), 2).tolist()
    [1.0, 2.0, 3.0, 9.0]
    """
    ordered: Tensor = score_U.reshape(num_groups, -1).sort(dim=1).values.T.flatten()
    return ordered


def _ladder(request: Request, index: int, team: Sequence[Site]) -> Iterator[Step]:
    """Yield the steps of a team from one legal count to the next."""
    known: Mapping[str, Tensor] = request.profiles
    ordered_U = torch.stack([
        in_order(known[site.name].double().nan_to_num(0.0), site.num_groups) for site in team
    ]).mean(dim=0)  # fmt: skip
    counts = legal_counts(team[0], request.multiple, request.parallel)
    for before, count in itertools.pairwise(counts):
        cost = (count - before) * sum(site.unit_cost for site in team)
        yield Step(float(ordered_U[before:count].mean()), cost, index, count)
