"""What a solver is: it prunes the linears that share a tap and may update what survives.

Legend: O outputs, I inputs, C the columns asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from llmprune.stats.types import Stats

Fact = float | int | str | bool


@dataclass(frozen=True, kw_only=True)
class Choose:
    """How the mask of some columns is chosen: `fn(weight_OC, cols, curvature_C) -> keep_OC`.

    A score that adapts judges the weights as they are when it is asked, `columns` at a time and
    from left to right, with the curvature that the solver holds. One that does not has decided
    before the first question, and answers for any columns, without looking at weights or curvature.
    True means kept.
    """

    fn: Callable[[Tensor, slice, Tensor | None], Tensor]
    adaptive: bool = False
    columns: int = 1

    def __call__(self, weight_OC: Tensor, cols: slice, curvature_C: Tensor | None = None) -> Tensor:
        """Return keep_OC."""
        return self.fn(weight_OC, cols, curvature_C)

    def whole(self, weight_OI: Tensor) -> Tensor:
        """Return the whole mask keep_OI of a choice that does not adapt.

        Raises:
            ValueError: it adapts, so a solver that updates weights must ask it.
        """
        if self.adaptive:
            raise ValueError("an adaptive score has no mask before weights are updated")
        return self.fn(weight_OI, slice(0, weight_OI.shape[1]), None)


class Solved(NamedTuple):
    """One pruned linear: weights with exact zeros where `keep_OI` is False.

    `facts` is what the report says of it beside its counts: the damping that was needed, say.
    """

    weight_OI: Tensor
    keep_OI: Tensor
    facts: Mapping[str, Fact] = {}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a recipe says about solving.

    `damping` times the mean of the Gram matrix' diagonal is added to each of its entries ("mean"),
    or times each entry itself ("diag"). `iterations` is the most steps of a solver that has steps.
    """

    damping: float = 0.01
    damp: Literal["mean", "diag"] = "mean"
    iterations: int = 30


@dataclass(frozen=True, kw_only=True)
class Solver:
    """One row of the table of solvers.

    `fn(weights, stats, chooses, settings)` takes mappings by linear and the statistics of their
    tap, and returns one `Solved` for each; it changes no argument. `needs` names the statistics it
    reads, and `updates` says whether weights that stay may change. `workspace` is what it holds at
    its peak beside its arguments, as seen with two linears of a tap: float32 matrices of the size
    of the Gram matrix, and of the size of the largest linear.
    """

    fn: Callable[[Mapping[str, Tensor], Stats, Mapping[str, Choose], Settings], dict[str, Solved]]
    needs: tuple[str, ...]
    updates: bool
    paper: str
    workspace: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """One row of the table of refinements, which exchange kept and pruned weights of a fixed mask.

    `fn(weight_OI, keep_OI, stats, within, settings)` returns a new keep_OI with as many kept in
    every row, and, where `within` is a number M, in every M consecutive columns of it.
    """

    fn: Callable[[Tensor, Tensor, Stats, int | None, Settings | None], Tensor]
    needs: tuple[str, ...]
    paper: str


class Compensated(NamedTuple):
    """The linear that reads units once some went: zeros in their columns, and what its bias gains.

    `keep_I` says which columns stayed, where the compensation chose them itself.
    """

    weight_OI: Tensor
    bias_O: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """One row of the table of what makes up for whole units that go.

    `fn(weight_OI, stats, keep_I, settings)` sees the linear that reads the units and the statistics
    of its inputs; it changes no argument. With `bias` the linear must have a bias, or a config key
    that gives it one.
    """

    fn: Callable[[Tensor, Stats, Tensor, Settings], Compensated]
    needs: tuple[str, ...]
    paper: str
    bias: bool = False
