"""Choosing tokens as the definition reads: look at all that is left, drop one, and again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def encode(word: str, merges: Sequence[tuple[str, str]]) -> list[str]:
    """Merge a word: the earliest merge that applies anywhere, at its first place, until none."""
    parts = list(word)
    while True:
        pairs = list(pairwise(parts))
        possible = [merge for merge in merges if merge in pairs]
        if not possible:
            return parts
        place = pairs.index(possible[0])
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def rarest_dropped(
    counts: Sequence[int], parents: Mapping[int, Sequence[int]], pinned: set[int], size: int
) -> list[int]:
    """Drop the rarest id that no other needs, the last of equals, and pass its count on."""
    worth = list(counts)
    kept = list(range(len(counts)))
    while len(kept) > size:
        used = {part for index in kept for part in parents.get(index, ())}
        free = [index for index in kept if index not in used | pinned]
        if not free:
            break
        rarest = min(reversed(free), key=lambda index: worth[index])
        kept.remove(rarest)
        for part in parents.get(rarest, ()):
            worth[part] += worth[rarest]
    return kept
