"""Sums over tokens of what a tap carries.

Legend: T tokens, I inputs of the tap.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        for part_TI in _chunks(x):
            self._add(part_TI.square().sum(0), len(part_TI))

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
        """Add the sum over some tokens."""
        self._sum_I = _added(self._sum_I, sum_I)
        self.num_tokens += num_tokens


class ColumnMeans:
    """Average every input column over all tokens: `col_mean` (I,), float64.

    >>> seen = ColumnMeans()
    >>> seen.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> seen.result()["col_mean"]
    tensor([2., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum_I: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., I), of any float dtype; `x` is not changed."""
        for part_TI in _chunks(x):
            self._sum_I = _added(self._sum_I, _sum(part_TI))
            self.num_tokens += len(part_TI)

    def merge(self, other: Self) -> None:
        """Add the sums of another accumulator."""
        if other._sum_I is not None:
            self._sum_I = _added(self._sum_I, other._sum_I)
            self.num_tokens += other.num_tokens

    def result(self) -> Stats:
        """Return `col_mean` and the number of tokens; no statistic where no token came."""
        if self._sum_I is None:
            return Stats(num_tokens=0, values={})
        return Stats(num_tokens=self.num_tokens, values={"col_mean": self._sum_I / self.num_tokens})


class ColumnVariances:
    """Take the variance of every input column over all tokens: `col_var` (I,), float64.

    It is that of the tokens as a population, whatever sequence they are of. Deviations are taken
    from the mean of their chunk, and chunks are joined by their means, so that a mean far from zero
    costs no digits.

    Source: Chan et al., Updating Formulae and a Pairwise Algorithm for Computing Sample Variances.

    >>> seen = ColumnVariances()
    >>> seen.update(torch.tensor([[1.0, 2.0], [3.0, 0.0], [2.0, 1.0], [2.0, 1.0]]))
    >>> seen.result()["col_var"]
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._mean_I: Tensor | None = None
        self._deviation_I: Tensor | None = None  # the sum of squares about the mean

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., I), of any float dtype; `x` is not changed."""
        for part_TI in _chunks(x):
            near_I = part_TI.mean(0)
            part_TI = part_TI - near_I
            off_I = _sum(part_TI) / len(part_TI)
            deviation_I = _sum(part_TI.square_()) - off_I.square() * len(part_TI)
            self._join(len(part_TI), near_I.to(off_I) + off_I, deviation_I.clamp_(min=0))

    def merge(self, other: Self) -> None:
        """Add what another accumulator has seen."""
        if other._mean_I is not None and other._deviation_I is not None:
            self._join(other.num_tokens, other._mean_I, other._deviation_I)

    def result(self) -> Stats:
        """Return `col_var` and the number of tokens; no statistic where no token came."""
        if self._deviation_I is None:
            return Stats(num_tokens=0, values={})
        return Stats(
            num_tokens=self.num_tokens, values={"col_var": self._deviation_I / self.num_tokens}
        )

    def _join(self, num_tokens: int, mean_I: Tensor, deviation_I: Tensor) -> None:
        """Join tokens whose mean and sum of squared deviations are known."""
        before = self.num_tokens
        self.num_tokens += num_tokens
        if self._mean_I is None or self._deviation_I is None:
            self._mean_I, self._deviation_I = mean_I, deviation_I
            return
        _check_width(self._mean_I, mean_I)
        apart_I = mean_I.to(self._mean_I.device) - self._mean_I
        share = num_tokens / self.num_tokens
        self._mean_I = self._mean_I + apart_I * share
        self._deviation_I = (
            self._deviation_I + deviation_I.to(apart_I.device) + apart_I.square() * (before * share)
        )


class ColumnMagnitudes:
    """Add up the squared mean magnitude of every input column of each sequence: `col_abs` (I,),
    float64.

    The mean is over the tokens of one sequence, so `update` must be given whole sequences (B, T,
    I); tokens without sequences (T, I), as an expert gets them, count as one.

    Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation
    (the mean over tokens, the l2 norm over sequences: the root of this sum).

    >>> seen = ColumnMagnitudes()
    >>> seen.update(torch.tensor([[[2.0, 0.0], [-4.0, 0.0]], [[4.0, 1.0], [4.0, -1.0]]]))
    >>> seen.result()["col_abs"]
    tensor([25.,  1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum_I: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the sequences of `x` (..., T, I), of any float dtype; `x` is not changed."""
        x_BTI = x.detach().flatten(0, -3) if x.dim() > 3 else x.detach()
        for sequence_TI in x_BTI if x.dim() > 2 else (x_BTI,):
            total_I: Tensor | None = None
            for part_TI in _chunks(sequence_TI):
                total_I = _added(total_I, _sum(part_TI.abs()))
            if total_I is not None:
                mean_I = total_I / len(sequence_TI)
                self._sum_I = _added(self._sum_I, mean_I.square())
                self.num_tokens += len(sequence_TI)

    def merge(self, other: Self) -> None:
        """Add the sums of another accumulator."""
        if other._sum_I is not None:
            self._sum_I = _added(self._sum_I, other._sum_I)
            self.num_tokens += other.num_tokens

    def result(self) -> Stats:
        """Return `col_abs` and the number of tokens; no statistic where no token came."""
        if self._sum_I is None:
            return Stats(num_tokens=0, values={})
        return Stats(num_tokens=self.num_tokens, values={"col_abs": self._sum_I.clone()})


def _chunks(x: Tensor) -> Iterator[Tensor]:
    """Yield the tokens of `x` (..., I) as pieces (T, I) of a few MB, float32 or float64."""
    x_TI = x.detach().reshape(-1, x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    num_rows = max(1, _CHUNK_BYTES // (wide.itemsize * max(1, x_TI.shape[1])))
    if len(x_TI):
        for part_TI in x_TI.split(num_rows):
            yield part_TI.to(wide)


def _sum(x_TI: Tensor) -> Tensor:
    """Return the sum over tokens, float64."""
    home = "cpu" if x_TI.device.type == "mps" else x_TI.device  # MPS has no float64
    return x_TI.to(home).sum(0, dtype=torch.float64)


def _added(total_I: Tensor | None, sum_I: Tensor) -> Tensor:
    """Return the float64 total with another sum in it; the first total is new, later ones are not.

    Raises:
        ValueError: the number of columns differs from what was seen before.
    """
    if total_I is None:
        home = "cpu" if sum_I.device.type == "mps" else sum_I.device  # MPS has no float64
        total_I = torch.zeros(sum_I.shape, dtype=torch.float64, device=home)
    _check_width(total_I, sum_I)
    total_I += sum_I.to(total_I)
    return total_I


def _check_width(total_I: Tensor, sum_I: Tensor) -> None:
    """Check the number of columns.

    Raises:
        ValueError: it differs from what was seen before.
    """
    if total_I.shape != sum_I.shape:
        raise ValueError(
            f"a tap of {len(total_I)} columns was given tokens of {len(sum_I)} columns"
        )
