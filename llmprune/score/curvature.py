"""Scores that weigh each weight by what its removal costs once the others make up for it.

Legend: O outputs, C columns that are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats.types import Stats


def optimal_brain_surgeon(weight_OC: Tensor, stats: Stats) -> Tensor:
    """Return (W_ij / u_j)^2, float32 (O, C); reads `curvature` u of these columns.

    u_j^2 is the first entry of the inverse Gram matrix of the columns from j on, so this is the
    error that removing the weight leaves, with the columns before it fixed.

    Source: Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot, eq. 3.

    >>> stats = Stats(num_tokens=2, values={"curvature": torch.tensor([1.0, 0.5])})
    >>> optimal_brain_surgeon(torch.tensor([[3.0, -2.0]]), stats)
    tensor([[ 9., 16.]])
    """
    score_OC = weight_OC.detach().to(torch.float32, copy=True)
    return score_OC.div_(stats["curvature"].to(score_OC)).square_()
