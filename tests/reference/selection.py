"""Selection as its definition reads: sort, stably, and prune from the front."""

from __future__ import annotations

from collections.abc import Sequence

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
