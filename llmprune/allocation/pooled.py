"""Units of all kinds in one pool: what changes the outputs least for its size goes first.

Halves of blocks and blocks, kv groups and chunks of channels are tried together, on top of what is
removed already, in the manner of Zhang et al., FinerCut; by size, since they are of unequal ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from llmprune.allocation.fitting import option
from llmprune.allocation.standardised import teams_of
from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    Counts,
    Covers,
    admitted,
    after,
    asked_cost,
    candidate,
    check_removable,
    covers_of,
    finite,
    is_covered,
    legal_counts,
    removed_cost,
    shares_of,
    unguarded,
)
from llmprune.arch.couplings import DEPTHS
from llmprune.arch.types import Site


class Step(NamedTuple):
    """A team that loses its next chunk: all counts then, and the weights that go with it."""

    team: int
    counts: Counts
    gain: int


def by_pool(request: Request) -> dict[str, Fraction]:
    """Return the shares at which units of all kinds went in the order of what they do for their
    size.

    In each of `rounds` rounds of the probe every site loses one chunk more, of `chunks` that it
    has, or goes whole if it is a half or a block. Those with the least rise of KL for a removed
    weight go, until the round's part of the asked size is met; what the last round leaves is taken
    in its order. Tied sites go together. The `first` and the `last` blocks stay.
    """
    assert request.probe is not None
    sites = unguarded(request)
    check_removable(request, sites)
    pool = Pool(
        sites=sites,
        teams=teams_of(sites, request.ties),
        covers=covers_of(sites),
        multiple=request.multiple,
        parallel=request.parallel,
        chunks=option(request, "chunks", least=1),
    )
    need, counts, order = asked_cost(request), dict[str, int](), list[int]()
    for left in range(int(option(request, "rounds", least=1)), 0, -1):
        missing = need - removed_cost(sites, counts)
        if missing <= 0:
            break
        steps = pool.steps(counts, missing)
        tried = [counts, *(step.counts for step in steps)]
        answers = request.probe([candidate(sites, each) for each in tried])
        order = ranked(steps, [answer.kl for answer in answers], len(pool.teams))
        counts = pool.take(counts, order, need, part=-(-missing // left))
    while removed_cost(sites, counts) < need:
        counts = pool.take(counts, order, need, part=need)
    return shares_of(request.sites, counts)


def ranked(steps: Sequence[Step], divergences: Sequence[float], num_teams: int) -> list[int]:
    """Return teams by the rise of KL for each weight; those without a step come last.

    `divergences` begins with that of what is there.

    >>> ranked([Step(0, {}, 10), Step(2, {}, 100)], [1.0, 1.1, 1.2], 3)
    [2, 0, 1]
    """
    now, *then = divergences
    rise = {step.team: finite((kl - now) / step.gain) for step, kl in zip(steps, then, strict=True)}
    return [*sorted(rise, key=rise.__getitem__), *(t for t in range(num_teams) if t not in rise)]


def rounds_of_pool(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of every round: what is there, and one more chunk of each site.

    >>> rounds_of_pool(64, {"rounds": 3, "chunks": 8})
    [65, 65, 65]
    """
    return [num_sites + 1] * int(options["rounds"])


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The sites that may lose something, as teams that lose equally many units."""

    sites: Sequence[Site]
    teams: Sequence[Sequence[Site]]
    covers: Covers
    multiple: int | None
    parallel: int
    chunks: float

    def steps(self, counts: Counts, missing: int) -> list[Step]:
        """Return what may go next where so many weights are missing."""
        every = [self.step(counts, team, missing) for team in range(len(self.teams))]
        found = [step for step in every if step is not None]
        fit = admitted({str(step.team): step.gain for step in found}, missing)
        return [step for step in found if not self.is_deep(step.team) or str(step.team) in fit]

    def step(self, counts: Counts, team: int, missing: int) -> Step | None:
        """Return the next chunk of a team, but no more of it than is missing; None if it has none.

        A half or a block goes whole, even where it holds more.
        """
        sites = [s for s in self.teams[team] if not is_covered(s.name, counts, self.covers)]
        if not sites:
            return None
        now = max(counts.get(site.name, 0) for site in sites)
        cost = sum(site.unit_cost for site in sites)
        aim = now + min(sites[0].num_units / self.chunks, missing / cost)
        legal = legal_counts(sites[0], self.multiple, self.parallel)
        more = [count for count in legal if count > now]
        if not more:
            return None
        count = next((count for count in more if count >= aim), more[-1])
        then = after(counts, {site.name: count for site in sites}, self.covers)
        gain = removed_cost(self.sites, then) - removed_cost(self.sites, counts)
        return Step(team, then, gain) if gain > 0 else None

    def take(self, counts: Counts, order: Sequence[int], need: int, *, part: int) -> dict[str, int]:
        """Return the counts after one chunk of each team in turn, until `part` weights more went,
        or `need` weights in all."""
        start = removed = removed_cost(self.sites, counts)
        for team in order:
            if removed >= need or removed - start >= part:
                break
            step = self.step(counts, team, need - removed)
            if step is not None and self._fits(step, counts, need - removed):
                counts, removed = step.counts, removed + step.gain
        return dict(counts)

    def is_deep(self, team: int) -> bool:
        """Tell whether a team is a half or a block, which goes whole."""
        return self.teams[team][0].kind in DEPTHS

    def _fits(self, step: Step, counts: Counts, missing: int) -> bool:
        """Tell whether a step is among those that may go next."""
        if step.gain <= missing or not self.is_deep(step.team):
            return True
        return any(step.team == each.team for each in self.steps(counts, missing))
