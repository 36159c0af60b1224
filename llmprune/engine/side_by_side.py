"""The groups of a block solved by several processes at once, where their Gram matrices dominate.

What a group is cut with is all in its own statistics, so any process that has the source can solve
it. The first keeps what costs most and sends the others' statistics to them; it takes back masks,
rows and new weights, and puts them in the order in which it would have solved alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmprune.base.memory import LARGE_PIECE, return_freed
from llmprune.engine.outcome import Outcome
from llmprune.engine.sites import Group
from llmprune.engine.solving import EMPTY, Cutter
from llmprune.mask.pattern import NofM, Unstructured
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.sharing import Others

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST = 2**27  # multiply-adds of a group: below, sending its matrix takes as long as solving it


@dataclass(frozen=True, kw_only=True)
class Job:
    """A group to solve, which has a place among those of its block, and what is known for it."""

    place: int
    group: Group
    stats: Stats
    prior: Mapping[str, Tensor]
    learnt: Mapping[str, Stats]

    def on(self, device: torch.device) -> Job:
        """Return the job with its tensors on a device."""

        def moved(stats: Stats) -> Stats:
            values = {name: value.to(device) for name, value in stats.values.items()}
            return replace(stats, values=values)

        return replace(
            self,
            stats=moved(self.stats),
            learnt={name: moved(stats) for name, stats in self.learnt.items()},
        )

    def done(self, cutter: Cutter, block: Block) -> Solution:
        """Return what becomes of the group; the block's weights are changed too."""
        outcome = Outcome()
        cutter.cut(
            self.group, block, {self.group.tap: self.stats}, self.prior, outcome, self.learnt
        )
        linears = [site.spans[0].linear for site in self.group.sites]
        _return_freed_after(self.group)
        return Solution(self.place, outcome, {name: block.weight(name) for name in linears})


@dataclass(frozen=True)
class Solution:
    """What a job came to: its outcome, and the weights (O, I) of its linears by name."""

    place: int
    outcome: Outcome
    weights: Mapping[str, Tensor]


def cut_groups(
    groups: Sequence[Group],
    stats: Mapping[str, Stats],
    cutter: Cutter,
    block: Block,
    outcome: Outcome,
    *,
    prior: Mapping[str, Tensor],
    learnt: Mapping[str, Stats],
    others: Others,
) -> None:
    """Cut groups of a block by the statistics of their taps, by several processes where that pays.

    `prior` are masks of earlier prunings by linear, `learnt` what is known of single linears.

    Raises:
        LlmpruneError: what another process could not solve.
    """
    if _may_share(cutter, others):
        _cut_jobs(_jobs_of(groups, stats, prior, learnt), cutter, block, outcome, others)
        return
    for group in groups:
        cutter.cut(group, block, stats, prior, outcome, learnt)
        _return_freed_after(group)


def _jobs_of(
    groups: Sequence[Group],
    stats: Mapping[str, Stats],
    prior: Mapping[str, Tensor],
    learnt: Mapping[str, Stats],
) -> list[Job]:
    """Return groups of a block with what is known for each, and no more."""
    return [
        Job(
            place=place,
            group=group,
            stats=stats.get(group.tap, EMPTY),
            prior={site.name: prior[site.name] for site in group.sites if site.name in prior},
            learnt={
                name: learnt[name]
                for name in (site.spans[0].linear for site in group.sites)
                if name in learnt
            },
        )
        for place, group in enumerate(groups)
    ]


def _may_share(cutter: Cutter, others: Others) -> bool:
    """Tell whether groups may be solved anywhere: none may look at what another one decided."""
    weights = isinstance(cutter.pattern, Unstructured | NofM)
    return others.world.size > 1 and weights and not cutter.permute and cutter.method.repair is None


def _cut_jobs(
    jobs: Sequence[Job], cutter: Cutter, block: Block, outcome: Outcome, others: Others
) -> None:
    """Solve groups here and in other processes, and add what comes of each in order."""
    shares = _shares([_cost(job) for job in jobs], others.world.size)
    solved: list[Solution] = []
    if any(shares[1:]):
        with others.asked("solve", take=solved.append, index=block.index, cutter=cutter):
            for rank, places in enumerate(shares[1:], start=1):
                others.world.send(rank, [jobs[place] for place in places])
            mine = [jobs[place].done(cutter, block) for place in shares[0]]
        for solution in solved:
            for linear, weight_OI in solution.weights.items():
                block.replace(linear, weight_OI.to(block.device))
    else:
        mine = [job.done(cutter, block) for job in jobs]
    for solution in sorted([*mine, *solved], key=lambda solution: solution.place):
        outcome.take(solution.outcome)


def _return_freed_after(group: Group) -> None:
    if sum(site.num_weights for site in group.sites) > LARGE_PIECE:
        return_freed()


def _cost(job: Job) -> int:
    """Return about how many multiply-adds a group costs; 0 where no Gram matrix is solved with."""
    if "gram" not in job.stats.values:
        return 0
    columns = len(job.stats["gram"])
    return columns**3 + columns * sum(site.num_weights for site in job.group.sites)


def _shares(costs: Sequence[int], num_processes: int) -> list[list[int]]:
    """Return the places of each process: the costliest first, to whoever has least to do.

    Cheap ones stay with the first process, and of equal loads the earlier process is taken.

    >>> _shares([8 * LEAST, 2 * LEAST, 3 * LEAST, 1], 2)
    [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(num_processes)]
    loads = [0] * num_processes
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = loads.index(min(loads)) if costs[place] >= LEAST else 0
        shares[rank].append(place)
        loads[rank] += costs[place]
    return [sorted(share) for share in shares]
