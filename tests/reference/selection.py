"""Selection as its definition reads: sort, stably, and prune from the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor


def keep_of_list(scores: Sequence[float], num_pruned: int) -> list[bool]:
    """Keep all but the lowest; Python's sort is stable, so of equal scores the first go first."""
    keep = [True] * len(scores)
    for index in sorted(range(len(scores)), key=lambda index: scores[index])[:num_pruned]:
        keep[index] = False
    return keep


def keep_of_rows(score_GN: Tensor, prune_G: Tensor) -> Tensor:
    """Select row by row."""
    rows = zip(score_GN.tolist(), prune_G.tolist(), strict=True)
    return torch.tensor([keep_of_list(row, count) for row, count in rows], dtype=torch.bool)


def keep_of_vector(score_N: Tensor, num_pruned: int) -> Tensor:
    """Select in one vector, which may be long."""
    keep = np.ones(len(score_N), dtype=bool)
    keep[np.argsort(score_N.float().numpy(), kind="stable")[:num_pruned]] = False
    return torch.from_numpy(keep)


def keep_of_groups(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Select N of every M columns, one group after the other."""
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    for row in range(score_OI.shape[0]):
        for start in range(0, score_OI.shape[1], m):
            group = score_OI[row, start : start + m].tolist()
            keep_OI[row, start : start + m] = torch.tensor(keep_of_list(group, m - n))
    return keep_OI


def counts_of_mass(score_OI: Tensor, num_pruned: int) -> list[int]:
    """Count per row what goes where every row loses the same share of its sum, in fractions.

    With each weight stands the share of its row that is gone once it is; the lowest go.
    """
    gone: list[tuple[Fraction, int]] = []
    for row, scores in enumerate(score_OI.tolist()):
        total, below = sum(map(Fraction, scores)), Fraction(0)
        for score in sorted(scores):
            below += Fraction(score)
            gone.append((below / total if total else Fraction(0), row))
    pruned = [row for _, row in sorted(gone)[:num_pruned]]
    return [pruned.count(row) for row in range(len(score_OI))]


def keep_of_tiles(score_OI: Tensor, height: int, width: int, num_pruned: int) -> Tensor:
    """Prune whole tiles of lowest mean, one by one, in the whole matrix."""
    corners = [
        (row, column)
        for row in range(0, score_OI.shape[0], height)
        for column in range(0, score_OI.shape[1], width)
    ]
    means = [float(score_OI[r : r + height, c : c + width].mean()) for r, c in corners]
    keep_OI = torch.ones(score_OI.shape, dtype=torch.bool)
    for (row, column), keep in zip(corners, keep_of_list(means, num_pruned), strict=True):
        keep_OI[row : row + height, column : column + width] = keep
    return keep_OI


def counts_of_lowest(
    scores: Mapping[str, Sequence[float]], num_pruned: int, spared: Mapping[str, int]
) -> dict[str, int]:
    """Rank the scores of all sites in one list; the highest of each site come last."""
    ranked: list[tuple[bool, float, int, int, str]] = []
    for place, (site, values) in enumerate(scores.items()):
        highest = sorted(range(len(values)), key=lambda index: (values[index], index))
        safe = set(highest[max(0, len(values) - spared[site]) :])
        for index, value in enumerate(values):
            ranked.append((index in safe, value, place, index, site))
    pruned = [site for *_, site in sorted(ranked)[:num_pruned]]
    return {site: pruned.count(site) for site in scores}
