"""The one place that ranks scores: exact counts, and of equal scores the first are pruned.

True means kept. Scores may be infinite of either sign, never NaN. On the host the work is done by
`rank_cpu`, on CUDA by `rank_torch`.
Legend: G groups, N scores of a group, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.mask import rank_cpu, rank_torch

_PAIRS_UP_TO = 16  # wider groups are ranked faster as rows


def keep_highest(score_GN: Tensor, prune_G: Tensor) -> Tensor:
    """Return keep_GN (bool) with exactly `prune_G[g]` False in row g, at the lowest scores.

    Raises:
        ValueError: a score is NaN, or a count is below 0 or above N.

    >>> keep_highest(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([1]))
    tensor([[ True, False,  True]])
    """
    score_GN = _checked(score_GN)
    num = score_GN.shape[1]
    if prune_G.shape != score_GN.shape[:1] or bool(((prune_G < 0) | (prune_G > num)).any()):
        raise ValueError(
            f"pruning {prune_G.tolist()} of {num} scores in each of {len(score_GN)} rows"
        )
    if score_GN.numel() == 0:
        return torch.ones(score_GN.shape, dtype=torch.bool, device=score_GN.device)
    if score_GN.is_cuda:
        return rank_torch.keep_rows(score_GN, prune_G.to(score_GN.device))
    keep = rank_cpu.keep_rows(score_GN.numpy(force=True), prune_G.numpy(force=True).astype("int64"))
    return torch.from_numpy(keep).to(score_GN.device)


def keep_highest_flat(score_N: Tensor, num_pruned: int) -> Tensor:
    """Return keep_N (bool) with exactly `num_pruned` False, at the lowest scores of one vector.

    Raises:
        ValueError: a score is NaN, or the count is below 0 or above N.

    >>> keep_highest_flat(torch.tensor([3.0, 1.0, 1.0]), 1)
    tensor([ True, False,  True])
    """
    score_N = _checked(score_N)
    if not 0 <= num_pruned <= len(score_N):
        raise ValueError(f"pruning {num_pruned} of {len(score_N)} scores")
    if len(score_N) and score_N.is_cuda:
        return rank_torch.keep_flat(score_N, num_pruned)
    keep = rank_cpu.keep_flat(score_N.numpy(force=True), num_pruned)
    return torch.from_numpy(keep).to(score_N.device)


def keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Return keep_OI (bool) with N True in every M consecutive columns, at the highest scores.

    Raises:
        ValueError: a score is NaN, N is not in 0..M, or M does not divide the number of columns.

    >>> keep_n_of_m(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 2, 4)
    tensor([[ True, False, False,  True]])
    """
    if not 0 <= n <= m or m < 1 or score_OI.shape[1] % m:
        raise ValueError(f"{n}:{m} does not divide {score_OI.shape[1]} columns")
    score_GM = score_OI.reshape(-1, m)
    if score_GM.device.type == "cpu" and m <= _PAIRS_UP_TO:
        wide_GM = _sound(score_GM)
        keep_GM = torch.from_numpy(rank_cpu.keep_n_of_m(wide_GM.numpy(), n))
    else:
        prune_G = torch.full((len(score_GM),), m - n, device=score_GM.device)
        keep_GM = keep_highest(score_GM, prune_G)
    return keep_GM.view(score_OI.shape)


def _checked(score: Tensor) -> Tensor:
    """Return the scores as contiguous float32 or float64, after a look for NaN."""
    return _sound(score).contiguous()


def _sound(score: Tensor) -> Tensor:
    """Return the scores as float32 or float64, as they lie, after a look for NaN."""
    score = score.detach().to(torch.promote_types(score.dtype, torch.float32))
    if score.numel() and bool(score.amax().isnan()):  # the maximum carries any NaN
        raise ValueError(f"scores of shape {tuple(score.shape)} hold NaN")
    return score
