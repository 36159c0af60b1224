"""Selection by mass: every row loses the same share of the sum of its scores.

Rows whose mass sits in few weights so lose more weights than others. True means kept.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmprune.mask.pieces import PIECE
from llmprune.mask.rank import keep_highest, keep_highest_flat

_UNIT = 2.0**38  # the largest score of a row in whole numbers; a row of 2**24 still adds up


def keep_equal_mass(score_OI: Tensor, num_pruned: int) -> Tensor:
    """Return keep_OI (bool) with exactly `num_pruned` False, at the lowest scores of each row.

    With the scores of a row in ascending order, a weight carries the share of the row's sum that
    lies up to and with it. The `num_pruned` weights of lowest share go, of equal shares the first
    rows' first: all rows are cut at one share, and the last weights decide the exact count. No row
    gets a weight back when the number grows. Scores of zero carry nothing, and go before others.

    Raises:
        ValueError: a score is NaN or below zero (-inf, for what was removed before, goes first), or
            there are fewer scores.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, the
    variant in the published code, there found by bisection and to within 0.001.

    >>> keep_equal_mass(torch.tensor([[2.0, 3.0, 4.0, 10.0], [0.2, 1.0, 4.0, 8.0]]), 2)
    tensor([[ True,  True,  True,  True],
            [False, False,  True,  True]])
    """
    return keep_highest(score_OI, counts_of_equal_mass(score_OI, num_pruned))


def counts_of_equal_mass(score_OI: Tensor, num_pruned: int) -> Tensor:
    """Return how many weights each row loses where all lose the same share of mass, int64 (O,).

    >>> counts_of_equal_mass(torch.tensor([[2.0, 3.0, 4.0, 10.0], [0.2, 1.0, 4.0, 8.0]]), 5)
    tensor([2, 3])
    """
    share_OI = torch.empty(
        score_OI.shape, dtype=torch.float32, device=score_OI.device if score_OI.is_cuda else "cpu"
    )
    rows = max(1, PIECE // max(1, score_OI.shape[1]))
    for part_OI, target_OI in zip(score_OI.split(rows), share_OI.split(rows), strict=True):
        target_OI.copy_(_shares(_ascending(part_OI)))
    pruned_OI = ~keep_highest_flat(share_OI.view(-1), num_pruned).view(share_OI.shape)
    return pruned_OI.sum(dim=1)


def _ascending(score_OI: Tensor) -> Tensor:
    """Return the scores of each row in ascending order; numpy sorts faster on the host."""
    if score_OI.is_cuda:
        return score_OI.sort(dim=1).values
    return torch.from_numpy(np.sort(score_OI.numpy(force=True), axis=1))


def _shares(score_OI: Tensor) -> Tensor:
    """Return the share of its row's sum that lies up to each of the ascending scores, float64.

    Added up in whole numbers, whose sum does not depend on the order of additions.
    """
    removed_OI, endless_OI = score_OI == -torch.inf, score_OI == torch.inf
    plain_OI = score_OI.double().masked_fill_(removed_OI | endless_OI, 0.0)
    if not bool((plain_OI >= 0).all()):  # a NaN is not either
        raise ValueError("selection by mass needs scores that are not NaN and not below 0")
    largest_O1 = plain_OI.amax(dim=1, keepdim=True)
    scaled_OI = plain_OI.div_(largest_O1.masked_fill_(largest_O1 == 0, 1.0)).mul_(_UNIT)
    mass_OI = scaled_OI.round_().to(torch.int64).cumsum(dim=1)
    total_O1 = mass_OI[:, -1:].double().clamp_(min=1.0)
    share_OI = mass_OI.double().div_(total_O1)
    return share_OI.masked_fill_(removed_OI, -1.0).masked_fill_(endless_OI, torch.inf)
