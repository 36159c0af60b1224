"""What calibration learns about a tap, and what collects it.

Legend: T tokens, I inputs of the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The statistics of one tap by name, and the number of tokens that they sum over.

    `num_sequences` counts the sequences that gradients are summed over.

    >>> import torch
    >>> Stats(num_tokens=5, values={"col_sq": torch.ones(3)})["col_sq"].shape
    torch.Size([3])
    """

    num_tokens: int
    values: Mapping[str, Tensor]
    num_sequences: int = 0

    def __getitem__(self, key: str) -> Tensor:
        """Return a statistic.

        Raises:
            KeyError: it was not collected; a mistake in the table row of a score or solver.
        """
        if key not in self.values:
            present = ", ".join(sorted(self.values)) or "none"
            raise KeyError(
                f"statistic {key!r} was not collected over {self.num_tokens} tokens (present: "
                f"{present}); declare it in `needs` of the part that reads it"
            )
        return self.values[key]


class Accumulator(Protocol):
    """A sum over tokens that can be taken in parts."""

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., I)."""

    def merge(self, other: Self) -> None:
        """Add what another accumulator of this kind has seen."""

    def result(self) -> Stats:
        """Return the statistics of all tokens so far."""


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One row of the table of statistics: who collects it, where it is seen, how it is shaped.

    At a "tap" the accumulator is given activations (..., I), of a "residual" what a block reads and
    returns, of "routing" (it is made for E experts) which tokens an expert gets and what it
    answers. Of gradients it is given those of one sequence, grad_OI by linear: of the model's loss
    ("backward", before the first cut), or of the norm of the block's own output ("block_gradient").
    """

    accumulator: Callable[..., Any]
    observe: Literal["tap", "residual", "routing", "block_gradient", "backward"]
    shape: str
    itemsize: int = 8

    @property
    def is_small(self) -> bool:
        """Tell whether it is a row of columns at most: small enough for one per micro-batch."""
        return self.shape.count("I") < 2

    def num_bytes(self, inputs: int) -> int:
        """Return what the statistic of a tap with this many columns takes up while it is summed.

        >>> Statistic(accumulator=None, observe="tap", shape="(I, I)", itemsize=4).num_bytes(100)
        40000
        """
        return self.itemsize * int(inputs ** self.shape.count("I"))
