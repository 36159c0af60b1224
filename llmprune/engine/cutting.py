"""Prune every block in order, feeding each the activations that its stored predecessors produce.

Legend: B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmprune.base.memory import LARGE_PIECE, anonymous_bytes, return_freed
from llmprune.base.progress import Progress
from llmprune.calibration.replay import call
from llmprune.engine.plan import Plan
from llmprune.engine.solving import EMPTY, Cutter, Outcome
from llmprune.walk.block import Block, Blocks
from llmprune.walk.forward import Stream, advance, check_activation
from llmprune.walk.observation import Seen, in_rounds, observe

if TYPE_CHECKING:
    from torch import Tensor

RUNAWAY = 1.0
Prior = Mapping[str, "Tensor"]


class Target(Blocks, Protocol):
    """Blocks that can be committed, and read back as they are stored."""

    def stored(self, index: int) -> AbstractContextManager[Block]: ...

    def commit(
        self, block: Block, touched: set[str], redo: Callable[[Block], None] | None = None
    ) -> Path | None: ...


class Keeper(Protocol):
    """Remembers which blocks are whole."""

    def whole(self, index: int) -> dict[str, Any] | None: ...

    def keep(
        self, index: int, shard: Path | None, outcome: Outcome, content: Mapping[str, Any]
    ) -> dict[str, Any]: ...

    def flush(self) -> None: ...


def cut(
    plan: Plan,
    blocks: Target,
    stream: Stream | None,
    keeper: Keeper,
    progress: Progress,
    *,
    prior: Callable[[int], Prior] = lambda index: {},
) -> tuple[list[dict[str, Any]], int | None]:
    """Cut all blocks that are not whole yet; return every block's record, and the last whole one.

    `stream` is absent for methods that look at weights alone; `prior` gives the masks of earlier
    prunings of a block.
    """
    records = [keeper.whole(index) for index in range(len(blocks))]
    done = [record is not None for record in records]
    resumed = max((index for index, whole in enumerate(done) if whole), default=None)
    if resumed is not None:
        progress.event("resumed", after=resumed)
        progress.note(f"resumed after block {resumed}")
    cutter = plan.cutter()
    found: list[dict[str, Any]] = []
    with progress.stage("cut", len(blocks)) as stage, _flushed(keeper):
        for index, record in enumerate(records):
            if record is None:
                more = not all(done[index + 1 :])
                record = _cut_block(plan, cutter, blocks, stream, keeper, index, prior, more)
                _report(record, progress)
            elif stream is not None and not all(done[index:]):
                _pass_through(plan, blocks, stream, index)
            found.append(record)
            stage.advance(
                f"block {index}",
                sparsity=record["sparsity"],
                **({"error": record["error"]} if record["error"] is not None else {}),
                memory=anonymous_bytes(),
            )
    return found, resumed


@contextmanager
def _flushed(keeper: Keeper) -> Iterator[None]:
    """Wait for the last record, whatever ends the loop; the first fault is the one told."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            keeper.flush()
        raise
    keeper.flush()


def _cut_block(
    plan: Plan,
    cutter: Cutter,
    blocks: Target,
    stream: Stream | None,
    keeper: Keeper,
    index: int,
    prior: Callable[[int], Prior],
    more: bool,
) -> dict[str, Any]:
    """Observe, decide and commit one block, then pass the hidden states through what is stored."""
    seconds: dict[str, float] = {}
    outcome = Outcome()
    first = None if stream is None else stream.hidden.get(0, blocks.device).clone()
    with blocks.open(index) as block:
        masks = prior(index)
        for site in (site for group in plan.groups[index] for site in group.sites):
            for span in site.spans:
                block.check_finite(span.linear)
        dense_output = _decide(plan, cutter, block, stream, masks, outcome, seconds)
        with _timed(seconds, "solve"):
            outcome.carry(masks)
        with _timed(seconds, "write"):
            redo = None if cutter.updates else partial(cutter.redo, outcome=outcome)
            shard = blocks.commit(block, outcome.touched, redo)
    peak = anonymous_bytes()
    error = None
    with _timed(seconds, "advance"):
        if stream is not None and dense_output is not None and first is not None:
            error = _advance(plan, blocks, stream, index, dense_output, first, more)
    removed = sum(int(str(row["removed_weights"])) for row in outcome.rows)
    weights = sum(int(str(row["weights"])) for row in outcome.rows)
    return keeper.keep(
        index,
        shard,
        outcome,
        {
            "sparsity": removed / weights if weights else 0.0,
            "error": error,
            "sites": outcome.rows,
            "seconds": seconds,
            "memory": max(peak, anonymous_bytes()),
        },
    )


