"""Scores that weigh each input by what calibration saw arriving there.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats.types import Stats


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
