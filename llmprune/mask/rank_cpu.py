"""Ranking scores on the host: k-th values in place of sorts, in pieces that stay in the cache.

numpy compares, counts and partitions several times faster than torch on one core, and releases the
interpreter lock, so pieces run on as many threads as torch was given. Every function expects scores
without NaN and sensible counts; `rank` checks both. Legend: G groups, N scores of a group.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmprune.mask.pieces import PIECE, in_pieces

Scores = NDArray[np.floating[Any]]
Keep = NDArray[np.bool_]

_SAMPLE = 2**16
_SIGMAS = 5  # a bracket misses about once in a million vectors, which then costs one partition


def keep_rows(score_GN: Scores, prune_G: NDArray[np.int64]) -> Keep:
    """Keep all but the `prune_G[g]` lowest of every row; of equal scores the first are pruned."""
    keep_GN = np.empty(score_GN.shape, dtype=np.bool_)

    def work(part: slice) -> None:
        _keep_some_rows(score_GN[part], prune_G[part], keep_GN[part])

    in_pieces(work, len(score_GN), max(1, PIECE // score_GN.shape[1]))
    return keep_GN


def _keep_some_rows(score_GN: Scores, prune_G: NDArray[np.int64], keep_GN: Keep) -> None:
    threshold_G = np.full(len(score_GN), -np.inf, dtype=score_GN.dtype)
    for count in np.unique(prune_G[prune_G > 0]):
        chosen = prune_G == count
        rows = score_GN[chosen]  # a copy, partitioned in place
        rows.partition(count - 1, axis=1)
        threshold_G[chosen] = rows[:, count - 1]
    np.greater(score_GN, threshold_G[:, None], out=keep_GN)
    excess_G = score_GN.shape[1] - np.count_nonzero(keep_GN, axis=1) - prune_G
    (tied_G,) = np.nonzero(excess_G)
    if len(tied_G) == 0:
        return
    row, column = np.nonzero(score_GN[tied_G] == threshold_G[tied_G, None])
    end_G = np.cumsum(np.bincount(row, minlength=len(tied_G)))
    last = np.arange(len(row)) >= (end_G - excess_G[tied_G])[row]
    keep_GN[tied_G[row[last]], column[last]] = True


def keep_flat(score_N: Scores, num_pruned: int) -> Keep:
    """Keep all but the lowest of one long vector; of equal scores the first are pruned."""
    threshold = _kth_lowest(score_N, num_pruned) if num_pruned else -np.inf
    keep_N = np.empty(score_N.shape, dtype=np.bool_)

    def work(part: slice) -> int:
        return int(np.count_nonzero(np.greater(score_N[part], threshold, out=keep_N[part])))

    excess = len(score_N) - sum(in_pieces(work, len(score_N), PIECE)) - num_pruned
    for start in reversed(range(0, len(score_N), PIECE)):
        if excess == 0:
            break
        tied = np.flatnonzero(score_N[start : start + PIECE] == threshold)[-excess:]
        keep_N[start + tied] = True
        excess -= len(tied)
    return keep_N


def _kth_lowest(score_N: Scores, rank: int) -> float:
    """Return the score of 1-based rank: bracketed by a sample, exact among what lies between."""
    if len(score_N) > 2 * PIECE:
        found = _kth_between(score_N, rank, *_bracket(score_N, rank))
        if found is not None:
            return found
    return float(np.partition(score_N, rank - 1)[rank - 1])


def _bracket(score_N: Scores, rank: int) -> tuple[float, float]:
    """Return two sampled scores that the score of this rank almost surely lies between."""
    # Drawn at random: a stride would see few columns where it shares a factor with their number.
    num_drawn = min(_SAMPLE, len(score_N) // 64)
    drawn = np.random.default_rng(0).integers(len(score_N), size=num_drawn)
    sample = np.sort(score_N[drawn])
    share = rank / len(score_N)
    margin = _SIGMAS * math.sqrt(num_drawn * share * (1 - share)) + _SIGMAS
    low, high = math.floor(num_drawn * share - margin), math.ceil(num_drawn * share + margin)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < num_drawn else math.inf,
    )


def _kth_between(score_N: Scores, rank: int, low: float, high: float) -> float | None:
    """Return the score of 1-based rank if it lies in [low, high], else None."""

    def census(part: slice) -> tuple[int, Scores]:
        piece = score_N[part]
        inside = piece > low
        num_above = int(np.count_nonzero(inside))
        inside &= piece < high
        return len(piece) - num_above, piece[np.flatnonzero(inside)]

    pieces = in_pieces(census, len(score_N), PIECE)
    among = rank - sum(count for count, _ in pieces)
    inside = np.concatenate([piece for _, piece in pieces])
    if 0 < among <= len(inside):
        inside.partition(among - 1)
        return float(inside[among - 1])
    if among <= 0:
        return low if _count(score_N, np.less, low) < rank else None
    return high if _count(score_N, np.less_equal, high) >= rank else None


def _count(score_N: Scores, compare: np.ufunc, bound: float) -> int:
    def work(part: slice) -> int:
        return int(np.count_nonzero(compare(score_N[part], bound)))

    return sum(in_pieces(work, len(score_N), PIECE))


def keep_n_of_m(score_GM: Scores, n: int) -> Keep:
    """Keep the N highest of every short row by comparing all pairs of columns.

    Columns that lie one after the other are read, and the mask's written, as they lie.
    """
    num_groups, m = score_GM.shape
    keep_GM = np.empty_like(score_GM, dtype=np.bool_)
    earlier_wins = np.arange(m - 1, -1, -1, dtype=np.int8)[:, None]

    def work(part: slice) -> None:
        score_MG = np.ascontiguousarray(score_GM[part].T)
        wins_MG = np.repeat(earlier_wins, score_MG.shape[1], axis=1)
        for apart in range(1, m):  # of two equal scores the later one wins
            later_wins = (score_MG[apart:] >= score_MG[:-apart]).view(np.int8)
            wins_MG[apart:] += later_wins
            wins_MG[:-apart] -= later_wins
        np.greater_equal(wins_MG.T, m - n, out=keep_GM[part])

    in_pieces(work, num_groups, PIECE // (4 * m))
    return keep_GM
