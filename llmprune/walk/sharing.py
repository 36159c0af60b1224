"""How the first process of a run has the others do the same to their micro-batches.

An order is a verb with what it needs; every process carries it out on its own share. Where there
are no others, nothing is sent and nothing comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from llmprune.base.errors import LlmpruneError, LostProcess
from llmprune.base.world import World

Verb = Literal["gradients", "embed", "observe", "solve", "advance", "result", "end"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the others are to do: `given` goes to the function of that name as keywords."""

    verb: Verb
    given: dict[str, Any]


class Done:
    """Ends the answer to an order, with what kept a process from carrying it out."""

    def __init__(self, error: LlmpruneError | None = None) -> None:
        self.error = error


@dataclass(frozen=True, kw_only=True)
class Others:
    """The other processes of a run, as the first one sees them."""

    world: World = field(default_factory=World)

    @contextmanager
    def asked(
        self, verb: Verb, *, take: Callable[[Any], None] = lambda piece: None, **given: Any
    ) -> Iterator[None]:
        """Send an order, do one's own part in the body, then take the answers.

        They come in the order of the processes, piece by piece.

        Raises:
            LlmpruneError: another process could not carry it out; what it says.
        """
        with self.alongside(verb, rest=take, **given):
            yield

    @contextmanager
    def alongside(
        self, verb: Verb, *, rest: Callable[[Any], None] = lambda piece: None, **given: Any
    ) -> Iterator[Callable[[], list[Any]]]:
        """Send an order and yield what returns the next piece of every other process, in order.

        `rest` takes the pieces that the body has not.

        Raises:
            LlmpruneError: another process could not carry it out; what it says.
        """
        ended: set[int] = set()
        if self.world.size > 1:
            self.world.tell(Order(verb=verb, given=given))

        def pieces() -> list[Any]:
            found = []
            for rank in range(1, self.world.size):
                found.append(self.world.answer_of(rank))
                if isinstance(found[-1], Done):
                    ended.add(rank)
                    raise found[-1].error or LostProcess(f"process {rank} has ended too early.")
            return found

        try:
            yield pieces
        except LostProcess:
            raise
        except Exception:
            with suppress(LlmpruneError):  # the first fault is the one told
                self._hear(lambda piece: None, ended)
            raise
        self._hear(rest, ended)

    def ask(self, verb: Verb, **given: Any) -> None:
        """Send an order that this process has no part in."""
        with self.asked(verb, **given):
            pass

    def _hear(self, take: Callable[[Any], None], ended: Container[int]) -> None:
        fault: LlmpruneError | None = None
        for rank in range(1, self.world.size):
            if rank in ended:
                continue
            while not isinstance(piece := self.world.answer_of(rank), Done):
                take(piece)
            fault = fault or piece.error
        if fault is not None:
            raise fault


ALONE = Others()


def await_end(world: World) -> None:
    """Wait until the first process says that the run has ended.

    Raises:
        LostProcess: it has failed, or is gone.
    """
    check_end(world.told())


def check_end(order: Order) -> None:
    """Check that a run which has ended did what it was to do.

    Raises:
        LostProcess: it did not.
    """
    if order.given["failed"]:
        raise LostProcess("the first process has stopped; its own message says why.")


@contextmanager
def leading(world: World) -> Iterator[Others]:
    """Lead the others through a run; they go their way at its end.

    After an interruption nothing is said: they stop when they see this process gone.
    """
    others = Others(world=world)
    try:
        yield others
    except LostProcess:
        raise
    except Exception:
        with suppress(LlmpruneError):
            world.tell(Order(verb="end", given={"failed": True}))
        raise
    world.tell(Order(verb="end", given={"failed": False}))
