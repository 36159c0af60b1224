"""Second-order pruning as its formulas read: explicit inverses, row by row, float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Scores = Callable[[Tensor], Tensor]


def damped(gram_II: Tensor, damping: float) -> Tensor:
    """Return the Gram matrix with a share of its mean diagonal on the diagonal."""
    gram_II = gram_II.double()
    return gram_II + damping * gram_II.diagonal().mean() * torch.eye(len(gram_II)).double()


def curvatures(hessian_II: Tensor) -> Tensor:
    """Return, for every column, the first entry of the inverse of what is left from it on."""
    size = len(hessian_II)
    return torch.stack([torch.linalg.inv(hessian_II[i:, i:])[0, 0] for i in range(size)])


def surgeon(weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Remove weights from left to right; the columns that follow make up for each removal."""
    result_OI = weight_OI.double().clone()
    for column in range(len(hessian_II)):
        inverse = torch.linalg.inv(hessian_II[column:, column:])
        for row in range(len(result_OI)):
            if not keep_OI[row, column]:
                step = result_OI[row, column] / inverse[0, 0]
                result_OI[row, column:] -= step * inverse[0]
                result_OI[row, column] = 0
    return result_OI


def surgeon_in_groups(
    weight_OI: Tensor, hessian_II: Tensor, width: int, kept: Scores
) -> tuple[Tensor, Tensor]:
    """Choose the mask of `width` columns at a time on the weights as they are then; return both."""
    result_OI, keep_OI = weight_OI.double().clone(), torch.ones(weight_OI.shape, dtype=torch.bool)
    curvature_I = curvatures(hessian_II)
    for start in range(0, len(hessian_II), width):
        cols = slice(start, start + width)
        group_OI = torch.ones_like(keep_OI)
        group_OI[:, cols] = kept(result_OI[:, cols].square() / curvature_I[cols])
        keep_OI &= group_OI
        result_OI = surgeon(result_OI, group_OI, hessian_II)
    return result_OI, keep_OI


def least_squares(weight_OI: Tensor, keep_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Solve the normal equations of every row's support."""
    result_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row, weight_I in enumerate(weight_OI.double()):
        support = keep_OI[row].nonzero().flatten()
        if len(support):
            right = hessian_II[support] @ weight_I
            inner = hessian_II[support][:, support]
            result_OI[row, support] = torch.linalg.solve(inner, right)
    return result_OI


def distortion(delta_OI: Tensor, gram_II: Tensor) -> float:
    """Return the trace of D G D^T."""
    delta_OI, gram_II = delta_OI.double(), gram_II.double()
    return float(torch.trace(delta_OI @ gram_II @ delta_OI.T))
