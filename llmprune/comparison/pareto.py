"""Which points no other one beats in both of two numbers, each the better the smaller it is."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of points that no other one dominates, by rising first number.

    A point dominates another one if it is nowhere larger and somewhere smaller. Of equal points the
    first stands for all.

    >>> front([(3, 1), (1, 3), (2, 2), (3, 2), (2, 2)])
    [1, 2, 0]
    """
    found: list[int] = []
    least = float("inf")
    for place in sorted(range(len(points)), key=lambda place: (*points[place], place)):
        if points[place][1] < least:
            found.append(place)
            least = points[place][1]
    return found
