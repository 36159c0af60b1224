"""Watching a block: statistics of what its linears read, once per tap, in one forward.

The multiplication itself is watched, not a module: a linear that is a slice of a stacked parameter
(one expert) is seen like any other. Legend: T tokens, I inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.anatomy import EXPERT, Anatomy
from llmprune.arch.products import Products, slices
from llmprune.base.errors import NumericalError, UnsupportedModel
from llmprune.base.memory import keeping_pieces
from llmprune.calibration.replay import call
from llmprune.stats import STATISTICS
from llmprune.stats.keeping import joined
from llmprune.stats.residual import ResidualSums
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream
from llmprune.walk.sharing import ALONE

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


class Sums:
    """Statistics of taps, summed over micro-batches in their order.

    What is as small as a row of columns is summed for each micro-batch by itself, then added: so
    the same bits come out however many processes share the micro-batches. With `keep` these sums
    are kept apart, to be sent. Matrices are summed as they come.
    """

    def __init__(self, needs: Mapping[str, tuple[str, ...]], *, keep: bool = False) -> None:
        self.keep = keep
        self.residual = ResidualSums()
        self._whole = {tap: _accumulators(names, small=False) for tap, names in needs.items()}
        self._small = {tap: _accumulators(names, small=True) for tap, names in needs.items()}
        self._batch: dict[str, dict[str, Any]] = {}
        self._kept: list[tuple[dict[str, dict[str, Any]], ResidualSums]] = []
        self._needs = needs
        self.begin()

    def begin(self) -> None:
        """Begin a micro-batch."""
        self._batch = {tap: _accumulators(names, small=True) for tap, names in self._needs.items()}
        self._moved = ResidualSums()

    def read(self, tap: str, value: Tensor) -> None:
        """Add what a tap carries."""
        for found in (self._whole, self._batch):
            for accumulator in found.get(tap, {}).values():
                accumulator.update(value)

    def move(self, hidden_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add what a block reads and returns."""
        self._moved.add(hidden_BTD, output_BTD)

    def end(self) -> None:
        """End a micro-batch: its sums are added, or kept."""
        if self.keep:
            self._kept.append((self._batch, self._moved))
        else:
            self._add(self._batch, self._moved)
        self.begin()

    def pieces(self) -> Iterator[Any]:
        """Yield what `merge` adds to the sums of the first process, matrices one at a time."""
        yield from self._kept
        for tap, found in self._whole.items():
            for name, accumulator in found.items():
                yield tap, name, accumulator

    def merge(self, piece: Any) -> None:
        """Add a piece of another process's sums."""
        if len(piece) == 2:
            self._add(*piece)
        else:
            tap, name, accumulator = piece
            self._whole[tap][name].merge(accumulator)

    def result(self) -> dict[str, Stats]:
        """Return the statistics by tap."""
        return {tap: joined(found) for tap, found in self.by_tap().items()}

    def by_tap(self) -> dict[str, dict[str, Any]]:
        """Return the accumulators by tap and statistic."""
        return {
            tap: {name: (self._whole[tap] | self._small[tap])[name] for name in names}
            for tap, names in self._needs.items()
        }

    def _add(self, batch: Mapping[str, Mapping[str, Any]], moved: ResidualSums) -> None:
        self.residual.merge(moved)
        for tap, found in batch.items():
            for name, accumulator in found.items():
                self._small[tap][name].merge(accumulator)


def _accumulators(names: Iterable[str], *, small: bool) -> dict[str, Any]:
    return {
        name: STATISTICS[name].accumulator() for name in names if STATISTICS[name].is_small == small
    }


def observe(
    block: Block,
    stream: Stream,
    needs: Mapping[str, tuple[str, ...]],
    *,
    dense: bool,
    sums: Sums | None = None,
) -> Seen:
    """Collect the statistics that each tap needs over all micro-batches, of all processes.

    The forward stops at the last tap: what follows it is not needed. The first micro-batch runs to
    its end, and its output is kept for the error; with `dense` all do, and replace the hidden
    states. Other processes observe the block as the source has it. `sums` are new ones of the same
    needs, for a caller that keeps them.

    Raises:
        NumericalError: a tap reads NaN or infinity; names tap and block.
    """
    sums = Sums(needs) if sums is None else sums
    others = stream.others if needs or dense else ALONE
    with others.asked(
        "observe", index=block.index, needs=dict(needs), dense=dense, take=sums.merge
    ):
        watched = watch_batches(block, stream, needs, sums, dense=dense)
    assert watched is not None
    first, counts, influence = watched
    stats = sums.result()
    _check_read(block, stats, counts)
    _check_finite(block, stats)
    moved = sums.residual.result() if dense else None
    return Seen(stats=stats, dense_output=first, influence=influence, residual=moved)


def watch_batches(
    block: Block,
    stream: Stream,
    needs: Mapping[str, tuple[str, ...]],
    sums: Sums,
    *,
    dense: bool,
) -> tuple[Tensor, Counter[str], float] | None:
    """Add what this process's micro-batches show to the sums.

    Returns the output of the first, how often it read each tap, and the block's influence; None
    where there is no micro-batch.
    """
    pointers = _pointers(block)
    found: tuple[Tensor, Counter[str], float] | None = None
    wanted = stream.arguments if needs or dense else stream.arguments[:1]
    with torch.no_grad(), keeping_pieces():
        for batch, arguments in enumerate(wanted):
            hidden = stream.hidden.get(batch, block.device)
            before = None if dense or found is None else found[1]
            watch = _Watch(pointers, sums.read, needs, before)
            try:
                with Products(watch):
                    output = call(block.module, hidden, arguments[block.index])
            except _Complete:
                sums.end()
                continue
            if found is None:
                found = output.clone(), watch.counts, _influence(hidden, output)
            if dense:
                sums.move(hidden, output)
                stream.hidden.set(batch, output)
            sums.end()
    return found


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
