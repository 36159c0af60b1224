"""Reconstruction: the kept weights of a block are trained until it gives what the dense one gave.

"halves" takes attention and feed-forward one after the other, whatever a family calls them: a half
is a child module of the block that holds pruned linears. "block" trains all of it at once, towards
what the dense model gives here, so that it also makes up for errors of the blocks before.
Legend: B sequences of a micro-batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.repair.fitting import Fitted, Goal, Pace, fit, output_of
from llmprune.repair.types import Repair, Work
from llmprune.solver.types import Fact
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from llmprune.calibration.hidden import HiddenStates

OPTIONS = {"epochs": 4.0, "learning_rate": 0.03, "sequences": 2.0}


@dataclass(frozen=True, kw_only=True)
class Half:
    """A part that is trained by itself, for its `module`'s output or (none) for the block's."""

    name: str
    module: str | None
    linears: tuple[str, ...]


def watch_halves(
    block: Block, stream: Stream, options: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Return copies of the dense parameters.

    They take up less than outputs of all sequences would; these are computed when they are wanted.
    """
    return {name: param.detach().clone() for name, param in block.module.named_parameters()}


def repair_halves(work: Work) -> dict[str, Fact]:
    """Train every half of a cut block in the order of the forward.

    A half is to give what the dense half gave; the last one is to make the block give what the
    dense block gives, so it also makes up for what the halves before it lost. Targets of one half
    are held at a time.

    Source: A Free Lunch in LLM Compression: Revisiting Retraining after Pruning.
    """
    return by_halves(work, lambda keep, goal: fit(work.block, keep, goal, pace_of(work)))


def by_halves(
    work: Work, train: Callable[[Mapping[str, Tensor], Goal], Fitted], *, whole: bool = False
) -> dict[str, Fact]:
    """Call `train` with the masks and the goal of every half, or of the `whole` block at once.

    Goals are what the dense block gives of the same inputs. Returns what the report says.
    """
    one = Half(name="block", module=None, linears=tuple(work.keep))
    halves = [one] if whole else halves_of(work.block, work.stream, work.keep)
    facts: dict[str, Fact] = {}
    for half in halves:
        target = _dense_outputs(work, half.module)
        try:
            goal = Goal(stream=work.stream, target=target, part=half.module)
            keep = {name: work.keep[name] for name in half.linears}
            facts.update(_facts(half.name, train(keep, goal)))
        finally:
            target.close()
    return facts


def watch_block(block: Block, stream: Stream, options: Mapping[str, float], seed: int) -> None:
    """Look at nothing: the dense model's outputs are the engine's."""


def repair_block(work: Work) -> dict[str, Fact]:
    """Train all kept weights of a cut block towards what the dense model gives at this place."""
    assert work.dense is not None
    goal = Goal(stream=work.stream, target=work.dense)
    return _facts("block", fit(work.block, work.keep, goal, pace_of(work)))


def pace_of(work: Work) -> Pace:
    """Return the pace that options name."""
    return Pace(
        epochs=work.options["epochs"],
        rate=work.options["learning_rate"],
        sequences=int(work.options["sequences"]),
        seed=work.seed,
    )


def halves_of(block: Block, stream: Stream, keep: Mapping[str, Tensor]) -> list[Half]:
    """Return the halves with pruned linears, in the order in which the block calls them.

    Linears that are children of the block themselves, and children that are not called exactly
    once, train with the last half, whose goal is the block's output.
    """
    children: dict[str, list[str]] = {}
    for linear in keep:
        children.setdefault(block.anatomy.linears[linear].param.split(".")[0], []).append(linear)
    called = _calls(block, stream, [name for name in children])
    first = [name for name in called if called.count(name) == 1 and _holds_parts(block, name)]
    rest = [linear for name, linears in children.items() if name not in first for linear in linears]
    halves = [Half(name=name, module=name, linears=tuple(children[name])) for name in first]
    if rest:
        return [*halves, Half(name="rest", module=None, linears=tuple(rest))]
    return [*halves[:-1], Half(name=halves[-1].name, module=None, linears=halves[-1].linears)]


def _holds_parts(block: Block, name: str) -> bool:
    """Tell whether a child of a block is more than a single linear."""
    return any(True for _ in block.module.get_submodule(name).children())


def _calls(block: Block, stream: Stream, names: list[str]) -> list[str]:
    """Return which children one forward of the first micro-batch calls, in order."""
    calls: list[str] = []

    def watching(name: str) -> Any:
        return lambda module, args: calls.append(name)

    hooks = [
        block.module.get_submodule(name).register_forward_pre_hook(watching(name)) for name in names
    ]
    try:
        with torch.no_grad():
            hidden_BTD = stream.hidden.get(0, block.device)
            output_of(block, hidden_BTD, stream.arguments[0][block.index], None)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _dense_outputs(work: Work, part: str | None) -> HiddenStates:
    """Return what a part gives of all micro-batches in the dense block."""
    found = work.stream.hidden.beside("targets")
    with torch.no_grad(), _exchanged(work.block, work.seen):
        for batch, arguments in enumerate(work.stream.arguments):
            hidden_BTD = work.stream.hidden.get(batch, work.block.device)
            found.append(output_of(work.block, hidden_BTD, arguments[work.block.index], part))
    return found


@contextmanager
def _exchanged(block: Block, dense: Mapping[str, Tensor]) -> Iterator[None]:
    """Put dense parameters in place for a while."""
    params = {name: block.module.get_parameter(name) for name in dense}
    sparse = {name: param.data for name, param in params.items()}
    try:
        for name, param in params.items():
            param.data = dense[name]
        yield
    finally:
        for name, param in params.items():
            param.data = sparse[name]


def _facts(name: str, fitted: Fitted) -> dict[str, Fact]:
    """Return what the report says of a part."""
    return {
        f"{name}.error_before": fitted.before,
        f"{name}.error_after": fitted.after,
        f"{name}.accepted": fitted.accepted,
    }


def passes(options: Mapping[str, float]) -> float:
    """Return what training costs in forwards: a step is three of them, and errors are looked at."""
    return 3 * options["epochs"] + 1


HALVES = Repair(
    watch=watch_halves,
    fn=repair_halves,
    passes=passes,
    paper="A Free Lunch in LLM Compression: Revisiting Retraining after Pruning",
    options=OPTIONS,
)
BLOCK = Repair(
    watch=watch_block,
    fn=repair_block,
    passes=passes,
    paper="A Free Lunch in LLM Compression: Revisiting Retraining after Pruning, scope block",
    options=OPTIONS,
    dense=True,
)
