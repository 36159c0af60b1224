"""Shares by trial: small exchanges between linears, kept where the divergence falls.

Legend: L sites (or teams of them), M moves that were measured.

Source: Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary Search.
Here masks alone are tried, one selection follows each generation, and moves learn from those
before: what many of them did tells what one level more costs at each linear.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llmprune.allocation.distortion import divergences_alone, teams_of
from llmprune.allocation.fitting import fitted, option, rational
from llmprune.allocation.knapsack import cheapest_shares
from llmprune.allocation.types import Candidate, Request
from llmprune.arch.types import Site

_GROWTH = 8  # power of the share at which divergence is taken to grow, where no curve is known
_RIDGE = 1.0  # levels squared, beside those of the moves that were measured
_TRIES = 20  # draws for one new candidate

Levels = tuple[int, ...]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Space:
    """What may be tried: a level is `step` weights more than the start, the same number everywhere,
    so that levels which sum to 0 remove what the start does."""

    start: tuple[Fraction, ...]
    sizes: tuple[int, ...]
    step: int
    low: Levels
    high: Levels

    def shares(self, levels: Levels) -> list[Fraction]:
        """Return the share of every site."""
        return [
            share + Fraction(level * self.step, size)
            for share, level, size in zip(self.start, levels, self.sizes, strict=True)
        ]


@dataclass
class Knowledge:
    """Moves between levels, and what they did to the divergence."""

    moves_ML: list[Floats] = field(default_factory=list)
    changes_M: list[float] = field(default_factory=list)

    def add(self, move: Sequence[int], change: float) -> None:
        """Remember a move; one whose divergence is no number counts as doubly as bad as any."""
        worst = max((abs(each) for each in self.changes_M), default=1.0)
        self.moves_ML.append(np.array(move, dtype=np.float64))
        self.changes_M.append(change if math.isfinite(change) else 2 * worst)

    def slopes(self, num: int) -> Floats:
        """Return what one level more costs at each site, by ridge regression, float64 (L,)."""
        if not self.moves_ML:
            return np.zeros(num)
        moves_ML = np.stack(self.moves_ML)
        ridge_MM = moves_ML @ moves_ML.T + _RIDGE * np.eye(len(moves_ML))
        found: Floats = moves_ML.T @ np.linalg.solve(ridge_MM, np.array(self.changes_M))
        return found


def by_search(request: Request) -> dict[str, Fraction]:
    """Return the shares with the lowest divergence that some generations of exchanges found.

    Starts from equal shares, or, with `start` 1, from those that suit the divergences of single
    linears. Every generation is a round of the probe: the best so far, and `offspring` new ones.
    Deterministic for a seed and a probe.
    """
    assert request.probe is not None
    teams = teams_of(request.sites)
    space = space_of(request, teams)
    draw = random.Random(f"{request.seed} evopress")
    parent: Levels = (0,) * len(teams)
    seen, knowledge, gains = {parent}, Knowledge(), list[Levels]()
    for _ in range(int(option(request, "generations"))):
        most = int(option(request, "offspring", least=1))
        offspring = list(_unseen(draw, space, parent, gains, knowledge, seen, most))
        if not offspring:
            break
        tried = [parent, *offspring]
        own, *others = (
            answer.kl for answer in request.probe([_candidate(space, teams, x) for x in tried])
        )
        gains = []
        for levels, kl in sorted(zip(offspring, others, strict=True), key=lambda pair: pair[1]):
            move = _minus(levels, parent)
            knowledge.add(move, kl - own)
            if kl < own:
                gains.append(move)
        if gains:  # the best is made now, the others may be next
            parent = _plus(parent, gains.pop(0))
    wished = {
        site.name: float(share)
        for team, share in zip(teams, space.shares(parent), strict=True)
        for site in team
    }
    return fitted(request, wished, at_most=_limit(request))


def space_of(request: Request, teams: Sequence[Sequence[Site]]) -> Space:
    """Return the start, the weights of a level, and between which levels each site may be."""
    sizes = [sum(site.num_weights for site in team) for team in teams]
    limit = _limit(request)
    start = [request.target] * len(teams)
    if request.options["start"]:
        start = [rational(share) for share in _from_single(request, teams, sizes, limit)]
    step = max(1, round(option(request, "step", above=0, most=1) * sum(sizes) / len(sizes)))
    levels = int(option(request, "max_level", least=1))
    return Space(
        start=tuple(start),
        sizes=tuple(sizes),
        step=step,
        low=tuple(
            -min(levels, math.floor(share * size / step))
            for share, size in zip(start, sizes, strict=True)
        ),
        high=tuple(
            min(levels, max(0, math.floor((Fraction(limit) - share) * size / step)))
            for share, size in zip(start, sizes, strict=True)
        ),
    )


def rounds_of_search(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of every round: each site alone where that is the start, generations.

    >>> rounds_of_search(42, {"start": 0, "generations": 2, "offspring": 16})
    [17, 17]
    """
    first = [num_sites] if options["start"] else []
    return first + [int(options["offspring"]) + 1] * int(options["generations"])


