"""Prune column by column, each column's error spread over the columns that follow.

Legend: O outputs of one linear, R outputs of all linears of the tap, I inputs, C columns at a time.
Source: Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.factor import Factor, factorise
from llmprune.solver.types import Choose, Fact, Settings, Solved
from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

_BLOCK = 128  # columns after which all that follow are updated
_STRIPS = (64, 16)  # columns within a block that are brought up to date together
_COPIED = 64  # columns transposed at a time: what is read stays in the cache


def sweep_columns(
    weights: Mapping[str, Tensor],
    stats: Stats,
    chooses: Mapping[str, Choose],
    settings: Settings,
) -> dict[str, Solved]:
    """Return pruned weights (float32, or float64 of float64 weights) that make up for what went.

    All linears of the tap are solved in one sweep with one factor of `gram`; masks are asked for
    each linear alone, on the weights as they are when the sweep arrives. Weights of inputs that
    were always zero count nothing; where they are kept they stay as they were. Without a factor
    the masks are chosen by weight times input norm, nothing is updated and `degraded` is a fact.

    Raises:
        NumericalError: the Gram matrix is not finite.
        ValueError: masks of one tap are asked for different numbers of columns.
    """
    gram_II = stats["gram"]
    with float32_products(gram_II.device):
        return solve_columns(weights, gram_II, factorise(gram_II, settings), chooses)


def solve_columns(
    weights: Mapping[str, Tensor],
    gram_II: Tensor,
    found: Factor,
    chooses: Mapping[str, Choose],
) -> dict[str, Solved]:
    """Return what `sweep_columns` does, with a factor that is there already."""
    if found.upper_II is None:
        return _without_factor(weights, gram_II, chooses)
    sweep = _Sweep.over(weights, found.upper_II, found.dead_I, chooses)
    sweep.run()
    facts: dict[str, Fact] = {"damping": found.damping}
    dead = found.dead_I.nonzero().flatten()
    solved = {}
    for name, (weight_IO, keep_IO) in sweep.results():
        weight_OI, keep_OI = _transposed(weight_IO), _transposed(keep_IO)
        if len(dead):
            weight_OI[:, dead] = masked(weights[name][:, dead].to(weight_OI), keep_OI[:, dead])
        solved[name] = Solved(weight_OI, keep_OI, facts)
    return solved


def _without_factor(
    weights: Mapping[str, Tensor], gram_II: Tensor, chooses: Mapping[str, Choose]
) -> dict[str, Solved]:
    """Prune by |W| times the norm of the input, which is what OBS says if inputs do not correlate.

    A score that adapts divides by the curvature: that of a diagonal Gram matrix is 1 / norm.
    """
    curvature_I = gram_II.diagonal().clamp(min=0).rsqrt()
    facts: dict[str, Fact] = {"degraded": True}
    solved = {}
    for name, weight_OI in weights.items():
        choose, wide_OI = chooses[name], weight_OI.to(_wide(weights))
        if choose.adaptive:
            columns = range(0, wide_OI.shape[1], choose.columns)
            parts = [slice(start, start + choose.columns) for start in columns]
            asked = (choose(wide_OI[:, cols], cols, curvature_I[cols]) for cols in parts)
            keep_OI = torch.cat(list(asked), dim=1)
        else:
            keep_OI = choose.whole(weight_OI)
        solved[name] = Solved(masked(wide_OI, keep_OI), keep_OI, facts)
    return solved


def _wide(weights: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype to compute in."""
    wide = torch.float32
    for weight_OI in weights.values():
        wide = torch.promote_types(wide, weight_OI.dtype)
    return wide


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """One pass over all columns, which are rows here: what is read together lies together.

    `weight_IR` is worked on; `keep_IR` is filled in as masks are chosen. `error_CR` holds, for the
    columns of a block, the weight that went over the curvature.
    """

    weight_IR: Tensor
    keep_IR: Tensor
    upper_II: Tensor
    curvature_I: Tensor
    error_CR: Tensor
    rows: Mapping[str, slice]
    chooses: Mapping[str, Choose]
    widths: tuple[int, ...]

    @classmethod
    def over(
        cls,
        weights: Mapping[str, Tensor],
        upper_II: Tensor,
        dead_I: Tensor,
        chooses: Mapping[str, Choose],
    ) -> _Sweep:
        """Lay out the weights of all linears side by side, with the masks that are known."""
        num_inputs = len(upper_II)
        num_rows = sum(len(weight_OI) for weight_OI in weights.values())
        upper_II = upper_II.to(_wide(weights))
        weight_IR = upper_II.new_empty(num_inputs, num_rows)
        keep_IR = torch.ones(num_inputs, num_rows, dtype=torch.bool, device=upper_II.device)
        rows: dict[str, slice] = {}
        start = 0
        for name, weight_OI in weights.items():
            rows[name] = slice(start, start + len(weight_OI))
            start += len(weight_OI)
            _copy(weight_OI.T, weight_IR[:, rows[name]])
            if not chooses[name].adaptive:
                _copy(chooses[name].whole(weight_OI).T, keep_IR[:, rows[name]])
        weight_IR.masked_fill_(dead_I[:, None], 0)
        widths = _widths(chooses)
        return cls(
            weight_IR=weight_IR,
            keep_IR=keep_IR,
            upper_II=upper_II,
            curvature_I=upper_II.diagonal().contiguous(),
            error_CR=weight_IR.new_empty(min(num_inputs, widths[0]), num_rows),
            rows=rows,
            chooses={name: choose for name, choose in chooses.items() if choose.adaptive},
            widths=widths,
        )

    def run(self) -> None:
        """Sweep over all columns; after each block the ones that follow take its errors."""
        num_inputs = len(self.weight_IR)
        for start in range(0, num_inputs, self.widths[0]):
            stop = min(start + self.widths[0], num_inputs)
            self._descend(start, start, stop, 0)
            self.weight_IR[start:stop].masked_fill_(~self.keep_IR[start:stop], 0)
            self._take(stop, num_inputs, start, stop, start)

    def results(self) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """Return (weight_IO, keep_IO) of every linear."""
        return [
            (name, (self.weight_IR[:, cut], self.keep_IR[:, cut]))
            for name, cut in self.rows.items()
        ]

    def _descend(self, block: int, start: int, stop: int, depth: int) -> None:
        """Solve the columns [start, stop), up to date with all before `start`, in narrower strips.

        A strip takes the errors made since `start` when its turn comes, with one multiplication.
        """
        if self.chooses and self.widths[depth] == self._asked:
            self._ask(start, stop)
        if depth + 1 == len(self.widths):
            self._columns(block, start, stop)
            return
        width = self.widths[depth + 1]
        for inner in range(start, stop, width):
            end = min(inner + width, stop)
            self._take(inner, end, start, inner, block)
            self._descend(block, inner, end, depth + 1)

    def _columns(self, block: int, start: int, stop: int) -> None:
        """Solve the columns [start, stop) one after the other."""
        gone_CR = (~self.keep_IR[start:stop]).to(self.weight_IR.dtype)
        gone_CR /= self.curvature_I[start:stop, None]
        for column in range(start, stop):
            weight_R = self.weight_IR[column]
            if column > start:
                errors_RC = self.error_CR[start - block : column - block].T
                weight_R.addmv_(errors_RC, self.upper_II[start:column, column], alpha=-1)
            torch.mul(weight_R, gone_CR[column - start], out=self.error_CR[column - block])

    def _take(self, start: int, stop: int, first: int, last: int, block: int) -> None:
        """Let the columns [start, stop) take the errors of [first, last)."""
        if start < stop and first < last:
            errors_CR = self.error_CR[first - block : last - block]
            towards_CC = self.upper_II[first:last, start:stop].T
            self.weight_IR[start:stop].addmm_(towards_CC, errors_CR, alpha=-1)

    @property
    def _asked(self) -> int:
        """The number of columns that masks are asked for at a time."""
        return next(iter(self.chooses.values())).columns

    def _ask(self, start: int, stop: int) -> None:
        """Choose the mask of columns that are up to date."""
        cols = slice(start, stop)
        for name, choose in self.chooses.items():
            weight_OC = self.weight_IR[cols, self.rows[name]].T
            self.keep_IR[cols, self.rows[name]] = choose(weight_OC, cols, self.curvature_I[cols]).T


def _widths(chooses: Mapping[str, Choose]) -> tuple[int, ...]:
    """Return how many columns are swept together at each level, the widest first.

    The number that masks are asked for is one of them, and divides the wider ones.

    Raises:
        ValueError: masks are asked for different numbers of columns.
    """
    asked = {choose.columns for choose in chooses.values() if choose.adaptive}
    if not asked:
        return (_BLOCK, *_STRIPS)
    if len(asked) > 1:
        raise ValueError(f"masks of one tap are asked for {sorted(asked)} columns at a time")
    (columns,) = asked
    wider = {columns * max(1, round(size / columns)) for size in (_BLOCK, *_STRIPS)}
    narrower = {size for size in _STRIPS if size < columns}
    return tuple(sorted({columns, *wider, *narrower}, reverse=True))


def _transposed(matrix: Tensor) -> Tensor:
    """Return the transpose as a matrix of its own."""
    turned = matrix.new_empty(matrix.shape[::-1])
    _copy(matrix.T, turned)
    return turned


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy a transposed matrix, two to four times faster than at once on the host."""
    for read, written in zip(source.split(_COPIED, 1), target.split(_COPIED, 1), strict=True):
        written.copy_(read)
