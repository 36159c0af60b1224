"""Scores that weigh each input by what calibration saw arriving there.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats.types import Stats

_PIECE = 2**20  # weights scored at a time, where a formula needs room of its own


def wanda(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return |W_ij| times the norm of input j over all tokens, float32 (O, I); reads `col_sq`.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, eq. 1.

    >>> import torch
    >>> stats = Stats(num_tokens=2, values={"col_sq": torch.tensor([1.0, 100.0])})
    >>> wanda(torch.tensor([[3.0, -1.0]]), stats)
    tensor([[ 3., 10.]])
    """
    score_OI = weight_OI.detach().to(torch.float32, copy=True).abs_()
    return score_OI.mul_(stats["col_sq"].sqrt().to(score_OI))


def relative_importance(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return (|W_ij| / sum of column j + |W_ij| / sum of row i) times the root of the norm of
    input j, float32 (O, I); reads `col_sq`. The sums are of |W|; where one is zero, 0/0 is 0.

    Source: Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models, the score RIA with the exponent 0.5.

    >>> import torch
    >>> stats = Stats(num_tokens=2, values={"col_sq": torch.tensor([1.0, 16.0])})
    >>> relative_importance(torch.tensor([[3.0, -1.0], [1.0, 0.0]]), stats)
    tensor([[1.5000, 2.5000],
            [1.2500, 0.0000]])
    """
    score_OI = weight_OI.detach().to(torch.float32, copy=True).abs_()
    of_column_I, of_row_O = score_OI.sum(dim=0), score_OI.sum(dim=1)
    of_column_I.masked_fill_(of_column_I == 0, 1.0)
    of_row_O.masked_fill_(of_row_O == 0, 1.0)
    root_I = stats["col_sq"].sqrt().sqrt().to(score_OI)
    rows = max(1, _PIECE // max(1, score_OI.shape[1]))
    for part_OI, sum_O in zip(score_OI.split(rows), of_row_O.split(rows), strict=True):
        in_column_OI = part_OI / of_column_I
        part_OI.div_(sum_O[:, None]).add_(in_column_OI).mul_(root_I)
    return score_OI