def _unseen(
    draw: random.Random,
    space: Space,
    parent: Levels,
    gains: Sequence[Levels],
    knowledge: Knowledge,
    seen: set[Levels],
    most: int,
) -> Iterator[Levels]:
    """Yield new levels, at most so many: gains of the last generation together, then exchanges.

    Every second exchange takes from sites that seem cheap and gives to those that seem dear.
    """
    slopes_L = knowledge.slopes(len(parent))
    together = parent
    num = 0
    for move in gains:
        together = _within(space, _plus(together, move), together)
        if num < most // 4 and together not in seen:
            seen.add(together)
            num += 1
            yield together
    for index in range(num, most):
        guide_L = slopes_L if index % 2 else np.zeros(len(parent))
        for _ in range(_TRIES):
            levels = _exchanged(draw, space, parent, guide_L)
            if levels not in seen:
                seen.add(levels)
                yield levels
                break


def _exchanged(draw: random.Random, space: Space, levels: Levels, slopes_L: Floats) -> Levels:
    """Return levels after one to three exchanges of one to three levels between two sites."""
    found = list(levels)
    scale = float(np.abs(slopes_L).max()) or 1.0
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        lower = [index for index, level in enumerate(found) if level < space.high[index]]
        if not lower:
            break
        up = _drawn(draw, lower, -slopes_L / scale)
        upper = [i for i, level in enumerate(found) if level > space.low[i] and i != up]
        if not upper:
            break
        down = _drawn(draw, upper, slopes_L / scale)
        room = min(space.high[up] - found[up], found[down] - space.low[down])
        amount = min(room, draw.randint(1, 3), draw.randint(1, 3))
        found[up] += amount
        found[down] -= amount
    return tuple(found)


def _drawn(draw: random.Random, indices: Sequence[int], weight_L: Floats) -> int:
    """Draw an index; weights from -1 to 1 make it up to e^6 times as likely."""
    return draw.choices(indices, [math.exp(3 * float(weight_L[index])) for index in indices])[0]


def _from_single(
    request: Request, teams: Sequence[Sequence[Site]], sizes: Sequence[int], limit: float
) -> list[float]:
    """Return shares that suit the divergence of every team alone."""
    scales = divergences_alone(request, teams)
    errors = [lambda shares, scale=scale: scale * shares**_GROWTH for scale in scales]
    return cheapest_shares(errors, sizes, float(request.target), at_most=limit)


def _limit(request: Request) -> float:
    return max(option(request, "max_share", above=0, most=1), float(request.target))


def _candidate(space: Space, teams: Sequence[Sequence[Site]], levels: Levels) -> Candidate:
    shares = zip(teams, space.shares(levels), strict=True)
    return Candidate(shares={site.name: share for team, share in shares for site in team})


def _within(space: Space, levels: Levels, otherwise: Levels) -> Levels:
    """Return levels if all are legal."""
    legal = all(
        low <= level <= high for low, level, high in zip(space.low, levels, space.high, strict=True)
    )
    return levels if legal else otherwise


def _plus(levels: Levels, move: Levels) -> Levels:
    return tuple(a + b for a, b in zip(levels, move, strict=True))


def _minus(levels: Levels, other: Levels) -> Levels:
    return tuple(a - b for a, b in zip(levels, other, strict=True))
