"""How far a block moves what passes through it: sums over tokens of its input beside its output.

Legend: T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from llmprune.stats.types import Stats


class ResidualSums:
    """Sum over tokens the cosine of input and output, their angle over pi, ||y - x|| / ||x||, and
    the tokens: `residual` (4,), float64.

    >>> seen = ResidualSums()
    >>> seen.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    >>> seen.result()["residual"]
    tensor([0.7071, 0.2500, 1.0000, 1.0000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, input_TD: Tensor, output_TD: Tensor) -> None:
        """Add tokens (..., D), which are not changed; a token of zeros counts as not moved."""
        x_TD = input_TD.reshape(-1, input_TD.shape[-1]).float()
        y_TD = output_TD.reshape(-1, output_TD.shape[-1]).float()
        x_T, y_T = x_TD.norm(dim=1), y_TD.norm(dim=1)
        both_T = x_T * y_T
        some_T = both_T > 0
        tiny = torch.finfo(torch.float32).tiny
        cosine_T = torch.where(some_T, (x_TD * y_TD).sum(1) / both_T.clamp(min=tiny), 1.0)
        unit_T = (x_TD / x_T.clamp(min=tiny)[:, None] - y_TD / y_T.clamp(min=tiny)[:, None]).norm(
            dim=1
        )
        angle_T = torch.where(some_T, 2 * torch.asin((unit_T / 2).clamp(max=1)) / torch.pi, 0.0)
        change_T = (y_TD - x_TD).norm(dim=1) / x_T.clamp(min=tiny)
        change_T = torch.where(x_T > 0, change_T, 0.0)
        found = [cosine_T.clamp(-1, 1), angle_T, change_T]
        self.sums[:3] += torch.stack([each.cpu().double().sum() for each in found])
        self.sums[3] += len(x_TD)

    def merge(self, other: Self) -> None:
        """Add the sums of another accumulator."""
        self.sums += other.sums

    def result(self) -> Stats:
        """Return `residual` and the number of tokens."""
        return Stats(num_tokens=int(self.sums[3]), values={"residual": self.sums.clone()})
