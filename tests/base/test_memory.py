"""What the allocator is told while micro-batches pass, and after them."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune.base import memory


class Libc:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.told.append(("mallopt", str(option), str(value)))
        return 1

    def malloc_trim(self, pad: int) -> int:
        self.told.append(("trim",))
        return 1


@pytest.fixture
def libc(monkeypatch: pytest.MonkeyPatch) -> Libc:
    found = Libc()
    monkeypatch.setattr(memory, "_libc", lambda: found)
    monkeypatch.setattr(memory, "_ours", set())
    return found


def test_a_loop_keeps_what_it_frees_and_gives_it_back(libc: Libc) -> None:
    memory.map_large_pieces()
    mapped = list(libc.told)
    libc.told.clear()
    with pytest.raises(ValueError, match="amid the loop"), memory.keeping_pieces():
        assert ("mallopt", "-4", "0") in libc.told  # nothing is mapped on its own
        libc.told.clear()
        raise ValueError("amid the loop")
    assert libc.told == [*mapped, ("trim",)]


def test_an_allocator_of_somebody_else_is_left_alone(libc: Libc) -> None:
    with memory.keeping_pieces():
        pass
    assert not libc.told


def test_a_library_without_such_options_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = object()
    ours: set[bool] = set()
    monkeypatch.setattr(memory, "_libc", lambda: other)
    monkeypatch.setattr(memory, "_ours", ours)
    memory.map_large_pieces()
    with memory.keeping_pieces():
        memory.return_freed()
    assert not ours
