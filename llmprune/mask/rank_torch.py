"""Ranking scores where they are, with torch alone: the accelerator's side of `rank`.

The same k-th values and the same ties as on the host, hence the same masks for the same scores.
Legend: G groups, N scores of a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAMPLE = 2**16
_SIGMAS = 5
_SHORT = 2**20  # shorter vectors are selected from directly


def keep_rows(score_GN: Tensor, prune_G: Tensor) -> Tensor:
    """Keep all but the `prune_G[g]` lowest of every row; of equal scores the first are pruned."""
    threshold_G = torch.full_like(score_GN[:, 0], -torch.inf)
    for count in prune_G.unique().tolist():
        if count:
            rows = (prune_G == count).nonzero().flatten()
            threshold_G[rows] = score_GN[rows].kthvalue(count, dim=1).values
    keep_GN = score_GN > threshold_G[:, None]
    excess_G = score_GN.shape[1] - keep_GN.sum(1) - prune_G
    tied_G = excess_G.nonzero().flatten()
    row, column = (score_GN[tied_G] == threshold_G[tied_G, None]).nonzero(as_tuple=True)
    end_G = row.bincount(minlength=len(tied_G)).cumsum(0)
    last = torch.arange(len(row), device=row.device) >= (end_G - excess_G[tied_G])[row]
    keep_GN[tied_G[row[last]], column[last]] = True
    return keep_GN


def keep_flat(score_N: Tensor, num_pruned: int) -> Tensor:
    """Keep all but the lowest of one long vector; of equal scores the first are pruned."""
    if num_pruned == 0:
        return torch.ones_like(score_N, dtype=torch.bool)
    threshold = _kth_lowest(score_N, num_pruned)
    keep_N = score_N > threshold
    excess = len(score_N) - int(keep_N.sum()) - num_pruned
    if excess:
        keep_N[(score_N == threshold).nonzero().flatten()[-excess:]] = True
    return keep_N


def _kth_lowest(score_N: Tensor, rank: int) -> Tensor:
    """Return the score of 1-based rank: exact among what a sample brackets."""
    if len(score_N) > _SHORT:
        low, high = _bracket(score_N, rank)
        inside = score_N[(score_N >= low) & (score_N <= high)]
        among = rank - int((score_N < low).sum())
        if 0 < among <= len(inside):
            return inside.kthvalue(among).values
    return score_N.kthvalue(rank).values


def _bracket(score_N: Tensor, rank: int) -> tuple[float, float]:
    """Return two sampled scores that the score of this rank almost surely lies between."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(score_N), (_SAMPLE,), generator=generator)
    sample = score_N[drawn.to(score_N.device)].sort().values
    share = rank / len(score_N)
    margin = _SIGMAS * math.sqrt(_SAMPLE * share * (1 - share)) + _SIGMAS
    low, high = math.floor(_SAMPLE * share - margin), math.ceil(_SAMPLE * share + margin)
    return (
        float(sample[low]) if low >= 0 else -math.inf,
        float(sample[high]) if high < _SAMPLE else math.inf,
    )
