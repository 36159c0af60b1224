"""Prune every block in order, feeding each the activations that its stored predecessors produce.

Legend: B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from llmprune.base.memory import anonymous_bytes, return_freed
from llmprune.base.progress import Progress
from llmprune.base.timeline import Clock
from llmprune.calibration.replay import call
from llmprune.engine.outcome import Order, Outcome, follow
from llmprune.engine.plan import Plan
from llmprune.engine.shipment import gone_of, is_gone
from llmprune.engine.side_by_side import cut_groups
from llmprune.engine.solving import Cutter
from llmprune.engine.unit_survey import beside, routing_of
from llmprune.mask.pattern import NofM, Units
from llmprune.repair import REPAIRS
from llmprune.repair.types import Work
from llmprune.stats.types import Stats
from llmprune.walk.block import Block, Blocks
from llmprune.walk.forward import Stream, advance, check_activation
from llmprune.walk.observation import Seen, in_rounds, observe
from llmprune.walk.regional import regional_squares
from llmprune.walk.sharing import ALONE

if TYPE_CHECKING:
    from torch import Tensor

RUNAWAY = 1.0
ACCEPTED = 0.9  # where fewer rows are better for their update, something is wrong
Prior = Mapping[str, "Tensor"]
Learnt = Mapping[str, Stats]


class Known(NamedTuple):
    """What is known of a block before it is opened: masks of earlier prunings, gradients, (where a
    repair wants it) what reaches it in the dense model, and statistics of taps that were given."""

    masks: Prior
    learnt: Learnt
    dense: Stream | None = None
    given: Learnt | None = None


class Target(Blocks, Protocol):
    """Blocks that can be committed, and read back as they are stored."""

    def expect(self, index: int) -> None: ...

    def stored(self, index: int) -> AbstractContextManager[Block]: ...

    def is_gone(self, index: int) -> bool: ...

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
    gradients: Callable[[int], Learnt] = lambda index: {},
    dense: Stream | None = None,
) -> tuple[list[dict[str, Any]], int | None]:
    """Cut all blocks that are not whole yet; return every block's record, and the last whole one.

    `stream` is absent for methods that look at weights alone; `prior` gives the masks of earlier
    prunings of a block, and `gradients` what a backward survey learnt of its linears. `dense` are
    hidden states of the dense model, walked alongside for repairs that compare with them.
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
                given = None if plan.given is None else plan.given.of_block(index, plan.device)
                known = Known(prior(index), gradients(index), dense, given)
                seconds = Clock(progress.timeline, index)
                record = _cut_block(
                    plan, cutter, blocks, stream, keeper, index, known, more, seconds
                )
                _report(record, progress)
            elif stream is not None and not all(done[index:]):
                _pass_through(plan, blocks, stream, dense, index)
            found.append(record)
            stage.advance(
                f"block {index}",
                whole=done[index],
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
    known: Known,
    more: bool,
    seconds: Clock,
) -> dict[str, Any]:
    """Observe, decide and commit one block, then pass the hidden states through what is stored."""
    first = None if stream is None else stream.hidden.get(0, blocks.device).clone()
    with blocks.open(index) as block:
        if more:
            blocks.expect(index + 1)
        for site in (site for group in plan.groups[index] for site in group.sites):
            for span in site.spans:
                block.check_finite(span.linear)
        act = _decide if plan.method.repair is None else _repaired
        outcome, dense_output = act(plan, cutter, block, stream, known, seconds)
        with seconds.timed("solve"):
            outcome.carry(known.masks, block.prefix)
        with seconds.timed("write"):
            redo = None if cutter.updates else partial(cutter.redo, outcome=outcome)
            shard = blocks.commit(block, outcome.touched, redo)
    peak = anonymous_bytes()
    error = None
    with seconds.timed("advance"):
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
            **({"repair": outcome.facts} if outcome.facts else {}),
            "spreads": outcome.spreads.to_dict(),
            "seconds": dict(seconds),
            "memory": max(peak, anonymous_bytes()),
        },
    )


def _decide(
    plan: Plan,
    cutter: Cutter,
    block: Block,
    stream: Stream | None,
    known: Known,
    seconds: Clock,
) -> tuple[Outcome, Tensor | None]:
    """Observe and cut the groups of a block, in as many rounds as their statistics need.

    All rounds see the block as it was: with more than one, new weights wait until the last.
    Returns the dense output of the first micro-batch too, where tokens flow.
    """
    outcome, learnt = Outcome(), known.learnt
    if plan.parts.regional:
        assert stream is not None
        with seconds.timed("gradients"):
            learnt = {**learnt, **regional_squares(block, stream)}
    needed = plan.needs(block.index)
    room = plan.estimate.statistics_bytes
    whole = isinstance(plan.pattern, Units)  # a unit reads several taps
    at_once = whole or known.given is not None  # what was given is read tap by tap
    rounds = [needed] if at_once else in_rounds(block.anatomy, needed, room)
    changed = block.holding() if len(rounds) > 1 else block
    seen: Seen | None = None
    with seconds.timed("observe"):
        routed = routing_of(plan, block, stream)
    gone = gone_of(plan.groups[block.index], plan.counts or {})
    for needs in rounds:
        seen = None  # statistics of one round at a time
        with seconds.timed("observe"):
            if stream is not None:
                dense = plan.prune.propagate == "dense" and needs is rounds[-1]
                seen = observe(block, stream, needs, dense=dense)
                return_freed()
        ready = [
            group
            for group in plan.groups[block.index]
            if seen is None or not plan.parts.cut or group.coupling or group.tap in needs
            # one that goes by itself has a row of its own
            if not is_gone(group.sites[0], gone) or (plan.counts or {})[group.sites[0].name]
        ]
        with seconds.timed("solve"):
            cut_groups(
                ready,
                known.given or beside(seen.stats if seen else {}, None, routed),
                cutter,
                changed,
                outcome,
                prior=known.masks,
                learnt=learnt,
                others=ALONE if stream is None else stream.others,
            )
    changed.settle()
    cutter.finish(block, outcome, known.masks)
    cutter.reorder_writers(block, outcome)
    return outcome, seen.dense_output if seen else None


