"""The processes of one run: which this one is, which share is its, and messages between them.

Processes are started by torchrun or accelerate, and found by accelerate; alone there is one. The
first leads: it tells all others the same, and hears from them one after another. Messages go over
gloo and lie on the host, so they need no device and wait as long as a block may take.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import LostProcess, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=24)  # a survey on the first process may take long, not for ever
PIECE = 2**30  # bytes of a message that are sent at a time
LARGE = 2**16  # bytes from which a tensor is sent as it lies in memory


@dataclass(frozen=True, kw_only=True)
class World:
    """A process among those of a run: the first has rank 0.

    >>> World(rank=1, size=2).share(5), World().share(5)
    (slice(3, 5, None), slice(0, 5, None))
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def share(self, count: int) -> slice:
        """Return which of `count` items in order are this process's.

        Shares are contiguous, and earlier processes have one more where they cannot be equal.
        """
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def tell(self, message: Any) -> None:
        """Send what can be pickled from the first process to all others; tensors arrive on the
        host.

        Raises:
            LostProcess: one of them has ended.
        """
        import torch.distributed as dist

        if self.size > 1:
            _send(message, lambda part: dist.broadcast(part, 0, group=self.group))

    def told(self) -> Any:
        """Wait for what the first process tells.

        Raises:
            LostProcess: it has ended.
        """
        import torch.distributed as dist

        return _receive(lambda part: dist.broadcast(part, 0, group=self.group))

    def answer(self, message: Any) -> None:
        """Send what can be pickled to the first process, which must ask for it.

        Raises:
            LostProcess: it has ended.
        """
        self.send(0, message)

    def send(self, rank: int, message: Any) -> None:
        """Send what can be pickled to one process, which must wait for it.

        Raises:
            LostProcess: it has ended.
        """
        import torch.distributed as dist

        _send(message, lambda part: dist.send(part, rank, group=self.group))

    def sent(self) -> Any:
        """Wait for what the first process sends to this one alone.

        Raises:
            LostProcess: it has ended.
        """
        return self.answer_of(0)

    def answer_of(self, rank: int) -> Any:
        """Wait for a message of another process.

        Raises:
            LostProcess: it has ended.
        """
        import torch.distributed as dist

        return _receive(lambda part: dist.recv(part, rank, group=self.group))


def open_world(*, cpu: bool) -> World:
    """Return this process among those that torchrun or accelerate started; `cpu` leaves GPUs alone.

    Without either there is one process, and nothing is opened.
    """
    if num_processes() < 2:
        return World()
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank=state.process_index, size=state.num_processes, group=group)


def num_processes() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Return how many of them run on this computer, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes())))


def is_first() -> bool:
    """Tell whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _reached() -> Iterator[None]:
    """Say what to do where a process cannot be reached.

    Raises:
        LostProcess: it has ended, or has not answered for long.
    """
    try:
        yield
    except RuntimeError as error:  # all that gloo raises
        raise LostProcess(
            f"another process of this run has ended or does not answer ({first_line(error)}). Its "
            "own message is above. All stop; the same command with as many processes resumes."
        ) from error


def _send(message: Any, passed: Callable[[Tensor], Any]) -> None:
    """Send a message part by part: how many there are, their sizes, then what they hold."""
    import torch

    with _reached():
        parts = _packed(message)
        passed(torch.tensor([len(parts)]))
        passed(torch.tensor([len(part) for part in parts]))
        for part in parts:
            for piece in part.split(PIECE):
                passed(piece)


def _receive(filled: Callable[[Tensor], Any]) -> Any:
    """Return the message that `_send` sends; `filled` waits for what goes into a tensor."""
    import torch

    with _reached():
        count = torch.zeros(1, dtype=torch.int64)
        filled(count)
        sizes = torch.zeros(int(count), dtype=torch.int64)
        filled(sizes)
        parts = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()]
        for part in parts:
            for piece in part.split(PIECE):
                filled(piece)
    return _unpacked(parts)


class _Pickler(pickle.Pickler):
    """Pickles tensors as the bytes that they are, wherever they lie."""

    def reducer_override(self, value: Any) -> Any:
        import torch

        if not isinstance(value, torch.Tensor):
            return NotImplemented
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        held: Any = flat.numpy()
        return _tensor, (pickle.PickleBuffer(held), value.dtype, tuple(value.shape))


def _packed(message: Any) -> list[Tensor]:
    """Return a message as bytes on the host: what is pickled, then large tensors, not copied."""
    import torch

    parts: list[Tensor] = []

    def is_small(data: pickle.PickleBuffer) -> bool:
        held = data.raw()
        if held.nbytes >= LARGE:
            parts.append(torch.frombuffer(held, dtype=torch.uint8))
        return held.nbytes < LARGE

    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5, buffer_callback=is_small).dump(message)
    return [torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8), *parts]


def _unpacked(parts: Sequence[Tensor]) -> Any:
    """Return the message that parts hold; they came from a process of the same run."""
    held: list[Any] = [part.numpy() for part in parts]
    return pickle.loads(held[0], buffers=held[1:])


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that bytes hold; it shares their memory where that may be written to."""
    import torch

    held = bytearray(data) if isinstance(data, bytes) else data
    if not len(held):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(held, dtype=dtype).reshape(shape)
