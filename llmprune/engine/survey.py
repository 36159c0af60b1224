"""The walk before the cut: what an allocation must know of every linear to say how much each loses.

Blocks are opened one at a time and stay as they are. Legend: O outputs, I inputs, N units that an
earlier pruning left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.threshold import Histogram, count_lowest, histogram
from llmprune.allocation.types import Profile
from llmprune.base.errors import CheckpointError
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import read_json
from llmprune.engine.amounts import num_pruned, spared
from llmprune.engine.cutting import Prior
from llmprune.engine.plan import Plan
from llmprune.engine.solving import EMPTY
from llmprune.mask.pattern import Tiles, pool_tiles
from llmprune.stats.types import Stats
from llmprune.walk.block import Blocks
from llmprune.walk.forward import Stream
from llmprune.walk.observation import observe

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a survey walks over.

    `embed` gives fresh hidden states where statistics are needed; blocks stay dense, and so do
    these. `prior` gives the masks of earlier prunings of a block.
    """

    blocks: Blocks
    progress: Progress
    embed: Callable[[], Stream] | None = None
    prior: Callable[[int], Prior] = lambda index: {}


def take_survey(plan: Plan, around: Surroundings, *, record: Path | None = None) -> Plan:
    """Read all linears and return the plan with the counts that follow.

    A ranking may look twice, the second time more closely at what lies at the threshold. The counts
    are written to `record`; where it exists already they are read from there, and nothing else is.

    Raises:
        NumericalError: a weight or an activation is not finite; names it.
        CheckpointError: the record is of another run.
    """
    if record is not None and record.exists():
        return _recorded(plan, record)
    plan = plan.with_profiles(_profiles(plan, around))
    if record is not None and plan.counts is not None:
        write_json(record, {"allocation": plan.allocation, "removed": dict(plan.counts)})
    return plan


def _recorded(plan: Plan, record: Path) -> Plan:
    """Return the plan with the counts of an earlier survey.

    Raises:
        CheckpointError: they are of other linears.
    """
    counts = read_json(record).get("removed", {})
    if counts.keys() != {site.name for site in plan.sites}:
        raise CheckpointError(
            f"{record} does not hold the counts of this run's linears. Begin again with "
            "--overwrite."
        )
    return replace(plan, counts=counts)


def _profiles(plan: Plan, around: Surroundings) -> dict[str, Tensor]:
    """Return every site's profile: what the row's function says, or how many rank lowest."""
    profile = ALLOCATIONS[plan.allocation].profile
    assert profile is not None
    if not profile.ranked:
        return dict(_visit(plan, around, profile, "survey", profile.fn))

    def look(within: int | None) -> Iterator[tuple[str, Histogram]]:
        def read(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Histogram:
            return _ranked(plan, profile, weight_OI, stats, keep_OI, within)

        name = "survey" if within is None else "second look"
        return _visit(plan, around, profile, name, read)

    floor = spared(plan.prune, plan.allocation, plan.sites)
    counts = count_lowest(look, num_pruned(plan.prune, plan.sites), floor)
    return {site: torch.tensor([count]) for site, count in counts.items()}


def _visit(
    plan: Plan,
    around: Surroundings,
    profile: Profile,
    name: str,
    read: Callable[[Tensor, Stats, Tensor | None], T],
) -> Iterator[tuple[str, T]]:
    """Yield every site with what is read of its linear, block by block."""
    assert around.embed is not None or not profile.needs
    stream = around.embed() if around.embed is not None and profile.needs else None
    blocks = around.blocks
    with around.progress.stage(name, len(blocks)) as stage:
        for index, groups in enumerate(plan.groups):
            with blocks.open(index) as block:
                masks = around.prior(index)
                needs = {group.tap: profile.needs for group in groups}
                seen = observe(block, stream, needs, dense=True) if stream else None
                for group in groups:
                    stats = seen.stats[group.tap] if seen else EMPTY
                    for site in group.sites:
                        linear = site.spans[0].linear
                        block.check_finite(linear)
                        yield site.name, read(block.weight(linear), stats, masks.get(site.name))
            stage.advance(f"block {index}")
    if stream:
        stream.hidden.close()


def _ranked(
    plan: Plan,
    profile: Profile,
    weight_OI: Tensor,
    stats: Stats,
    keep_OI: Tensor | None,
    within: int | None,
) -> Histogram:
    """Return the histogram of a linear's units; what an earlier pruning removed is below all."""
    score_OI = profile.fn(weight_OI, stats, keep_OI)
    if keep_OI is not None:
        score_OI.masked_fill_(~keep_OI.to(score_OI.device), -torch.inf)
    if isinstance(plan.pattern, Tiles):
        score_OI = pool_tiles(score_OI, plan.pattern, plan.method.pool)
    score_N = score_OI.reshape(-1)
    if keep_OI is not None:
        score_N = score_N[score_N != -torch.inf]
    num_removed = score_OI.numel() - len(score_N)
    if profile.normalise is not None:
        score_N = profile.normalise(score_N)
    return histogram(score_N, num_removed=num_removed, within=within)
