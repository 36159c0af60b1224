"""From wished shares to integer counts that meet a budget, ties and widths.

All groups of tied sites stand on one ladder: a step takes a group from one legal count to the next
and is due at the offset t where its wished share + t passes the middle between the two. Steps are
taken in the order in which they fall due until the budget is met. Hence counts stay nearest to the
wish, no count falls when the budget grows, and the result overshoots by less than its last step.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from llmprune.base.errors import RecipeError

_HALVINGS = 40  # the bisection only shortens the climb; the ladder alone decides the result

Limits = Mapping[str, Fraction]


@dataclass(frozen=True)
class _Group:
    """Sites that lose the same number of units: the wish, what one unit of all costs, the grid.

    `least` and `most` are the lowest and the highest legal count, `legal` all of them where
    they are not those of a grid.
    """

    sites: tuple[str, ...]
    share: Fraction
    units: int
    cost: int
    multiple: int
    least: int
    most: int
    legal: tuple[int, ...] = ()

    @property
    def remainder(self) -> int:
        """Units to remove before the kept width is a multiple."""
        return self.units % self.multiple

    def after(self, count: int) -> int:
        """Return the next legal count."""
        if self.legal:
            return self.legal[bisect_right(self.legal, count)]
        return self.remainder if count < self.remainder else count + self.multiple

    def due(self, count: int) -> Fraction:
        """Return the offset at which the step up from `count` is due."""
        return Fraction(count + self.after(count), 2 * self.units) - self.share

    def nearest(self, offset: Fraction) -> int:
        """Return the legal count with all steps due up to `offset` taken."""
        wished = (self.share + offset) * self.units
        if self.legal:
            middles = [low + high for low, high in pairwise(self.legal)]
            found = self.legal[bisect_right(middles, 2 * wished)]
            return max(self.least, min(self.most, found))
        if 2 * wished < self.remainder:
            return self.least
        steps = (wished - self.remainder) / self.multiple + Fraction(1, 2)
        return max(self.least, min(self.most, self.remainder + math.floor(steps) * self.multiple))


def project(
    shares: Mapping[str, Fraction],
    units: Mapping[str, int],
    costs: Mapping[str, int],
    *,
    budget: Fraction | int,
    ties: Sequence[Sequence[str]] = (),
    multiple: int | Mapping[str, int] | None = None,
    exact: bool = False,
    what: str = "",
    at_least: Limits | None = None,
    at_most: Limits | None = None,
    legal: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, int]:
    """Return how many units every site loses.

    Sites without ties or multiple lose their own share, rounded half up, when the shares add up to
    the budget, or with `exact` when the rounded counts do. Otherwise the removed cost is never
    below the budget: sites of one tie lose equally many units, and a site that loses any keeps a
    multiple of `multiple`. At least one unit, or one multiple, stays of every site.

    Args:
        shares: the wished fraction of units to remove, by site.
        units: the number of units of every site.
        costs: what one unit of the site costs, in parameters.
        budget: what to remove, a Fraction of the total cost or an int of cost.
        ties: groups of sites with equal units that must keep equal widths.
        multiple: kept widths are multiples of it; a mapping says it by site.
        what: the kind of unit, for errors.
        exact: roundings of many sites may not add up to more than the last unit.
        at_least: shares that sites lose at least, rounded down to a legal count.
        at_most: shares that sites lose at most, rounded up to a whole unit.
        legal: in place of `multiple` and limits, the counts that each site may lose, ascending.

    Raises:
        RecipeError: the budget is more or less than can be removed; says how much can.
        ValueError: ties overlap, or tie sites of unequal units.

    >>> half = Fraction(1, 2)
    >>> project({"a": half, "b": half}, {"a": 7, "b": 8}, {"a": 1, "b": 1}, budget=half)
    {'a': 4, 'b': 4}
    """
    grids = multiple if isinstance(multiple, Mapping) else dict.fromkeys(units, multiple or 1)
    groups = _groups(shares, units, costs, ties, grids, at_least or {}, at_most or {}, legal or {})
    total = sum(group.units * group.cost for group in groups)
    asked = Fraction(budget) if isinstance(budget, int) else budget * total
    _check_reachable(groups, asked, total, what, limited=bool(at_least or at_most))
    counts = [group.nearest(Fraction(0)) for group in groups]
    off = abs(_removed(groups, counts) - asked)
    plain = not ties and multiple is None and legal is None
    if not plain or (off if exact else 2 * off > sum(group.cost for group in groups)):
        counts = _climb(groups, asked)
    return {site: counts[index] for site, index in _index_of_sites(groups, units).items()}


def default_multiple(width: int) -> int:
    """Return the multiple for kept widths: 128, at most width / 16, as a power of two.

    >>> default_multiple(768), default_multiple(11008)
    (32, 128)
    """
    return 1 << (max(1, min(128, width // 16)).bit_length() - 1)


def _groups(
    shares: Mapping[str, Fraction],
    units: Mapping[str, int],
    costs: Mapping[str, int],
    ties: Sequence[Sequence[str]],
    grids: Mapping[str, int],
    at_least: Limits,
    at_most: Limits,
    legal: Mapping[str, Sequence[int]],
) -> list[_Group]:
    """Return tied sites, then each other site alone; a group wishes its mean share by cost."""
    tied = [site for tie in ties for site in tie]
    alone = set(tied)
    if len(tied) != len(alone):
        raise ValueError(f"a site stands in two ties: {sorted(tied)}")
    groups = []
    for sites in [*ties, *([site] for site in units if site not in alone)]:
        num = units[sites[0]]
        if len({units[site] for site in sites}) != 1:
            raise ValueError(f"tied sites differ in units: { {s: units[s] for s in sites} }")
        cost = sum(costs[site] for site in sites)
        share = sum((costs[site] * shares[site] for site in sites), Fraction(0)) / cost
        limits = (
            max(at_least.get(site, Fraction(0)) for site in sites),
            min(at_most.get(site, Fraction(1)) for site in sites),
        )
        multiple = max(grids[site] for site in sites)
        allowed = tuple(legal.get(sites[0], ()))
        ends = (allowed[0], allowed[-1]) if allowed else _legal(num, multiple, *limits)
        groups.append(_Group(tuple(sites), share, num, cost, multiple, *ends, allowed))
    return groups


def _legal(units: int, multiple: int, low: Fraction, high: Fraction) -> tuple[int, int]:
    """Return the lowest and the highest count between two shares; one multiple stays."""

    def below(count: int) -> int:
        steps = (count - units % multiple) // multiple
        return 0 if steps < 0 else units % multiple + steps * multiple

    most = below(min(math.ceil(high * units), max(0, units - multiple)))
    return min(most, below(math.floor(low * units))), most


def _check_reachable(
    groups: Sequence[_Group], asked: Fraction, total: int, what: str, limited: bool
) -> None:
    """Raise where the budget is more, or less, than can be removed."""
    most = sum(group.most * group.cost for group in groups)
    least = sum(group.least * group.cost for group in groups)
    if asked > most:
        multiple = max(
            group.units - group.most if group.legal else group.multiple for group in groups
        )
        stays = "one unit" if multiple == 1 else f"a width of {multiple}"
        lower = "" if multiple == 1 else " or `multiple`"
        of = f"of {what} " if what else ""
        limits = ", or what its limit leaves" if limited else ""
        raise RecipeError(
            f"sparsity: {float(asked / total):.6g} cannot be removed. At most "
            f"{most / total:.6g} can, because every site {of}keeps at least {stays}{limits}; lower "
            f"`sparsity`{lower}."
        )
    if limited and asked < least:
        raise RecipeError(
            f"sparsity: {float(asked / total):.6g} is less than the {least / total:.6g} that the "
            "limits of single sites remove; raise `sparsity`, or lower the limits."
        )


def _climb(groups: Sequence[_Group], asked: Fraction) -> list[int]:
    """Take steps in the order in which they fall due until the removed cost meets the budget."""
    counts = _counts_below(groups, asked)
    removed = _removed(groups, counts)
    ladder = [
        (group.due(count), index)
        for index, (group, count) in enumerate(zip(groups, counts, strict=True))
        if count < group.most
    ]
    heapq.heapify(ladder)
    while removed < asked:
        _, index = heapq.heappop(ladder)
        group, count = groups[index], counts[index]
        counts[index] = group.after(count)
        removed += (counts[index] - count) * group.cost
        if counts[index] < group.most:
            heapq.heappush(ladder, (group.due(counts[index]), index))
    return counts


def _counts_below(groups: Sequence[_Group], asked: Fraction) -> list[int]:
    """Return the counts at an offset just short of the budget.

    It is looked for in floats, which may err by a step, and then moved down until exact counts are
    below the budget, or nothing is left to give back.
    """
    high = _offset_near(groups, float(asked))
    margin = Fraction(1, 2**_HALVINGS)
    least = [group.least for group in groups]
    while True:
        low = Fraction(high) - margin
        counts = [group.nearest(low) for group in groups]
        if _removed(groups, counts) < asked or counts == least:
            return counts
        margin *= 16


def _offset_near(groups: Sequence[_Group], asked: float) -> float:
    """Return the offset at which the removed cost passes the budget, by bisection in floats."""
    if any(group.legal for group in groups):
        return _offset_of(lambda t: _removed(groups, _nearest(groups, t)), groups, asked)
    share_G = np.array([float(group.share) for group in groups])
    units_G, cost_G, multiple_G, least_G, most_G = (
        np.array([getattr(group, name) for group in groups], dtype=np.float64)
        for name in ("units", "cost", "multiple", "least", "most")
    )
    rest_G = units_G % multiple_G

    def removed(offset: float) -> float:
        wished_G = (share_G + offset) * units_G
        counts_G = rest_G + np.floor((wished_G - rest_G) / multiple_G + 0.5) * multiple_G
        counts_G[2 * wished_G < rest_G] = 0
        return float(np.clip(counts_G, least_G, most_G) @ cost_G)

    return _offset_of(removed, groups, asked)


def _nearest(groups: Sequence[_Group], offset: float) -> list[int]:
    """Return the counts at an offset."""
    return [group.nearest(Fraction(offset)) for group in groups]


def _offset_of(removed: Callable[[float], float], groups: Sequence[_Group], asked: float) -> float:
    """Return the offset at which the removed cost passes the budget, by bisection."""
    shares = [float(group.share) for group in groups]
    low = -1 - max(shares, default=0.0)  # removes the least
    high = 2 - min(shares, default=0.0)  # removes the most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < asked else (low, middle)
    return float(low)


def _removed(groups: Iterable[_Group], counts: Iterable[int]) -> int:
    """Return the cost of the units removed."""
    return sum(group.cost * count for group, count in zip(groups, counts, strict=True))


def _index_of_sites(groups: Sequence[_Group], order: Iterable[str]) -> dict[str, int]:
    """Return the group of every site, in the given order."""
    index = {site: number for number, group in enumerate(groups) for site in group.sites}
    return {site: index[site] for site in order}
