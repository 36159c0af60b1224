"""Watching a block: statistics of what its linears read, once per tap, in one forward.

The multiplication itself is watched, not a module: a linear that is a slice of a stacked parameter
(one expert) is seen like any other. Legend: T tokens, I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.anatomy import EXPERT, Anatomy
from llmprune.arch.products import Products, slices
from llmprune.base.errors import NumericalError, UnsupportedModel
from llmprune.calibration.replay import call
from llmprune.stats import STATISTICS
from llmprune.stats.residual import ResidualSums
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Statistics by tap, and the dense output of the first micro-batch.

    `influence` is the share of that output's energy that the block itself adds to its input, a mean
    over tokens: near 0 for a block that hardly changes what passes through it. `residual` says more
    of that, where all micro-batches ran to their end.
    """

    stats: Mapping[str, Stats]
    dense_output: Tensor
    influence: float
    residual: Stats | None = None


class _Complete(Exception):
    """Leaves a block once every tap has been read."""


class _Watch:
    """Hands the left operand of watched products to a function; leaves after the last needed one.

    That is known from `before`, how often the first micro-batch read each tap: a block may multiply
    with a matrix piece by piece. Without it the forward runs to its end.
    """

    def __init__(
        self,
        taps: Mapping[int, str],
        read: Callable[[str, Tensor], None],
        needed: Iterable[str],
        before: Counter[str] | None,
    ) -> None:
        self.taps = taps
        self.read = read
        self.leave = before is not None
        self.counts: Counter[str] = Counter()
        self.due = {tap: max(1, (before or self.counts)[tap]) for tap in needed}

    def __call__(self, left: Tensor, right: Tensor) -> None:
        if right.data_ptr() not in self.taps:
            return
        for one, matrix in slices(left, right):
            if (tap := self.taps.get(matrix.data_ptr())) is not None:
                self.read(tap, one)
                self.counts[tap] += 1
                if self.counts[tap] == self.due.get(tap):
                    del self.due[tap]
        if self.leave and not self.due:
            raise _Complete


def observe(
    block: Block, stream: Stream, needs: Mapping[str, tuple[str, ...]], *, dense: bool
) -> Seen:
    """Collect the statistics that each tap needs over all micro-batches.

    The forward stops at the last tap: what follows it is not needed. The first micro-batch runs to
    its end, and its output is kept for the error; with `dense` all do, and replace the hidden
    states.

    Raises:
        NumericalError: a tap reads NaN or infinity; names tap and block.
    """
    accumulators = {
        tap: {name: STATISTICS[name].accumulator() for name in names}
        for tap, names in needs.items()
    }

    def read(tap: str, value: Tensor) -> None:
        for accumulator in accumulators.get(tap, {}).values():
            accumulator.update(value)

    pointers = _pointers(block)
    first: Tensor | None = None
    counts: Counter[str] | None = None
    influence, residual = 0.0, ResidualSums()
    wanted = stream.arguments if needs or dense else stream.arguments[:1]
    with torch.no_grad():
        for batch, arguments in enumerate(wanted):
            hidden = stream.hidden.get(batch, block.device)
            watch = _Watch(pointers, read, needs, None if dense else counts)
            try:
                with Products(watch):
                    output = call(block.module, hidden, arguments[block.index])
            except _Complete:
                continue
            if first is None:
                first, counts = output.clone(), watch.counts
                influence = _influence(hidden, output)
            if dense:
                residual.add(hidden, output)
                stream.hidden.set(batch, output)
    assert first is not None and counts is not None
    stats = {tap: _merge(each) for tap, each in accumulators.items()}
    _check_read(block, stats, counts)
    _check_finite(block, stats)
    moved = residual.result() if dense else None
    return Seen(stats=stats, dense_output=first, influence=influence, residual=moved)


def in_rounds(
    anatomy: Anatomy, needs: Mapping[str, tuple[str, ...]], room: int
) -> list[dict[str, tuple[str, ...]]]:
    """Split what taps need into rounds whose statistics take up no more than `room` bytes each.

    A tap that needs more has a round of its own. There is one round at least.
    """
    rounds: list[dict[str, tuple[str, ...]]] = [{}]
    used = 0
    for tap in anatomy.taps:
        if tap.name in needs:
            size = statistics_bytes(anatomy, {tap.name: needs[tap.name]})
            if rounds[-1] and used + size > room:
                rounds.append({})
                used = 0
            rounds[-1][tap.name] = needs[tap.name]
            used += size
    return rounds


def statistics_bytes(anatomy: Anatomy, needs: Mapping[str, tuple[str, ...]]) -> int:
    """Return what the statistics of taps take up."""
    widths = {tap.name: anatomy.linears[tap.readers[0]].shape[1] for tap in anatomy.taps}
    return sum(
        STATISTICS[name].num_bytes(widths[tap])
        for tap, names in needs.items()
        for name in names
        if STATISTICS[name].observe in ("tap", "block_gradient", "backward")
    )


def _influence(hidden_BTD: Tensor, output_BTD: Tensor) -> float:
    """Return the mean over tokens of ||output - input||^2 / ||output||^2."""
    added_BT = (output_BTD.float() - hidden_BTD.float()).square().sum(dim=-1)
    whole_BT = output_BTD.float().square().sum(dim=-1)
    return float((added_BT / whole_BT.clamp_(min=torch.finfo(torch.float32).tiny)).mean())


def _pointers(block: Block) -> dict[int, str]:
    """Return the address of the matrix that each tap's first reader multiplies with."""
    found = {}
    for tap in block.anatomy.taps:
        linear = block.anatomy.linears[tap.readers[0]]
        param = block.module.get_parameter(linear.param)
        found[linear.stored(param.data).data_ptr()] = tap.name
    return found


def _check_read(block: Block, stats: Mapping[str, Stats], counts: Counter[str]) -> None:
    """Raise where a tap was never read; single experts may go without tokens, not all of them.

    `counts` says how often the first micro-batch read every tap, also those of other rounds.
    """
    readers = {tap.name: block.anatomy.linears[tap.readers[0]] for tap in block.anatomy.taps}
    experts = {
        tap
        for tap, linear in readers.items()
        if linear.expert is not None or EXPERT.search(linear.name)
    }
    any_expert = any(counts[tap] for tap in experts)
    for tap in block.anatomy.taps:
        routed = tap.name in experts and any_expert
        if tap.name in stats and not stats[tap.name].num_tokens and not routed:
            raise UnsupportedModel(
                f"tap {tap.name!r} of block {block.index} was never read: this transformers "
                f"multiplies with {block.prefix}{tap.readers[0]} in a way that is not watched. "
                "Install the version that constraints.txt names."
            )


def _merge(accumulators: Mapping[str, Any]) -> Stats:
    """Join the statistics of one tap."""
    results = [accumulator.result() for accumulator in accumulators.values()]
    values = {key: value for result in results for key, value in result.values.items()}
    return Stats(num_tokens=results[0].num_tokens, values=values)


def _check_finite(block: Block, stats: Mapping[str, Stats]) -> None:
    """Raise where a statistic is not finite."""
    for tap, each in stats.items():
        for name, value in each.values.items():
            low, high = torch.aminmax(value)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise NumericalError(
                    f"activation {tap!r} of block {block.index} holds NaN or infinity ({name}). In "
                    "float16 large activations overflow: use --dtype bfloat16 or float32; "
                    "otherwise the checkpoint is damaged."
                )
