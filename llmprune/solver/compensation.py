"""What makes up for whole columns that go: the columns that stay, a bias, or both.

All work on the linear that reads the units as columns. True = kept. Legend: O outputs, I inputs, K
columns that stay, P columns that go, U units, W columns of one unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.score.unit_curvature import damped_inverse, removal_costs
from llmprune.solver.factor import factorise
from llmprune.solver.types import Settings
from llmprune.stats.precision import float32_products

_PIECE = 2**24  # weights of the columns that go that are multiplied at a time


def fit_columns(weight_OI: Tensor, gram_II: Tensor, keep_I: Tensor, damping: float) -> Tensor:
    """Return new weights, zero in the columns that go, that change the linear's output the least.

    By how much a change D of the weights does so is tr(D H D^T), where H is the Gram matrix G with
    `damping` times the mean of its diagonal added to the diagonal: kept columns gain
    W_P G_PK (H_KK)^-1, and their change is what is damped. Never worse than zeroing alone. One
    factor of the kept part serves all rows; where it needs more damping it gets it, as in the other
    solvers. Float32, or float64 where an argument is.

    Raises:
        NumericalError: the Gram matrix is not finite, or no damping gave a factor.

    Source: the normal equations of all rows on one support.

    >>> gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    >>> keep = torch.tensor([True, False, True])
    >>> fit_columns(torch.ones(1, 3), gram, keep, 0.0)
    tensor([[1.5000, 0.0000, 1.5000]])
    """
    dtype = _wide(weight_OI, gram_II)
    keep_I = keep_I.to(gram_II.device)
    kept_K, gone_P = keep_I.nonzero().flatten(), (~keep_I).nonzero().flatten()
    result_OI = weight_OI.detach().to(gram_II.device, dtype, copy=True)
    lost_OP = result_OI.index_select(1, gone_P)
    result_OI.index_fill_(1, gone_P, 0)
    if not len(kept_K) or not len(gone_P):
        return result_OI.to(weight_OI.device)
    cross_PK = gram_II.index_select(0, gone_P).index_select(1, kept_K).to(dtype)
    with float32_products(gram_II.device):
        upper_KK = _factor_of(gram_II, kept_K, damping).to(dtype)
        rows = max(1, _PIECE // len(keep_I))
        for at in range(0, len(result_OI), rows):
            part_OI = result_OI[at : at + rows]
            moved_OK = lost_OP[at : at + rows] @ cross_PK @ upper_KK.T @ upper_KK
            part_OI.index_add_(1, kept_K, moved_OK)
    return result_OI.to(weight_OI.device)


def mean_bias(weight_OI: Tensor, col_mean_I: Tensor, keep_I: Tensor) -> Tensor:
    """Return bias_O, float64: what the columns that go give on average, to be added to a bias.

    Source: An et al., FLAP (its bias compensation).

    >>> weight = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> mean_bias(weight, torch.tensor([5.0, 2.0]), torch.tensor([True, False]))
    tensor([4., 2.], dtype=torch.float64)
    """
    gone_I = torch.where(keep_I.to(col_mean_I.device), 0.0, col_mean_I)
    return _outputs(weight_OI, gone_I)


def fit_with_bias(
    weight_OI: Tensor,
    gram_II: Tensor,
    col_mean_I: Tensor,
    num_tokens: int,
    keep_I: Tensor,
    damping: float,
) -> tuple[Tensor, Tensor]:
    """Return weights as `fit_columns` does, for inputs less their mean, and bias_O (float64).

    Together they are the least-squares fit with an intercept: never worse, over the tokens seen,
    than either alone at no damping.

    Raises:
        NumericalError: as `fit_columns`.

    >>> x = torch.tensor([[1.0, 3.0], [2.0, 5.0], [3.0, 7.0]])
    >>> keep = torch.tensor([True, False])
    >>> weight, bias = fit_with_bias(torch.ones(1, 2), x.T @ x, x.mean(0), 3, keep, 0.0)
    >>> weight.round(decimals=3), bias.round(decimals=3)
    (tensor([[3., 0.]]), tensor([1.], dtype=torch.float64))
    """
    fitted_OI = fit_columns(
        weight_OI, _covariance(gram_II, col_mean_I, num_tokens), keep_I, damping
    )
    change_OI = weight_OI.detach().to(fitted_OI.dtype) - fitted_OI
    return fitted_OI, _outputs(change_OI, col_mean_I)


def remove_columns(
    weight_OI: Tensor, gram_II: Tensor, count: int, damping: float, width: int = 1
) -> tuple[Tensor, Tensor]:
    """Return keep_I and new weights: `count` times the unit that costs least goes, and all columns
    that stay make up for it before the next is chosen. A unit is `width` consecutive columns.

    Of equal costs the first goes. Inputs that were always zero cost nothing. The weights are those
    that `fit_columns` gives for this mask. Computed in float64 (of MPS: on the host), I^2
    operations for every column that goes; the weights returned are float32, or float64 where an
    argument is.

    Raises:
        NumericalError: as `damped_inverse`, or rounding has left no cost that is a number.
        ValueError: `count` is not between 0 and the number of units.

    Source: Hassibi & Stork, Optimal Brain Surgeon, and its blocks of columns.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> remove_columns(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), gram, 1, 0.0)
    (tensor([ True, False]), tensor([[2.0000, 0.0000],
            [3.5000, 0.0000]]))
    """
    num_columns = weight_OI.shape[1]
    num_units = num_columns // width
    if num_units * width != num_columns or not 0 <= count <= num_units:
        raise ValueError(f"cannot remove {count} units of {width} of {num_columns} columns")
    inverse_II = damped_inverse(gram_II, damping)
    dead_I = (gram_II.diagonal() == 0).to(inverse_II.device)
    now_OI = weight_OI.detach().to(inverse_II, copy=True).masked_fill_(dead_I, 0)
    gone_U = torch.zeros(num_units, dtype=torch.bool, device=inverse_II.device)
    for _ in range(count):
        cost_U = removal_costs(now_OI, inverse_II, width).masked_fill(gone_U, torch.inf)
        if not bool(torch.isfinite(cost_U).any()):
            raise NumericalError(
                f"the inverse Gram matrix of {num_columns} columns is lost to rounding after "
                f"{int(gone_U.sum())} of {count} removals at damping {damping:g}. "
                f"More damping is needed: type --set prune.damping={max(10 * damping, 0.01):g}."
            )
        unit = int(cost_U.argmin())
        _take_out(now_OI, inverse_II, slice(unit * width, (unit + 1) * width))
        gone_U[unit] = True
    keep_I = (~gone_U).repeat_interleave(width)
    now_OI[:, dead_I & keep_I] = weight_OI.to(now_OI)[:, dead_I & keep_I]
    return keep_I.to(weight_OI.device), now_OI.to(weight_OI.device, _wide(weight_OI, gram_II))


def _take_out(weight_OI: Tensor, inverse_II: Tensor, cols: slice) -> None:
    """Remove columns in place: fit the others anew, and make the inverse that of the others."""
    across_IW = inverse_II[:, cols].clone()
    moved_WI = torch.linalg.solve(across_IW[cols], across_IW.T)
    weight_OI.addmm_(weight_OI[:, cols].clone(), moved_WI, alpha=-1)
    inverse_II.addmm_(across_IW, moved_WI, alpha=-1)
    weight_OI[:, cols] = 0
    inverse_II[cols] = 0
    inverse_II[:, cols] = 0


def _factor_of(gram_II: Tensor, kept_K: Tensor, damping: float) -> Tensor:
    """Return U with (G_KK + damping mean(diag G))^-1 = U^T U.

    Raises:
        NumericalError: the Gram matrix is not finite, or no damping gave a factor.
    """
    gram_KK = gram_II.index_select(0, kept_K).index_select(1, kept_K)
    of_all, of_kept = _mean_diagonal(gram_II), _mean_diagonal(gram_KK)
    found = factorise(gram_KK, Settings(damping=damping * of_all / of_kept if of_kept else 0.0))
    if found.upper_II is None:
        raise NumericalError(
            f"the Gram matrix of {len(kept_K)} columns that stay has no factor with damping up to "
            f"{found.damping:g}. Type --set prune.damping=1, or --dtype float32 where activations "
            "are of half precision."
        )
    return found.upper_II


def _mean_diagonal(gram_II: Tensor) -> float:
    """Return the mean of the diagonal over inputs that were not always zero; 0 if all were."""
    diagonal_I = gram_II.diagonal().cpu().double()
    return float(diagonal_I.sum()) / max(1, int(diagonal_I.count_nonzero()))


def _covariance(gram_II: Tensor, col_mean_I: Tensor, num_tokens: int) -> Tensor:
    """Return the mean of products less the product of means, computed in float64, as the Gram."""
    home = torch.device("cpu") if gram_II.device.type == "mps" else gram_II.device
    wide_II = gram_II.to(home, torch.float64, copy=True).div_(num_tokens)
    mean_I = col_mean_I.to(wide_II)
    wide_II.addr_(mean_I, mean_I, alpha=-1)
    wide_II.diagonal().clamp_(min=0)
    return wide_II.to(gram_II.device, torch.promote_types(gram_II.dtype, torch.float32))


def _wide(weight_OI: Tensor, gram_II: Tensor) -> torch.dtype:
    """Return float32, or float64 where either is float64."""
    return torch.promote_types(torch.promote_types(weight_OI.dtype, gram_II.dtype), torch.float32)


def _outputs(weight_OI: Tensor, input_I: Tensor) -> Tensor:
    """Return W x, float64, on the device of the weight (of MPS: on the host)."""
    home = torch.device("cpu") if weight_OI.device.type == "mps" else weight_OI.device
    input_I = input_I.to(home, torch.float64)
    rows = max(1, _PIECE // max(1, weight_OI.shape[1]))
    parts = weight_OI.detach().split(rows)
    return torch.cat([part_OI.to(input_I) @ input_I for part_OI in parts])
