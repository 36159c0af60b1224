"""The best weights for a given mask: least squares on the support of every row at once.

Legend: O outputs of one linear, R outputs of all linears of the tap, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.columnwise import solve_columns
from llmprune.solver.factor import factorise
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

_ENOUGH = 1e-4  # of a row's error: what the last step gained when a row is done
_PIECE = 2**25  # weights fitted at a time: there are five matrices of their size


def fit_supports(
    weights: Mapping[str, Tensor],
    stats: Stats,
    chooses: Mapping[str, Choose],
    settings: Settings,
) -> dict[str, Solved]:
    """Return pruned weights (float32, or float64 of float64 weights) that minimise the error.

    The error of a row w is (w - w') H (w - w')^T with the damped Gram matrix H, and w' is free
    where the mask keeps it. A columnwise sweep chooses the masks that adapt and gives the start;
    conjugate gradients on all rows at once do the rest, with one product with H for each of at most
    `settings.iterations` steps. No step makes a row worse.

    Without a factor nothing is updated and `degraded` is a fact, as in a columnwise sweep.

    Raises:
        NumericalError: the Gram matrix is not finite.

    Source: the support's normal equations; Meng et al., ALPS, algorithm 2 (the gradients).
    """
    gram_II = stats["gram"]
    with float32_products(gram_II.device):
        found = factorise(gram_II, settings)
        solved = solve_columns(weights, gram_II, found, chooses)
        if found.degraded:
            return solved
        added_I, dead_I = found.added_I, found.dead_I
        del found
        for name, (start_OI, keep_OI, facts) in solved.items():
            fitted_OI = fit(
                weights[name].to(start_OI.dtype).masked_fill(dead_I, 0),
                keep_OI & ~dead_I,
                start_OI,
                gram_II,
                added_I,
                settings.iterations,
            )
            fitted_OI[:, dead_I] = start_OI[:, dead_I]
            solved[name] = Solved(fitted_OI, keep_OI, facts)
    return solved


def fit(
    weight_OI: Tensor,
    keep_OI: Tensor,
    start_OI: Tensor,
    gram_II: Tensor,
    added_I: Tensor,
    iterations: int,
) -> Tensor:
    """Return new weights that minimise the error on a support, by conjugate gradients.

    A row starts from `start_OI` or from zeroing, whichever is better, and is done when a step gains
    less than a ten-thousandth of its error.

    >>> weight, keep = torch.tensor([[1.0, 1.0]]), torch.tensor([[True, False]])
    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> fit(weight, keep, torch.zeros(1, 2), gram, torch.zeros(2), 5)
    tensor([[1.5000, 0.0000]])
    """
    result_OI = masked(start_OI, keep_OI)
    gram_II, added_I = gram_II.to(result_OI.dtype), added_I.to(result_OI.dtype)
    rows = max(1, _PIECE // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        cut = slice(start, start + rows)
        _fit_rows(weight_OI[cut], keep_OI[cut], result_OI[cut], gram_II, added_I, iterations)
    return result_OI


def _fit_rows(
    weight_OI: Tensor,
    keep_OI: Tensor,
    result_OI: Tensor,
    gram_II: Tensor,
    added_I: Tensor,
    iterations: int,
) -> None:
    """Fit some rows in place; those that are done are left out once they are the half."""
    descent = _Descent.from_best(weight_OI, keep_OI, result_OI, gram_II, added_I)
    for _ in range(iterations):
        gained_R = descent.step()
        going_R = gained_R > _ENOUGH * descent.error_R
        num_going = int(going_R.count_nonzero())
        if num_going == 0:
            break
        if num_going <= len(going_R) // 2:
            descent.settle(result_OI)
            descent = descent.of(going_R)
    descent.settle(result_OI)


@dataclass(kw_only=True)
class _Descent:
    """Conjugate gradients on some rows, preconditioned by the diagonal.

    `residual_RI` is the negative gradient on the support, `error_R` the error of each row, of which
    every step knows the change.
    """

    place_R: Tensor
    solution_RI: Tensor
    keep_RI: Tensor
    residual_RI: Tensor
    direction_RI: Tensor
    slope_R: Tensor
    error_R: Tensor
    gram_II: Tensor
    added_I: Tensor
    scale_I: Tensor

    @classmethod
    def from_best(
        cls, weight_OI: Tensor, keep_OI: Tensor, start_OI: Tensor, gram_II: Tensor, added_I: Tensor
    ) -> _Descent:
        """Begin every row where its error is lower: at the start given, or at zeroing."""
        solution_RI, force_RI, error_R = start_OI, None, None
        for candidate_RI in (start_OI, masked(weight_OI, keep_OI)):
            change_RI = weight_OI - candidate_RI
            pull_RI = torch.addcmul(change_RI @ gram_II, change_RI, added_I)
            now_R = (change_RI * pull_RI).sum(dim=1)
            if error_R is None or force_RI is None:
                force_RI, error_R = pull_RI, now_R
                continue
            lower_R = (now_R < error_R)[:, None]
            solution_RI = torch.where(lower_R, candidate_RI, solution_RI)
            force_RI = torch.where(lower_R, pull_RI, force_RI)
            error_R = torch.minimum(now_R, error_R)
        assert force_RI is not None and error_R is not None
        residual_RI = force_RI.masked_fill_(~keep_OI, 0)
        scale_I = (gram_II.diagonal() + added_I).reciprocal()
        direction_RI = residual_RI * scale_I
        return cls(
            place_R=torch.arange(len(weight_OI), device=weight_OI.device),
            solution_RI=solution_RI.clone(),
            keep_RI=keep_OI,
            residual_RI=residual_RI,
            direction_RI=direction_RI,
            slope_R=(residual_RI * direction_RI).sum(dim=1),
            error_R=error_R,
            gram_II=gram_II,
            added_I=added_I,
            scale_I=scale_I,
        )

    def step(self) -> Tensor:
        """Go to the lowest point along the direction; return by how much errors fell."""
        image_RI = torch.addcmul(
            self.direction_RI @ self.gram_II, self.direction_RI, self.added_I
        ).mul_(self.keep_RI)
        bend_R = (self.direction_RI * image_RI).sum(dim=1)
        length_R = torch.where(bend_R > 0, self.slope_R / bend_R, 0.0)
        gained_R = length_R * self.slope_R
        self.solution_RI.addcmul_(self.direction_RI, length_R[:, None])
        self.residual_RI.addcmul_(image_RI, length_R[:, None], value=-1)
        self.error_R -= gained_R
        towards_RI = torch.mul(self.residual_RI, self.scale_I, out=image_RI)
        slope_R = (self.residual_RI * towards_RI).sum(dim=1)
        turn_R = torch.where(self.slope_R > 0, slope_R / self.slope_R, 0.0)
        self.direction_RI.mul_(turn_R[:, None]).add_(towards_RI)
        self.slope_R = slope_R
        return gained_R

    def settle(self, result_OI: Tensor) -> None:
        """Write the rows into their places."""
        result_OI[self.place_R] = self.solution_RI

    def of(self, going_R: Tensor) -> _Descent:
        """Return the descent of some of the rows."""
        return _Descent(
            place_R=self.place_R[going_R],
            solution_RI=self.solution_RI[going_R],
            keep_RI=self.keep_RI[going_R],
            residual_RI=self.residual_RI[going_R],
            direction_RI=self.direction_RI[going_R],
            slope_R=self.slope_R[going_R],
            error_R=self.error_R[going_R],
            gram_II=self.gram_II,
            added_I=self.added_I,
            scale_I=self.scale_I,
        )
