"""Equal widths in all blocks: which combination of kinds of units meets the size best.

As many kv groups, and as many channels, go in every block; blocks may go besides. Every combination
that meets the asked size, and would not if it lost one step less of any kind, is a candidate.
Legend: U units of a site.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from llmprune.allocation.fitting import option
from llmprune.allocation.standardised import in_order
from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    asked_cost,
    candidate,
    check_removable,
    finite,
    legal_counts,
    removed_cost,
    shares_of,
    unguarded,
)
from llmprune.arch.couplings import BLOCK, DEPTHS
from llmprune.arch.types import Site

Levels = tuple[int, ...]
"""What goes of every axis: blocks, if any may go, then units of each kind in every block."""


def by_widths(request: Request) -> dict[str, Fraction]:
    """Return equal widths for all blocks: of the combinations that meet the asked size, the one
    with the least KL.

    A combination says how many units of each kind go in every block, and how many blocks go: those
    of the lowest score or, where blocks have none, the deepest. None loses a step more than it has
    to. Each of `rounds` rounds of the probe tries `candidates` of them, first spread over all, then
    around the best. The `first` and the `last` blocks stay.
    """
    sites = _sites(request)
    check_removable(request, sites)
    space = Space.of(request, sites)
    every = list(space.combinations(asked_cost(request)))
    if request.probe is None:
        return shares_of(request.sites, space.counts(min(every, key=_judge(request, space))))
    most = int(option(request, "candidates", least=2))
    known: dict[Levels, float] = {}
    for _ in range(int(option(request, "rounds", least=1))):
        tried = _next(space, every, known, most)
        if not tried or len(every) == 1:
            break
        answers = request.probe([candidate(sites, space.counts(each)) for each in tried])
        known.update(zip(tried, (finite(answer.kl) for answer in answers), strict=True))
    best = min(known or every, key=lambda levels: known.get(levels, math.inf))
    return shares_of(request.sites, space.counts(best))


def rounds_of_widths(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of every round.

    >>> rounds_of_widths(64, {"candidates": 12, "rounds": 2})
    [12, 12]
    """
    return [int(options["candidates"])] * int(options["rounds"])


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may go: `blocks` in the order in which they go, `kinds` of units, with `legal` counts.

    The first axis of `legal` is that of the blocks.
    """

    sites: Sequence[Site]
    blocks: Sequence[Site]
    kinds: Sequence[Sequence[Site]]
    legal: Sequence[Sequence[int]]

    @classmethod
    def of(cls, request: Request, sites: Sequence[Site]) -> Space:
        """Return what a request allows."""
        blocks = _in_turn([site for site in sites if site.kind == BLOCK], request)
        kinds = _kinds([site for site in sites if site.kind not in DEPTHS], request.ties)
        most = min(len(blocks), len({site.block for site in request.sites}) - 1)  # one stays
        counts = [legal_counts(kind[0], request.multiple, request.parallel) for kind in kinds]
        legal = [range(most + 1), *counts]
        return cls(sites=sites, blocks=blocks, kinds=kinds, legal=legal)

    def counts(self, levels: Levels) -> dict[str, int]:
        """Return what every site loses; the units of a block that goes are not counted again."""
        gone, *units = levels
        counts = {
            site.name: count for kind, count in zip(self.kinds, units, strict=True) for site in kind
        }
        lost = {site.block for site in self.blocks[:gone]}
        counts |= {site.name: 0 for site in self.sites if site.block in lost}
        return counts | {site.name: 1 for site in self.blocks[:gone]}

    def cost(self, levels: Levels) -> int:
        """Return the weights that go."""
        return removed_cost(self.sites, self.counts(levels))

    def shares(self, levels: Levels) -> list[float]:
        """Return the share of every axis."""
        whole = [max(1, len(self.blocks)), *(kind[0].num_units for kind in self.kinds)]
        return [level / num for level, num in zip(levels, whole, strict=True)]

    def combinations(self, need: int) -> Iterator[Levels]:
        """Yield the levels that remove `need` weights, and less with one step less of any axis.

        The axis of the most levels follows from the others.
        """
        free = max(range(len(self.legal)), key=lambda axis: len(self.legal[axis]))
        others = [self.legal[axis] for axis in range(len(self.legal)) if axis != free]
        for rest in itertools.product(*others):
            line = [(*rest[:free], level, *rest[free:]) for level in self.legal[free]]
            if self.cost(line[-1]) < need:
                continue
            levels = line[self._first(line, need)]
            if not any(self.cost(less) >= need for less in self._lower(levels)):
                yield levels

    def _first(self, line: Sequence[Levels], need: int) -> int:
        """Return the place of the first levels that remove enough, by bisection."""
        low, high = 0, len(line) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.cost(line[middle]) < need else (low, middle)
        return low

    def _lower(self, levels: Levels) -> Iterator[Levels]:
        """Yield the levels with one step less of one axis."""
        for axis, level in enumerate(levels):
            place = list(self.legal[axis]).index(level)
            if place:
                yield (*levels[:axis], self.legal[axis][place - 1], *levels[axis + 1 :])


def _sites(request: Request) -> list[Site]:
    """Return units of all blocks, and the blocks that may go."""
    inner = {site.name for site in unguarded(request)}
    return [
        site
        for site in request.sites
        if site.kind not in DEPTHS or (site.kind == BLOCK and site.name in inner)
    ]


def _in_turn(blocks: Sequence[Site], request: Request) -> list[Site]:
    """Return blocks in the order in which they go: by their scores or else the deepest first."""
    if all(site.name in request.profiles for site in blocks):
        return sorted(blocks, key=lambda site: finite(float(request.profiles[site.name].sum())))
    return sorted(blocks, key=lambda site: -site.block)


def _kinds(sites: Sequence[Site], ties: Sequence[Sequence[str]]) -> list[list[Site]]:
    """Return the sites that lose equally many units: those of a tie, else of one kind and width."""
    number = {name: index for index, tie in enumerate(ties) for name in tie}
    found: dict[object, list[Site]] = {}
    for site in sites:
        found.setdefault(number.get(site.name, (site.kind, site.num_units)), []).append(site)
    return list(found.values())


def _next(
    space: Space, every: Sequence[Levels], known: Mapping[Levels, float], most: int
) -> list[Levels]:
    """Return combinations to try: spread evenly over all or, later, those nearest to the best."""
    if not known:
        num = min(most, len(every))
        return [every[index * (len(every) - 1) // max(1, num - 1)] for index in range(num)]
    best = space.shares(min(known, key=known.__getitem__))

    def away(levels: Levels) -> float:
        return sum(abs(a - b) for a, b in zip(space.shares(levels), best, strict=True))

    return sorted((levels for levels in every if levels not in known), key=away)[:most]


def _judge(request: Request, space: Space) -> Callable[[Levels], float]:
    """Return what stands in for the probe: the share of each site's sum of scores that goes.

    A site of a block that goes loses all of it. Without scores, shares as equal as can be.
    """
    if not all(site.name in request.profiles for kind in space.kinds for site in kind):
        return lambda levels: max(space.shares(levels)) - min(space.shares(levels))
    lost = {
        site.name: _lost(request.profiles[site.name], site) for kind in space.kinds for site in kind
    }

    def mass(levels: Levels) -> float:
        counts = space.counts(levels)
        gone = {site.block for site in space.blocks[: levels[0]]}
        return sum(
            1.0 if site.block in gone else lost[site.name][counts[site.name]]
            for kind in space.kinds
            for site in kind
        )

    return mass


def _lost(score_U: Tensor, site: Site) -> list[float]:
    """Return the share of the sum of scores, from 0 at the lowest, that goes with so many units."""
    ordered_U = in_order(score_U.double(), site.num_groups)
    ordered_U = ordered_U - ordered_U.min().clamp(max=0.0)
    total = float(ordered_U.sum()) or 1.0
    return [0.0, *(ordered_U.cumsum(dim=0) / total).tolist()]
