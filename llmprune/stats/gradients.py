"""Sums over sequences of what gradients say about every weight of a linear.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from llmprune.stats.types import Stats

_PIECE = 2**20  # values of a gradient that are added at a time, where a power needs room of its own


class GradientMoment:
    """Sum a power of the gradient of each sequence: (O, I), float32, on the device of the first.

    `update` is given the gradient of one sequence, so that a square is that of a sequence and not
    of a sum of several. Powers are taken in float32 (of float64 gradients in float64), whatever the
    gradient's own dtype is. Sums are added in the order of the sequences: `begin_with` goes on
    where an earlier accumulator ended, and gives the same bits as one that saw all of them.

    Source: the references are those of the scores in `llmprune/score/gradient.py`.

    >>> seen = GradientMoment("grad_sq", torch.square)
    >>> seen.update(torch.tensor([[1.0, -2.0]]))
    >>> seen.update(torch.tensor([[3.0, 0.0]]))
    >>> seen.result()["grad_sq"], seen.result().num_sequences
    (tensor([[10.,  4.]]), 2)
    """

    def __init__(self, name: str, power: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.power = power
        self.num_sequences = 0
        self._sum_OI: Tensor | None = None
        self._lent = False

    def update(self, x: Tensor) -> None:
        """Add the gradient grad_OI of one sequence, of any float dtype; it is not changed."""
        x = x.detach()
        sum_OI = self._own(x)
        rows = max(1, _PIECE // max(1, x.shape[1]))
        for sum_part_OI, part_OI in zip(sum_OI.split(rows), x.split(rows), strict=True):
            sum_part_OI += self.power(part_OI.to(sum_OI.dtype))
        self.num_sequences += 1

    def merge(self, other: Self) -> None:
        """Add the sums of another accumulator."""
        if other._sum_OI is not None:
            self._own(other._sum_OI).add_(other._sum_OI.to(self._device))
            self.num_sequences += other.num_sequences

    def begin_with(self, stats: Stats, device: torch.device | None = None) -> None:
        """Go on from what an earlier accumulator found; `stats` is not changed."""
        self._sum_OI = stats[self.name].to(device)
        self._lent = True
        self.num_sequences = stats.num_sequences

    def result(self) -> Stats:
        """Return the sums and the number of sequences; no statistic where none came."""
        if self._sum_OI is None:
            return Stats(num_tokens=0, values={})
        self._lent = True
        return Stats(
            num_tokens=0, values={self.name: self._sum_OI}, num_sequences=self.num_sequences
        )

    @property
    def _device(self) -> torch.device | None:
        return None if self._sum_OI is None else self._sum_OI.device

    def _own(self, like: Tensor) -> Tensor:
        """Return the sum to add to: a new one, or a copy where a result has been given away.

        Raises:
            ValueError: the shape differs from what was seen before.
        """
        if self._sum_OI is None:
            wide = torch.promote_types(like.dtype, torch.float32)
            self._sum_OI = torch.zeros(like.shape, dtype=wide, device=like.device)
        elif self._sum_OI.shape != like.shape:
            raise ValueError(
                f"a linear of shape {list(self._sum_OI.shape)} was given a gradient of shape "
                f"{list(like.shape)}"
            )
        elif self._lent:
            self._sum_OI = self._sum_OI.clone()
        self._lent = False
        return self._sum_OI


def gradient_sum() -> GradientMoment:
    """Return what sums gradients as they are: `grad_sum`."""
    return GradientMoment("grad_sum", torch.Tensor.detach)


def gradient_magnitudes() -> GradientMoment:
    """Return what sums the magnitudes of gradients: `grad_abs`."""
    return GradientMoment("grad_abs", torch.abs)


def gradient_squares() -> GradientMoment:
    """Return what sums the squares of gradients: `grad_sq`."""
    return GradientMoment("grad_sq", torch.square)


def region_squares() -> GradientMoment:
    """Return what sums the squares of gradients of the norm of a block's output: `region_sq`."""
    return GradientMoment("region_sq", torch.square)