def _decide(
    plan: Plan,
    cutter: Cutter,
    block: Block,
    stream: Stream | None,
    masks: Prior,
    outcome: Outcome,
    seconds: dict[str, float],
) -> Tensor | None:
    """Observe and cut the groups of a block, in as many rounds as their statistics need.

    All rounds see the block as it was: with more than one, new weights wait until the last.
    Returns the dense output of the first micro-batch, where tokens flow.
    """
    rounds = in_rounds(block.anatomy, plan.needs(block.index), plan.estimate.statistics_bytes)
    changed = block.holding() if len(rounds) > 1 else block
    seen: Seen | None = None
    for needs in rounds:
        with _timed(seconds, "observe"):
            if stream is not None:
                dense = plan.prune.propagate == "dense" and needs is rounds[-1]
                seen = observe(block, stream, needs, dense=dense)
                return_freed()
        with _timed(seconds, "solve"):
            for group in plan.groups[block.index]:
                if seen is None or group.tap in needs:
                    stats = seen.stats[group.tap] if seen else EMPTY
                    cutter.cut(group, changed, stats, masks, outcome)
                    if sum(site.num_weights for site in group.sites) > LARGE_PIECE:
                        return_freed()
    changed.settle()
    return seen.dense_output if seen else None


def _advance(
    plan: Plan,
    blocks: Target,
    stream: Stream,
    index: int,
    dense_output: Tensor,
    first_BTD: Tensor,
    more: bool,
) -> float:
    """Advance the hidden states; return the relative output error on the first micro-batch."""
    with torch.no_grad(), blocks.stored(index) as stored:
        pruned = call(stored.module, first_BTD, stream.arguments[0][index])
        check_activation(pruned, f"output of pruned block {index}")
        if plan.prune.propagate == "pruned" and more:
            advance(stored, stream, known={0: pruned})
    difference = torch.linalg.vector_norm((pruned - dense_output).float())
    return float(difference / torch.linalg.vector_norm(dense_output.float()))


def _pass_through(plan: Plan, blocks: Target, stream: Stream, index: int) -> None:
    """Advance through a block that was cut in an earlier run."""
    opened = blocks.open if plan.prune.propagate == "dense" else blocks.stored
    with opened(index) as block:
        advance(block, stream)


def _report(record: Mapping[str, Any], progress: Progress) -> None:
    """Warn about a block that went wrong without failing."""
    if record["error"] is not None and record["error"] > RUNAWAY:
        progress.warn(
            f"block {record['block']}: the output differs from the dense block's by "
            f"{record['error']:.2f} times its size; the result will be poor. Ask for a lower "
            "--sparsity."
        )
    fallen = [row["site"] for row in record["sites"] if row.get("fallback")]
    if fallen:
        progress.warn(
            f"block {record['block']}: {len(fallen)} linears saw no token and were pruned by "
            f"magnitude ({fallen[0]}{', ...' if len(fallen) > 1 else ''}); more --num-samples "
            "would reach them."
        )


class _timed:
    """Add the seconds of a `with` body to a table."""

    def __init__(self, table: dict[str, float], name: str) -> None:
        self.table, self.name = table, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.table[self.name] = self.table.get(self.name, 0.0) + time.perf_counter() - self.start