def _repaired(
    plan: Plan,
    cutter: Cutter,
    block: Block,
    stream: Stream | None,
    known: Known,
    seconds: Clock,
) -> tuple[Outcome, Tensor | None]:
    """Cut a block and improve it in place; weights are rounded to what is stored at the end."""
    repair = REPAIRS[str(plan.method.repair)]
    assert stream is not None
    options = plan.options_of(repair.options)
    seed = plan.recipe.seed + block.index
    with seconds.timed("repair"):
        if known.dense is not None:
            advance(block, known.dense)
        seen = repair.watch(block, stream, options, seed)
    first, dense_output = _decide(plan, cutter, block, stream, known, seconds)
    found = [first]
    for order in first.permuted:  # channels are put in order once
        masks, learnt = follow(order, block.prefix, known.masks), follow(order, "", known.learnt)
        known = known._replace(masks=masks, learnt=learnt)

    def again() -> dict[str, Tensor]:
        later = replace(cutter, permute=False)
        found.append(_decide(plan, later, block, stream, known, seconds)[0])
        found[-1].permuted.extend(first.permuted)
        found[-1].touched |= first.touched
        return found[-1].keeps(block)

    work = Work(
        block=block,
        stream=stream,
        seen=seen,
        keep=first.keeps(block),
        decide=again,
        seed=seed,
        options=options,
        dense=None if known.dense is None else known.dense.hidden,
        undo=lambda: found.append(first),
        touch=first.touched.update,
        within=plan.pattern.m if isinstance(plan.pattern, NofM) else None,
        reordered=partial(_follow_all, first.permuted),
        remask=partial(_remask, first, block),
    )
    with seconds.timed("repair"):
        facts = repair.fn(work)
        outcome = found[-1]
        outcome.facts.update(facts)
        for row in outcome.rows:  # it was of weights that were trained since
            row["error"] = None
        outcome.touched |= block.rounded(outcome.touched, plan.stored)
    return outcome, dense_output


def _follow_all(orders: Sequence[Order], known: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return what is known of a block's linears in the order that its couplings were put into."""
    for order in orders:
        known = follow(order, "", known)
    return known


def _remask(outcome: Outcome, block: Block, keep: Mapping[str, Tensor]) -> None:
    """Let other masks of the same counts stand for those of a decision."""
    for linear, keep_OI in keep.items():
        outcome.keep(block.prefix + linear, keep_OI)


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
    if blocks.is_gone(index):
        pruned = first_BTD
    else:
        with torch.no_grad(), blocks.stored(index) as stored:
            pruned = call(stored.module, first_BTD, stream.arguments[0][index])
            check_activation(pruned, f"output of pruned block {index}")
            if plan.prune.propagate == "pruned" and more:
                advance(stored, stream, known={0: pruned}, stored=True)
    difference = torch.linalg.vector_norm((pruned - dense_output).float())
    return float(difference / torch.linalg.vector_norm(dense_output.float()))


def _pass_through(
    plan: Plan, blocks: Target, stream: Stream, dense: Stream | None, index: int
) -> None:
    """Advance through a block that was cut in an earlier run."""
    if dense is not None:
        with blocks.open(index) as block:
            advance(block, dense)
    if plan.prune.propagate == "dense":
        with blocks.open(index) as block:
            advance(block, stream)
    elif not blocks.is_gone(index):
        with blocks.stored(index) as block:
            advance(block, stream, stored=True)


def _report(record: Mapping[str, Any], progress: Progress) -> None:
    """Warn about a block that went wrong without failing."""
    if record["error"] is not None and record["error"] > RUNAWAY:
        progress.warn(
            f"block {record['block']}: the output differs from the dense block's by "
            f"{record['error']:.2f} times its size; the result will be poor. Ask for a lower "
            "--sparsity."
        )
    _warn_of(
        record, "fallback", "were pruned by {why}; more --num-samples would reach them", progress
    )
    _warn_of(
        record,
        "degraded",
        "have inputs that no damping makes invertible: they got Wanda's mask and no update",
        progress,
    )
    for row in record["sites"]:
        if row.get("accepted", 1.0) < ACCEPTED:
            progress.warn(
                f"{row['site']}: only {100 * row['accepted']:.0f} % of the rows are better for "
                "their update; the others were zeroed only. More --num-samples, or a higher "
                "--set prune.damping, make updates sounder."
            )


def _warn_of(record: Mapping[str, Any], key: str, what: str, progress: Progress) -> None:
    """Warn of the linears of a block whose row of the report has a key."""
    found = [row for row in record["sites"] if row.get(key)]
    if found:
        first = f"{found[0]['site']}{', ...' if len(found) > 1 else ''}"
        why = what.format(why=found[0][key])
        progress.warn(f"block {record['block']}: {len(found)} linears ({first}) {why}.")
