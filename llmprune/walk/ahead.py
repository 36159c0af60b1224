"""The next block's weights are read, and moved to an accelerator, while a block computes.

On a host a block's tensors are mapped, and computing has all cores: there the thread only sees to
it that their pages have been read from the disk (or the Hub), which holds no memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from llmprune.base.timeline import Timeline
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor

PAGE = 4096
Ready = dict[str, "Tensor"]


class Ahead:
    """Reads one block ahead of the one in use, never more."""

    def __init__(self, blocks: Streamed, timeline: Timeline) -> None:
        self._blocks = blocks
        self._timeline = timeline
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._next: tuple[int, Future[Ready | None]] | None = None

    def begin(self, index: int) -> None:
        """Begin to read a block, unless it is being read or there is none."""
        if index >= len(self._blocks) or (self._next and self._next[0] == index):
            return
        self.take(index)
        self._next = index, self._pool.submit(self._read, index)

    def take(self, index: int) -> Ready | None:
        """Return the parameters of a block on the device, where they were moved there.

        Another block that was read is let go. Waits for the reading.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        if self._next is None:
            return None
        known, reading = self._next
        self._next = None
        with self._timeline.span("wait for read", index):
            if known != index:
                reading.exception()  # it ends before another begins
                return None
            return _owned(reading.result())

    def _read(self, index: int) -> Ready | None:
        blocks = self._blocks
        with self._timeline.span("read ahead", index):
            prefix = blocks.skeleton.prefix(index)
            found = blocks.source.get(blocks.naming.disk_names(prefix))
            if blocks.device.type != "cuda":
                touch(found)
                return None
        with self._timeline.span("move ahead", index):
            return _moved(blocks, found)


def touch(tensors: Mapping[str, Tensor]) -> None:
    """Read one byte of every page of mapped tensors, so that the pages are in memory."""
    import torch

    for value in tensors.values():
        if value.numel():
            value.reshape(-1).view(torch.uint8)[::PAGE].max()


def _moved(blocks: Streamed, found: Mapping[str, Tensor]) -> Ready:
    """Return parameters on the device, moved there by a stream of this thread's own."""
    import torch

    params = blocks.naming.to_params(dict(found))
    stream = torch.cuda.Stream(blocks.device)
    ready: Ready = {}
    with torch.no_grad(), torch.cuda.stream(stream):
        for name in list(params):
            value = params.pop(name).pin_memory().to(blocks.device, non_blocking=True)
            ready[name] = value.to(blocks.dtype if value.is_floating_point() else value.dtype)
    stream.synchronize()
    return ready


def _owned(ready: Ready | None) -> Ready | None:
    """Return tensors that another stream made; they are not reused before this one is done."""
    import torch

    for value in (ready or {}).values():
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
    return ready
