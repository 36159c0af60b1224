"""The Gram matrix of what a tap carries, from which every second-order method works.

Legend: T tokens, I inputs of the tap.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

_PANEL = 256  # columns multiplied at a time: narrow enough to skip half, wide enough for the BLAS
_CAST_BYTES = 32 * 2**20
_CAST_ROWS = 1024  # fewer tokens at a time would spend the time on reading the sum


class GramMatrix:
    """Sum X^T X over tokens: `gram` (I, I), float32 (float64 of float64 inputs), on their device.

    Values are multiplied in float32, so those of half precision lose nothing before they are
    summed; then TF32 is as exact and is allowed, for float32 inputs it is not. Only panels on and
    above the diagonal are multiplied; `result` mirrors them. Scale is that of the raw sum.

    Source: Frantar & Alistarh, SparseGPT, eq. 2 (its Hessian is twice this over the tokens).

    >>> seen = GramMatrix()
    >>> seen.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> seen.result()["gram"]
    tensor([[10.,  2.],
            [ 2.,  4.]])
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum_II: Tensor | None = None
        self._lent = False

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., I), of any float dtype; `x` is not changed."""
        x_TI = x.detach().reshape(-1, x.shape[-1])
        if not len(x_TI):
            return
        wide = torch.promote_types(x.dtype, torch.float32)
        num_rows = len(x_TI)
        if x.dtype != wide:
            num_rows = max(_CAST_ROWS, _CAST_BYTES // (wide.itemsize * x_TI.shape[1]))
        sum_II = self._own(x_TI.shape[1], wide, x.device)
        with float32_products(x.device, tf32=x.itemsize < 4):
            for part_TI in x_TI.split(num_rows):
                _add_upper(sum_II, part_TI.to(sum_II.dtype))
        self.num_tokens += len(x_TI)

    def merge(self, other: Self) -> None:
        """Add the sum of another accumulator."""
        if other._sum_II is None:
            return
        found_II = other._sum_II
        sum_II = self._own(len(found_II), found_II.dtype, found_II.device)
        for start in range(0, len(sum_II), _PANEL):
            stop = start + _PANEL
            sum_II[start:stop, start:] += found_II[start:stop, start:].to(sum_II.device)
        self.num_tokens += other.num_tokens

    def result(self) -> Stats:
        """Return `gram` and the number of tokens; no statistic where no token came.

        The sum is lent, not copied: the next update or merge moves on with a copy.
        """
        if self._sum_II is None:
            return Stats(num_tokens=0, values={})
        if not self._lent:
            _mirror(self._sum_II)
            self._lent = True
        return Stats(num_tokens=self.num_tokens, values={"gram": self._sum_II})

    def _own(self, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the sum so far, in a dtype that holds both, to be added to.

        Raises:
            ValueError: the number of columns differs from what was seen before.
        """
        if self._sum_II is None:
            self._sum_II = torch.zeros(num_columns, num_columns, dtype=dtype, device=device)
        if len(self._sum_II) != num_columns:
            raise ValueError(
                f"a tap of {len(self._sum_II)} columns was given tokens of {num_columns} columns"
            )
        wide = torch.promote_types(self._sum_II.dtype, dtype)
        self._sum_II = self._sum_II.to(wide, copy=self._lent)
        self._lent = False
        return self._sum_II


def _add_upper(sum_II: Tensor, x_TI: Tensor) -> None:
    """Add the panels of X^T X that reach the diagonal, and what is right of them."""
    for start in range(0, len(sum_II), _PANEL):
        panel_TP = x_TI[:, start : start + _PANEL]
        sum_II[start : start + _PANEL, start:].addmm_(panel_TP.T, x_TI[:, start:])


def _mirror(sum_II: Tensor) -> None:
    """Copy what lies above the diagonal below it, panel by panel."""
    for start in range(0, len(sum_II), _PANEL):
        stop = start + _PANEL
        corner_PP = sum_II[start:stop, start:stop]
        corner_PP.copy_(corner_PP.triu() + corner_PP.triu(1).T)
        sum_II[stop:, start:stop] = sum_II[start:stop, stop:].T
