"""Grow and prune weights of a row until what was pruned has no effect on the mean of its output.

A weight's contribution to the mean of the output is m = w * mean(x), and E is the sum over those
that are pruned. A weight of E's sign is brought back (the one with the largest m / var(x)), one of
the other sign goes (the one with the lowest |w| * norm(x)), and E comes closer to zero.
Legend: O outputs, R some of them, I inputs, M inputs of a group, S steps, 2 the signs of E: 0 below
zero and 1 above.
Source: Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.solver.types import Settings
from llmprune.stats.types import Stats

STEPS = 50
NEAR = 0.1  # of the row's first |E|: near enough to zero
_CHUNK = 2**22  # values of the rows that are worked on at a time


def grow_and_prune(
    weight_OI: Tensor,
    keep_OI: Tensor,
    stats: Stats,
    within: int | None,
    settings: Settings | None = None,
) -> Tensor:
    """Return a new keep_OI whose pruned weights move no row's mean output more than before.

    Every row keeps as many weights as before; with `within`, so does every group of that many
    consecutive columns, where the weight that goes is the group's lowest, whatever its sign. A swap
    is taken only if it lowers |E|. Weights that contribute nothing (zeros, inputs of mean 0) never
    come back. Reads `col_sq`, the sum of squares, `col_mean` and `col_var` over tokens, each (I,).

    Source: as the module, with the mean per token instead of a sum, a threshold relative to the
    first |E| of the row and swaps that must lower |E|.

    >>> columns = {"col_sq": [1.0, 1.0], "col_mean": [1.0, -0.5], "col_var": [1.0, 1.0]}
    >>> stats = Stats(num_tokens=1, values={k: torch.tensor(v) for k, v in columns.items()})
    >>> grow_and_prune(torch.tensor([[3.0, 4.0]]), torch.tensor([[False, True]]), stats, None)
    tensor([[ True, False]])
    """
    wide = torch.promote_types(weight_OI.dtype, torch.float32)
    mean_I, square_I, var_I = (
        stats[name].to(weight_OI.device, wide) for name in ("col_mean", "col_sq", "col_var")
    )
    smallest = torch.finfo(wide).tiny  # an input that never varies only shifts the mean
    columns = _Columns(mean_I, square_I.clamp(min=0).sqrt(), var_I.clamp(min=smallest))
    num_rows = max(1, _CHUNK // weight_OI.shape[1])
    parts = zip(weight_OI.split(num_rows), keep_OI.split(num_rows), strict=True)
    return torch.cat([_refined(weight.to(wide), keep, columns, within) for weight, keep in parts])


class _Columns(NamedTuple):
    """The inputs' means, norms and variances."""

    mean_I: Tensor
    norm_I: Tensor
    var_I: Tensor


def _refined(weight_RI: Tensor, keep_RI: Tensor, columns: _Columns, within: int | None) -> Tensor:
    """Return the masks of some rows."""
    part_RI = weight_RI * columns.mean_I
    score_RI = weight_RI.abs() * columns.norm_I
    back_R2S = _first(-part_RI.abs() / columns.var_I, part_RI, ~keep_RI, (-1, 1))
    go_R2S = _first(score_RI, part_RI, keep_RI, (1, -1))
    group_RI = score_RI.masked_fill_(~keep_RI, torch.inf)
    keep_RI = keep_RI.clone()
    row_R = torch.arange(len(keep_RI), device=keep_RI.device)
    miss_R = part_RI.masked_fill(keep_RI, 0).sum(1)
    near_R = miss_R.abs() * NEAR
    at_back_R2 = torch.zeros(len(keep_RI), 2, dtype=torch.long, device=keep_RI.device)
    at_go_R2 = at_back_R2.clone()
    for _ in range(STEPS):
        sign_R = (miss_R > 0).long()
        back_R = _at(back_R2S, at_back_R2, sign_R)
        if within is None:
            go_R = _at(go_R2S, at_go_R2, sign_R)
        else:
            go_R = _lowest_of_group(group_RI, back_R, within)
        found_R = (back_R >= 0) & (go_R >= 0)
        back_R, go_R = back_R.clamp(min=0), go_R.clamp(min=0)
        next_R = miss_R + part_RI[row_R, go_R] - part_RI[row_R, back_R]
        good_R = found_R & (next_R.abs() < miss_R.abs()) & (miss_R.abs() > near_R)
        miss_R = torch.where(good_R, next_R, miss_R)
        keep_RI[row_R, back_R] |= good_R
        keep_RI[row_R, go_R] &= ~good_R
        group_RI[row_R, go_R] = torch.where(good_R, torch.inf, group_RI[row_R, go_R])
        at_back_R2[row_R, sign_R] += 1
        at_go_R2[row_R, sign_R] += good_R
    return keep_RI


def _first(cost_RI: Tensor, part_RI: Tensor, open_RI: Tensor, signs: tuple[int, int]) -> Tensor:
    """Return place_R2S: the cheapest open weights whose contribution has a sign, then -1.

    `signs` are those for an E below zero, and above.
    """
    num = min(STEPS, cost_RI.shape[1])
    sides = []
    for sign in signs:
        barred_RI = ~(open_RI & (part_RI * sign > 0))
        lowest = cost_RI.masked_fill(barred_RI, torch.inf).topk(num, largest=False, sorted=True)
        sides.append(lowest.indices.masked_fill(lowest.values == torch.inf, -1))
    place_R2S = torch.stack(sides, dim=1)
    end_R21 = place_R2S.new_full((*place_R2S.shape[:2], 1), -1)
    return torch.cat([place_R2S, end_R21], dim=2)


def _at(place_R2S: Tensor, at_R2: Tensor, sign_R: Tensor) -> Tensor:
    """Return what stands at the place that each row has come to, for the sign of its E."""
    row_R = torch.arange(len(sign_R), device=sign_R.device)
    at_R = at_R2[row_R, sign_R].clamp(max=place_R2S.shape[2] - 1)
    return place_R2S[row_R, sign_R, at_R]


def _lowest_of_group(score_RI: Tensor, place_R: Tensor, within: int) -> Tensor:
    """Return the place of the lowest score in the group of a column, -1 where all are infinite."""
    first_R = place_R.clamp(min=0) // within * within
    place_RM = first_R[:, None] + torch.arange(within, device=place_R.device)
    lowest = score_RI.gather(1, place_RM).min(dim=1)
    return (first_R + lowest.indices).masked_fill(lowest.values == torch.inf, -1)
