"""What a solver is: it prunes the linears that share a tap and may update what survives.

Legend: O outputs, I inputs, C the columns asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from llmprune.stats.types import Stats

Choose = Callable[[Tensor, slice, Tensor | None], Tensor]
"""`choose(weight_OC, cols, curvature_C) -> keep_OC`: the mask of these columns, True = kept."""


class Solved(NamedTuple):
    """One pruned linear: weights with exact zeros where `keep_OI` is False."""

    weight_OI: Tensor
    keep_OI: Tensor
    bias_shift_O: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Solver:
    """One row of the table of solvers.

    `fn(weights, stats, chooses)` takes mappings by linear and returns one `Solved` for each;
    `needs` names the statistics it reads, and `updates` says whether weights that stay may change.
    """

    fn: Callable[
        [Mapping[str, Tensor], Mapping[str, Stats], Mapping[str, Choose]], dict[str, Solved]
    ]
    needs: tuple[str, ...]
    updates: bool
    paper: str
