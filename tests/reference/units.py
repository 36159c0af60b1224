"""Choices among whole units as their definitions read: every subset, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product

import torch
from torch import Tensor


def least_sum(costs: Sequence[float], sizes: Sequence[int], size: int) -> float:
    """Return the least sum of costs over all subsets that hold the size at least."""
    return min(
        math.fsum(costs[index] for index in chosen)
        for number in range(len(costs) + 1)
        for chosen in combinations(range(len(costs)), number)
        if sum(sizes[index] for index in chosen) >= size
    )


def greedy(
    sizes: Mapping[str, int], size: int, distance: Callable[[frozenset[str]], float]
) -> list[str]:
    """Return what goes, in order: the best of what does not overshoot, or overshoots least."""
    gone: list[str] = []
    while (missing := size - sum(sizes[name] for name in gone)) > 0:
        left = [name for name in sizes if name not in gone]
        fit = [name for name in left if sizes[name] <= missing]
        if not fit:
            fit = [name for name in left if sizes[name] == min(sizes[each] for each in left)]
        gone.append(min(fit, key=lambda name: distance(frozenset([*gone, name]))))
    return gone


def kept_by_score(
    scores: Mapping[str, Sequence[float]], costs: Mapping[str, int], removed: float
) -> dict[str, int]:
    """Return how many units of each site stay: from the highest down, up to where the cost of what
    stays is nearest to what is to stay; the highest of each site in any case."""
    total = sum(len(each) * costs[name] for name, each in scores.items())
    highest = {name: max(range(len(each)), key=each.__getitem__) for name, each in scores.items()}
    kept = dict.fromkeys(scores, 1)
    rest = sorted(
        (
            (value, name)
            for name, each in scores.items()
            for index, value in enumerate(each)
            if index != highest[name]
        ),
        reverse=True,
    )
    size = sum(costs.values())
    best, found = abs(size - (1 - removed) * total), dict(kept)
    for _, name in rest:
        kept[name] += 1
        size += costs[name]
        if abs(size - (1 - removed) * total) < best:
            best, found = abs(size - (1 - removed) * total), dict(kept)
    return found


def frontier(
    levels: Sequence[Sequence[int]], cost: Callable[[tuple[int, ...]], int], size: int
) -> set[tuple[int, ...]]:
    """Return the combinations that remove the size of which no part less does."""
    enough = [each for each in product(*levels) if cost(each) >= size]
    return {
        each
        for each in enough
        if not any(
            other != each and all(a <= b for a, b in zip(other, each, strict=True))
            for other in enough
        )
    }


def angle(one_V: Sequence[float], two_V: Sequence[float]) -> float:
    """Return the angle between centred vectors over pi."""
    a = [value - math.fsum(one_V) / len(one_V) for value in one_V]
    b = [value - math.fsum(two_V) / len(two_V) for value in two_V]
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return math.acos(max(-1.0, min(1.0, dot / (math.hypot(*a) * math.hypot(*b))))) / math.pi


def squared_difference(one_V: Sequence[float], two_V: Sequence[float]) -> float:
    """Return the squared distance of centred vectors over the squared length of the first."""
    a = [value - math.fsum(one_V) / len(one_V) for value in one_V]
    b = [value - math.fsum(two_V) / len(two_V) for value in two_V]
    apart = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return apart / math.fsum(x**2 for x in a)


def jensen_shannon(one_V: Sequence[float], two_V: Sequence[float]) -> float:
    """Return the Jensen-Shannon divergence of the distributions of two logits, in nats."""
    found = 0.0
    p_V, q_V = (torch.tensor(each, dtype=torch.float64).softmax(-1) for each in (one_V, two_V))
    for p, q in zip(p_V.tolist(), q_V.tolist(), strict=True):
        middle = (p + q) / 2
        found += (p * math.log(p / middle) + q * math.log(q / middle)) / 2
    return found


def shift(one_TD: Tensor, two_TD: Tensor) -> float:
    """Return how far the means and the deviations of the columns move."""
    found = []
    for moment in (mean, deviation):
        moved = [
            moment(two.tolist()) - moment(one.tolist())
            for one, two in zip(one_TD.double().T, two_TD.double().T, strict=True)
        ]
        found.append(math.hypot(*moved))
    return sum(found)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))
