"""Sums over tokens of what a tap carries.

Legend: T tokens, I inputs of the tap.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from llmprune.stats.types import Stats

_CHUNK_BYTES = 4 * 2**20


class ColumnSquares:
    """Sum the squares of every input column: `col_sq` (I,), float64, on the device of the inputs.

    Values are squared in float32 (float64 inputs in float64): half precision would overflow above
    |x| = 256. Before the first token there is no statistic, and `result` holds none.

    Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, eq. 1
    (the squared norm of each input feature).

    >>> seen = ColumnSquares()
    >>> seen.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> seen.result()["col_sq"]
    tensor([10.,  4.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum_I: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., I), of any float dtype; `x` is not changed."""
        x_TI = x.detach().reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        num_rows = max(1, _CHUNK_BYTES // (wide.itemsize * max(1, x_TI.shape[1])))
        for part_TI in x_TI.split(num_rows):
            self._add(part_TI.to(wide).square().sum(0), len(part_TI))

    def merge(self, other: Self) -> None:
        """Add the sums of another accumulator."""
        if other._sum_I is not None:
            self._add(other._sum_I, other.num_tokens)

    def result(self) -> Stats:
        """Return `col_sq` and the number of tokens; no statistic where no token came."""
        if self._sum_I is None:
            return Stats(num_tokens=0, values={})
        return Stats(num_tokens=self.num_tokens, values={"col_sq": self._sum_I.clone()})

    def _add(self, sum_I: Tensor, num_tokens: int) -> None:
        """Add the sum over some tokens.

        Raises:
            ValueError: the number of columns differs from what was seen before.
        """
        if num_tokens == 0:
            return
        if self._sum_I is None:
            home = "cpu" if sum_I.device.type == "mps" else sum_I.device  # MPS has no float64
            self._sum_I = torch.zeros(sum_I.shape, dtype=torch.float64, device=home)
        if self._sum_I.shape != sum_I.shape:
            raise ValueError(
                f"a tap of {len(self._sum_I)} columns was given tokens of {len(sum_I)} columns"
            )
        self._sum_I += sum_I.to(self._sum_I)
        self.num_tokens += num_tokens
