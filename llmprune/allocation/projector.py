"""From wished shares to integer counts that meet a budget, ties and widths.

All groups of tied sites stand on one ladder: a step takes a group from one legal count to the next
and is due at the offset t where its wished share + t passes the middle between the two. Steps are
taken in the order in which they fall due until the budget is met. Hence counts stay nearest to the
wish, no count falls when the budget grows, and the result overshoots by less than its last step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from llmprune.base.errors import RecipeError

_HALVINGS = 40  # the bisection only shortens the climb; the ladder alone decides the result


@dataclass(frozen=True)
class _Group:
    """Sites that lose the same number of units: the wish, what one unit of all costs, the grid."""

    sites: tuple[str, ...]
    share: Fraction
    units: int
    cost: int
    multiple: int

    @property
    def remainder(self) -> int:
        """Units to remove before the kept width is a multiple."""
        return self.units % self.multiple

    @property
    def most(self) -> int:
        """The highest legal count: one multiple stays."""
        return max(0, self.units - self.multiple)

    def after(self, count: int) -> int:
        """Return the next legal count."""
        return self.remainder if count < self.remainder else count + self.multiple

    def due(self, count: int) -> Fraction:
        """Return the offset at which the step up from `count` is due."""
        return Fraction(count + self.after(count), 2 * self.units) - self.share

    def nearest(self, offset: Fraction) -> int:
        """Return the legal count with all steps due up to `offset` taken."""
        wished = (self.share + offset) * self.units
        if 2 * wished < self.remainder:
            return 0
        steps = (wished - self.remainder) / self.multiple + Fraction(1, 2)
        return min(self.most, self.remainder + math.floor(steps) * self.multiple)


def project(
    shares: Mapping[str, Fraction],
    units: Mapping[str, int],
    costs: Mapping[str, int],
    *,
    budget: Fraction | int,
    ties: Sequence[Sequence[str]] = (),
    multiple: int | None = None,
    exact: bool = False,
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
        multiple: kept widths are multiples of it.
        exact: roundings of many sites may not add up to more than the last unit.

    Raises:
        RecipeError: the budget is more than can be removed; says how much can.
        ValueError: ties overlap, or tie sites of unequal units.

    >>> half = Fraction(1, 2)
    >>> project({"a": half, "b": half}, {"a": 7, "b": 8}, {"a": 1, "b": 1}, budget=half)
    {'a': 4, 'b': 4}
    """
    groups = _groups(shares, units, costs, ties, multiple or 1)
    total = sum(group.units * group.cost for group in groups)
    asked = Fraction(budget) if isinstance(budget, int) else budget * total
    _check_reachable(groups, asked, total, multiple)
    counts = [group.nearest(Fraction(0)) for group in groups]
    off = abs(_removed(groups, counts) - asked)
    plain = not ties and multiple is None
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
    multiple: int,
) -> list[_Group]:
    """Return tied sites, then each other site alone; a group wishes its mean share by cost."""
    tied = [site for tie in ties for site in tie]
    if len(tied) != len(set(tied)):
        raise ValueError(f"a site stands in two ties: {sorted(tied)}")
    groups = []
    for sites in [*ties, *([site] for site in units if site not in set(tied))]:
        if len({units[site] for site in sites}) != 1:
            raise ValueError(f"tied sites differ in units: { {s: units[s] for s in sites} }")
        cost = sum(costs[site] for site in sites)
        share = sum((costs[site] * shares[site] for site in sites), Fraction(0)) / cost
        groups.append(_Group(tuple(sites), share, units[sites[0]], cost, multiple))
    return groups


def _check_reachable(
    groups: Sequence[_Group], asked: Fraction, total: int, multiple: int | None
) -> None:
    """Raise where the budget is more than can be removed."""
    most = sum(group.most * group.cost for group in groups)
    if asked > most:
        stays = "one unit" if multiple is None else f"a width of {multiple}"
        lower = "" if multiple is None else " or `multiple`"
        raise RecipeError(
            f"sparsity: {float(asked / total):.6g} cannot be removed. At most "
            f"{most / total:.6g} can, because every site keeps at least {stays}; lower "
            f"`sparsity`{lower}."
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
    """Return the counts at an offset just short of the budget, found by bisection.

    Groups of one size and wish, such as the experts of a model, are asked once for all.
    """
    alike: dict[tuple[Fraction, int], list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault((group.share, group.units), []).append(index)

    def counts_at(offset: Fraction) -> list[int]:
        counts = [0] * len(groups)
        for members in alike.values():
            count = groups[members[0]].nearest(offset)
            for index in members:
                counts[index] = count
        return counts

    low = -1 - max((group.share for group in groups), default=Fraction(0))  # removes nothing
    high = 2 - min((group.share for group in groups), default=Fraction(0))  # removes the most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _removed(groups, counts_at(middle)) < asked:
            low = middle
        else:
            high = middle
    return counts_at(low)


def _removed(groups: Iterable[_Group], counts: Iterable[int]) -> int:
    """Return the cost of the units removed."""
    return sum(group.cost * count for group, count in zip(groups, counts, strict=True))


def _index_of_sites(groups: Sequence[_Group], order: Iterable[str]) -> dict[str, int]:
    """Return the group of every site, in the given order."""
    index = {site: number for number, group in enumerate(groups) for site in group.sites}
    return {site: index[site] for site in order}
