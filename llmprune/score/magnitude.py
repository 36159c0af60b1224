"""Scores that look at the weight alone.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats.types import Stats


def absolute(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return the magnitude of every weight, float32 (O, I); the statistics are not read.

    Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks.

    >>> absolute(torch.tensor([[3.0, -1.0]]), Stats(num_tokens=0, values={}))
    tensor([[3., 1.]])
    """
    return weight_OI.detach().to(torch.float32, copy=True).abs_()
