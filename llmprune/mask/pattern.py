"""Which shapes of mask are legal, and how each is chosen from scores.

True means kept; N:M keeps N of every M consecutive inputs. Legend: O outputs, I inputs, U units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, assert_never

import torch
from torch import Tensor

from llmprune.base.errors import RecipeError
from llmprune.base.registry import unknown
from llmprune.mask.counts import spread
from llmprune.mask.rank import keep_highest, keep_highest_flat, keep_n_of_m


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None


@dataclass(frozen=True)
class NofM:
    """Of every `m` consecutive weights of a row `n` stay."""

    n: int
    m: int

    @property
    def sparsity(self) -> Fraction:
        """The sparsity that the pattern fixes."""
        return Fraction(self.m - self.n, self.m)


@dataclass(frozen=True)
class Channels:
    """Whole channels of a coupling go: rows of its readers and the column of its writer."""

    coupling: str

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None


Pattern = Unstructured | NofM | Channels

_NAMED: dict[str, Pattern] = {
    "unstructured": Unstructured(),
    "ffn-channels": Channels(coupling="ffn"),
}


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that a text names: "unstructured", "N:M" or "ffn-channels".

    Raises:
        UnknownName: no pattern has this name.
        RecipeError: N:M that keeps nothing, or everything.

    >>> parse_pattern("2:4").sparsity
    Fraction(1, 2)
    """
    ratio = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if ratio is None:
        if text not in _NAMED:
            raise unknown("pattern", text, [*_NAMED, "2:4", "4:8", "N:M"])
        return _NAMED[text]
    n, m = int(ratio[1]), int(ratio[2])
    if not 0 < n < m:
        meant = f"{m}:{n}" if 0 < m < n else f"{m // 2}:{m}" if m > 1 else "2:4"
        raise RecipeError(
            f"pattern: {text!r} would keep {n} of every {m} weights. N:M keeps N of every M "
            f"consecutive weights; did you mean {meant}?"
        )
    return NofM(n=n, m=m)


def choose_keep(
    pattern: Unstructured | NofM, score_OI: Tensor, num_pruned: int, group: Literal["row", "matrix"]
) -> Tensor:
    """Return keep_OI (bool) with exactly `num_pruned` False, at the lowest scores of each group.

    Unstructured weights compete within their row, each row losing the same number to within one,
    or within the whole matrix. The groups of N:M are its own.

    Raises:
        ValueError: a score is NaN, or the pattern cannot prune this number.

    >>> choose_keep(Unstructured(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2, "matrix")
    tensor([[False, False],
            [ True,  True]])
    """
    match pattern:
        case NofM(n=n, m=m):
            if num_pruned * m != score_OI.numel() * (m - n):
                raise ValueError(f"{n}:{m} cannot prune {num_pruned} of {score_OI.numel()} weights")
            return keep_n_of_m(score_OI, n, m)
        case Unstructured():
            if group == "row":
                return keep_highest(score_OI, spread(num_pruned, len(score_OI)))
            return keep_highest_flat(score_OI.reshape(-1), num_pruned).view(score_OI.shape)
        case _:
            assert_never(pattern)


def pool(score_OI: Tensor, how: Literal["l2", "mean"]) -> Tensor:
    """Return unit_score_U (U,) from the scores of the linear that reads the units as columns.

    "l2" is the norm of each column, "mean" its mean; U = I.

    Source: An et al., FLAP, the magnitude and Wanda baselines for structures.

    >>> pool(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), "l2")
    tensor([5., 1.])
    """
    return torch.linalg.vector_norm(score_OI, dim=0) if how == "l2" else score_OI.mean(dim=0)
