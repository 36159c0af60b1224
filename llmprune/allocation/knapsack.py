"""The least sum of errors under a budget, exactly, by dynamic programming over whole units.

Legend: K units of one item, B units of the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_UNITS = 2**15  # of all items together: the work grows with their square
_TABLE = 2**28  # choices remembered, of two bytes


def cheapest(errors: Sequence[Floats], budget: int) -> list[int]:
    """Return how many units every item gives, so that `budget` are given and errors sum to least.

    `errors[l][k]` is the error of item l when it gives k units; curves need not be convex. Of equal
    sums the one in which later items give fewer is taken. The work is the product of the budget and
    the units of all items, the memory two bytes times the budget and the number of items.

    Raises:
        ValueError: the items hold fewer units, or an error is no number.

    >>> flat, early = np.array([0.0, 1.0, 3.0, 6.0]), np.array([0.0, 4.0, 4.2, 4.4])
    >>> cheapest([flat, early, flat], 5)
    [1, 3, 1]
    """
    if not 0 <= budget <= sum(len(each) - 1 for each in errors):
        raise ValueError(f"{budget} units are asked of {[len(each) - 1 for each in errors]}")
    if any(np.isnan(each).any() for each in errors):
        raise ValueError("an error is no number")
    best_B = np.full(budget + 1, np.inf)
    best_B[0] = 0.0
    chosen = np.zeros((len(errors), budget + 1), dtype=np.uint16)
    reach = 0
    for choice_B, error_K in zip(chosen, errors, strict=True):
        before_B, best_B = best_B, np.full(budget + 1, np.inf)
        for units, error in enumerate(error_K[: budget + 1].tolist()):
            stop = min(budget, reach + units) + 1
            sum_B, now_B = before_B[: stop - units] + error, best_B[units:stop]
            better_B = sum_B < now_B
            np.copyto(now_B, sum_B, where=better_B)
            np.copyto(choice_B[units:stop], units, where=better_B)
        reach = min(budget, reach + len(error_K) - 1)
    given, left = [], budget
    for choice_B in chosen[::-1]:
        given.append(int(choice_B[left]))
        left -= given[-1]
    return given[::-1]


def cheapest_shares(
    errors: Sequence[Callable[[Floats], Floats]],
    sizes: Sequence[int],
    share: float,
    *,
    at_most: float,
) -> list[float]:
    """Return the share that every item gives, so that `share` of all is given at the least error.

    `errors[l]` maps shares from 0 to 1 to errors. Shares are multiples of a unit that is the same
    number of weights everywhere, and small enough for the memory at hand.

    >>> found = cheapest_shares([lambda s: s**2, lambda s: 3 * s**2], [8, 8], 0.5, at_most=1.0)
    >>> [round(value, 2) for value in found]
    [0.75, 0.25]
    """
    total = sum(sizes)
    units = min(_UNITS, _TABLE // max(1, len(sizes)), total)
    unit = total / units
    most = [min(2**16 - 1, int(at_most * size / unit + 1e-9)) for size in sizes]
    tables = [
        error(np.minimum(np.arange(num + 1) * unit / size, 1.0))
        for error, num, size in zip(errors, most, sizes, strict=True)
    ]
    given = cheapest(tables, min(round(share * units), sum(most)))
    return [num * unit / size for num, size in zip(given, sizes, strict=True)]
