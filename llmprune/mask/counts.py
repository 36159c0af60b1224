"""How many weights to prune: exact arithmetic, so that 0.29 of 100 is 29 and totals add up."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor

from llmprune.base.errors import RecipeError


def exact_sparsity(value: float | str | Fraction | Decimal) -> Fraction:
    """Return the fraction that a number means in decimal: 0.29 is 29/100, not its binary neighbour.

    Raises:
        RecipeError: not a number between 0 and 1.

    >>> exact_sparsity(0.29) * 100
    Fraction(29, 1)
    """
    try:
        exact = value if isinstance(value, Fraction) else Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(-1)
    if not 0 <= exact <= 1:
        raise RecipeError(
            f"sparsity: {value!r} is not a fraction between 0 and 1. Sparsity is the share of "
            "weights removed; type for example 0.5."
        )
    return exact


def round_half_up(x: Fraction) -> int:
    """Return the nearest integer; halves go up.

    >>> round_half_up(Fraction(5, 2))
    3
    """
    return math.floor(x + Fraction(1, 2))


def spread(total: int, num_groups: int) -> Tensor:
    """Split a count over groups, int64 (G,): shares differ by one at most and sum to the total.

    The last groups take the remainder. No share falls when the total grows, so a row that is
    pruned further never gets a weight back.

    >>> spread(6, 4)
    tensor([1, 1, 2, 2])
    """
    share, remainder = divmod(total, num_groups)
    counts_G = torch.full((num_groups,), share, dtype=torch.int64)
    counts_G[num_groups - remainder :] += 1
    return counts_G
