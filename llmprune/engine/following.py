"""What every process of a run but the first does: as it is told, to its share of the micro-batches.

Nothing is decided, written or printed here. The first process surveys, cuts, proves and evaluates
as if it were alone; where that is a sum over micro-batches, these add theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import LlmpruneError, LostProcess
from llmprune.base.memory import map_large_pieces, return_freed
from llmprune.base.world import World
from llmprune.calibration.hidden import Place
from llmprune.checkpoint.skeleton import fill
from llmprune.engine.folder import open_target
from llmprune.engine.opening import Opened, with_shipment
from llmprune.engine.solving import Cutter
from llmprune.walk.backward import backward_survey
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream, advance, embed_batches
from llmprune.walk.observation import Sums, watch_batches
from llmprune.walk.sharing import Done, Order, check_end
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor


def follow(world: World, opened: Opened, out: Path) -> None:
    """Do what the first process tells, until it says that the run has ended.

    Raises:
        LostProcess: the first process has failed, or another has ended; so does this one.
    """
    map_large_pieces()
    mine = _Share(world, opened, out)
    while True:
        order: Order = world.told()
        if order.verb == "end":
            check_end(order)
            return
        fault = None
        try:
            for piece in getattr(mine, order.verb)(**order.given):
                world.answer(piece)
        except LostProcess:
            raise
        except LlmpruneError as error:
            fault = error
        world.answer(Done(fault))
        return_freed()


class _Share:
    """One process's micro-batches; its methods are the verbs of orders, and yield the answer."""

    def __init__(self, world: World, opened: Opened, out: Path) -> None:
        self.world = world
        self.opened = opened
        self.out = out
        self.modules_of_result: Streamed = opened.blocks
        self.stream: Stream | None = None

    def embed(
        self,
        tokens_NT: Tensor,
        micro_batch: int,
        place: Place,
        folder: Path | None,
        threads: int,
    ) -> Iterable[Any]:
        """Begin with new tokens; what was held before is let go."""
        self.close()
        torch.set_num_threads(threads)
        batches = tokens_NT.split(micro_batch)
        self.stream = embed_batches(
            self.opened.blocks,
            batches[self.world.share(len(batches))],
            place=place,
            folder=self._own(folder),
        )
        return ()

    def gradients(
        self,
        tokens_NT: Tensor,
        needs: Sequence[str],
        linears: Sequence[Sequence[str]],
        place: Place,
        folder: Path | None,
        threads: int,
    ) -> Iterable[Any]:
        """Take gradients of this process's sequences; the answer is a piece for every block with
        linears to look at, the last block's first: what they add, or nothing.
        """
        self.close()
        torch.set_num_threads(threads)
        mine_NT = tokens_NT[self.world.share(len(tokens_NT))]
        if not len(mine_NT):
            lowest = min(index for index, names in enumerate(linears) if names)
            yield from [None] * (len(linears) - lowest)
            return
        for _, stats in backward_survey(
            *(self.opened.blocks, mine_NT, needs, linears.__getitem__),
            place=place,
            folder=self._own(folder),
        ):
            yield stats

    def observe(
        self, index: int, needs: Mapping[str, tuple[str, ...]], dense: bool
    ) -> Iterable[Any]:
        """Observe a block of the source; the answer is what `Sums.merge` takes."""
        assert self.stream is not None
        sums = Sums(needs, keep=True)
        if len(self.stream):
            with self.opened.blocks.open(index) as block:
                watch_batches(block, self.stream, needs, sums, dense=dense)
        return sums.pieces()

    def solve(self, index: int, cutter: Cutter) -> Iterable[Any]:
        """Solve the groups of a block of the source that are sent to this process alone."""
        jobs = self.world.sent()
        if jobs:
            with self.opened.blocks.open(index) as block:
                for job in jobs:
                    yield job.on(block.device).done(cutter, block)

    def advance(self, index: int, stored: bool, values: Mapping[str, Tensor]) -> Iterable[Any]:
        """Advance through a block whose values were sent."""
        assert self.stream is not None
        home = self.modules_of_result if stored else self.opened.blocks
        with _holding(home, index, values) as block:
            advance(block, self.stream)
        return ()

    def result(self, counts: Mapping[str, int]) -> Iterable[Any]:
        """Make modules of the result's sizes, as the first process has them."""
        plan = with_shipment(self.opened, replace(self.opened.plan, counts=counts))
        self.modules_of_result = open_target(self.opened, plan, self.out).result
        return ()

    def _own(self, folder: Path | None) -> Path | None:
        """Return this process's folder for hidden states, beside the first one's."""
        return None if folder is None else folder.with_name(f"{folder.name}-{self.world.rank}")

    def close(self) -> Iterable[Any]:
        """Let the micro-batches go."""
        if self.stream is not None:
            self.stream.hidden.close()
            self.stream = None
        return ()


@contextmanager
def _holding(home: Streamed, index: int, values: Mapping[str, Tensor]) -> Iterator[Block]:
    """Put values into the modules of a block, on the device, for as long as the body runs."""
    module = home.modules[index]
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    try:
        fill(module, {name: value.to(home.device) for name, value in values.items()})
        yield Block(
            index=index,
            prefix=home.skeleton.prefix(index),
            module=module,
            anatomy=home.anatomy(index),
            device=home.device,
        )
    finally:
        fill(module, before)
