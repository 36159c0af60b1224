"""Halves of blocks, or blocks, whose distances alone add up to least: a knapsack.

Source: Zhang et al., LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing
Diffusion Models; the squared difference of outputs is KL here.
Legend: S units of size still asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    asked_cost,
    candidate,
    check_removable,
    covers_of,
    finite,
    shares_of,
    unguarded,
)
from llmprune.arch.types import Site

_GRAINS = 2**16  # of the asked size; sizes that have a common divisor stay exact

Choice = tuple[float, int]
"""What it costs to choose this, and the size that goes with it."""


def by_knapsack(request: Request) -> dict[str, Fraction]:
    """Return which halves or blocks go: those whose single divergences sum to least.

    One round of the probe, a candidate without each. Of all sets that hold the asked size at least,
    dynamic programming takes the one of the least sum. A second round measures that set; `facts`
    get its divergence over the sum, `additivity`, 1 where divergences do add up. The `first` and
    the `last` blocks stay.
    """
    assert request.probe is not None
    sites = unguarded(request)
    check_removable(request, sites)
    answers = request.probe([candidate(sites, {site.name: 1}) for site in sites])
    costs = {s.name: max(0.0, finite(each.kl)) for s, each in zip(sites, answers, strict=True)}
    counts = dict.fromkeys(_chosen(sites, costs, asked_cost(request)), 1)
    if counts:
        (together,) = request.probe([candidate(sites, counts)])
        alone = sum(costs[name] for name in counts)
        request.facts.update(kl_together=together.kl, kl_alone=alone)
        if 0 < alone < math.inf:
            request.facts["additivity"] = together.kl / alone
    return shares_of(request.sites, counts)


def least_sum(items: Sequence[Sequence[Choice]], size: int) -> list[int]:
    """Return which choice of each item is taken, so that `size` goes at least and costs sum to
    least; 0 is none, 1 an item's first choice.

    Sizes are exact up to 65,536 units of their common divisor; beyond that they are rounded down,
    so that never too little goes. Costs must be 0 at least. Where an infinite cost cannot be
    avoided, or the size cannot be reached, every item's last choice is taken.

    >>> least_sum([[(1.0, 2)], [(2.0, 3)], [(4.0, 4)]], 5)
    [1, 1, 0]
    """
    sizes = [choice_size for item in items for _, choice_size in item]
    grain = math.gcd(*sizes) if sizes else 1
    grain = max(grain, -(-size // _GRAINS))
    need = -(-size // grain)
    best_S = np.full(need + 1, np.inf)
    best_S[0] = 0.0
    taken = np.zeros((len(items), need + 1), dtype=np.uint8)
    asked_S = np.arange(need + 1)
    for taken_S, item in zip(taken, items, strict=True):
        before_S = best_S.copy()
        for number, (cost, choice_size) in enumerate(item, start=1):
            sum_S = before_S[np.maximum(0, asked_S - choice_size // grain)] + cost
            better_S = sum_S < best_S
            np.copyto(best_S, sum_S, where=better_S)
            np.copyto(taken_S, number, where=better_S)
    if not math.isfinite(best_S[need]):
        return [len(item) for item in items]
    found, left = [], need
    for taken_S, item in zip(taken[::-1], items[::-1], strict=True):
        found.append(int(taken_S[left]))
        if found[-1]:
            left = max(0, left - item[found[-1] - 1][1] // grain)
    return found[::-1]


def one_of_each_and_all(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of both rounds.

    >>> one_of_each_and_all(64, {})
    [64, 1]
    """
    return [num_sites, 1]


def _chosen(sites: Sequence[Site], costs: Mapping[str, float], size: int) -> list[str]:
    """Return the names of the sites that go."""
    sets = _sets(sites)
    sizes = {site.name: site.num_weights for site in sites}
    items = [
        [(sum(costs[name] for name in each), sum(sizes[name] for name in each)) for each in item]
        for item in sets
    ]
    taken = least_sum(items, size)
    return [n for item, number in zip(sets, taken, strict=True) if number for n in item[number - 1]]


def _sets(sites: Sequence[Site]) -> list[list[tuple[str, ...]]]:
    """Return items to choose from: a site each or, where one covers others, it or any of these."""
    covers = covers_of(sites)
    inner = {name for each in covers.values() for name in each}
    found = []
    for site in sites:
        if site.name in inner:
            continue
        below = covers.get(site.name, [])
        parts = [
            tuple(name for bit, name in enumerate(below) if chosen >> bit & 1)
            for chosen in range(1, 2 ** len(below))
        ]
        found.append([*parts, (site.name,)])
    return found
