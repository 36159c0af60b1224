"""Adapters of higher rank where a block matters more, at the cost of equal ranks.

Legend: x a block's input, y its output, for each token.

Source: Wang et al., CFSP (its importance-guided LoRA; the paper says that ranks follow importance
under a fixed total, how they are rounded and limited is ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from llmprune.allocation.influence import SLOPE
from llmprune.base.errors import NumericalError, RecipeError

LEAST = 2  # an adapter of rank 1 can hardly turn what it reads


def importance_of_angles(angles: Mapping[int, float], slope: float = SLOPE) -> dict[int, float]:
    """Return CFSP's importance of each block, in (0, 1), from how far it turns what it reads.

    `angles` are mean angular distances of x and y, in half turns, by index of the block. With sums
    over tokens, as in the published code, the slope is 1e-4.

    Source: Wang et al., CFSP.

    >>> found = importance_of_angles({0: 3e4, 1: 2e4, 2: 1e4}, slope=1e-4)
    >>> [round(each, 4) for each in found.values()]
    [0.7311, 0.5, 0.2689]
    """
    middle = math.fsum(angles.values()) / len(angles) if angles else 0.0
    return {
        block: (1 + math.tanh(slope * (angle - middle) / 2)) / 2 for block, angle in angles.items()
    }


def ranks_by_importance(
    importance: Mapping[int, float], rank: int, *, least: int = LEAST, most: int | None = None
) -> dict[int, int]:
    """Return the rank of each block's adapters: proportional to importance, `rank` on average.

    The total is exactly `rank` times the number of blocks. No rank is below `least` or above
    `most`, which the smallest side of a linear bounds; what that takes or leaves is shared among
    the others in proportion. Ranks are rounded by the largest remainder, of equal ones the block of
    lower index first. Keep alpha over rank as it is, so that all blocks learn at one pace.

    Raises:
        RecipeError: no ranks within the limits have this mean.
        NumericalError: an importance is below 0 or not finite.

    >>> ranks_by_importance({0: 0.7311, 1: 0.5, 2: 0.2689}, 8)
    {0: 12, 1: 8, 2: 4}
    """
    blocks = sorted(importance)
    total = rank * len(blocks)
    most = max(total, rank, least) if most is None else most
    _check(importance, rank, least, most)
    wished = _limited({block: Fraction(importance[block]) for block in blocks}, total, least, most)
    ranks = {block: math.floor(wish) for block, wish in wished.items()}
    by_rest = sorted(blocks, key=lambda block: (ranks[block] - wished[block], block))
    for block in by_rest[: total - sum(ranks.values())]:
        ranks[block] += 1
    return ranks


def _limited(
    weights: Mapping[int, Fraction], total: int, least: int, most: int
) -> dict[int, Fraction]:
    """Return numbers within limits that add up to a total: one factor of all weights, cut off.

    Those that lie outside on the side that misses more are put on their limit, until none does:
    nothing put there would come back with the factor of the rest.
    """
    found: dict[int, Fraction] = {}
    while len(found) < len(weights):
        rest = {block: weight for block, weight in weights.items() if block not in found}
        left, whole = total - sum(found.values()), sum(rest.values())
        wished = {
            block: left * weight / whole if whole else Fraction(left, len(rest))
            for block, weight in rest.items()
        }
        low = {block: least - wish for block, wish in wished.items() if wish < least}
        high = {block: wish - most for block, wish in wished.items() if wish > most}
        if not low and not high:
            return {block: (found | wished)[block] for block in weights}
        below = sum(low.values()) >= sum(high.values())
        found |= dict.fromkeys(low if below else high, Fraction(least if below else most))
    return {block: found[block] for block in weights}


def _check(importance: Mapping[int, float], rank: int, least: int, most: int) -> None:
    if not 0 <= least <= rank <= most:
        limits = f"between {least} and {most}"
        raise RecipeError(
            f"recover.rank: a mean rank of {rank} cannot be had from ranks {limits}. It must lie "
            f"{limits} itself; type --rank {max(least, min(rank, most))}."
        )
    for block, value in importance.items():
        if not 0 <= value < math.inf:
            raise NumericalError(
                f"the importance of block {block} is {value}. It must be 0 or more and finite; "
                "calibrate on tokens that reach the block, or leave all ranks equal."
            )
