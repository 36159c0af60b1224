"""The best low-rank form of a linear for what it reads: truncated SVD, weighed by the Gram matrix.

The output error of W' is ||(W - W') S||^2 for any S with S S^T = G, so the best W' of a rank cuts
the singular values of W S. Its factors are two linears, which no stock model has; `low_rank_dense`
is the same map as one matrix of the shape that was, which loads everywhere and saves nothing.
Legend: O outputs, I inputs, R rank, M the smaller of O and I.

Source: Wang et al., SVD-LLM (ICLR 2025). It whitens with a Cholesky factor and needs it inverted;
here W' = U U^T W with the singular vectors U of W S, which is the same matrix (W S S^-1 = W) and
exists for a singular Gram matrix too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.solver.factor import check_gram


class Factors(NamedTuple):
    """A linear as two: `left_OR @ right_RI`, the singular values shared evenly between them."""

    left_OR: Tensor
    right_RI: Tensor


def rank_for(shape: tuple[int, int], sparsity: float) -> int:
    """Return the rank whose factors hold no more than 1 - sparsity of an (O, I) weight, at least 1.

    Below O I / (O + I) two factors are smaller than the matrix; that is the rank of sparsity 0.

    >>> rank_for((4096, 4096), 0.2), rank_for((6, 3), 0.5)
    (1638, 1)
    """
    rows, columns = shape
    return max(1, int((1 - sparsity) * rows * columns / (rows + columns) + 1e-9))


def low_rank_factors(
    weight_OI: Tensor, gram_II: Tensor, rank: int, damping: float = 0.0
) -> Factors:
    """Return the factors of this rank whose output differs least from the weight's on its inputs.

    Computed in float64, returned in the weight's dtype; neither argument is changed. Dropping
    singular value i of W S costs its square. `damping` times the mean of the Gram matrix' diagonal
    is added to the diagonal first: towards the plain SVD, where inputs were few. The sign of a row
    of `right_RI` is that of its largest entry, made positive.

    Raises:
        NumericalError: the Gram matrix is not finite.
        ValueError: the rank is not from 1 to M.

    >>> weight, gram = torch.diag(torch.tensor([1.0, 1.5])), torch.diag(torch.tensor([4.0, 1.0]))
    >>> found = low_rank_factors(weight, gram, 1)
    >>> (found.left_OR @ found.right_RI).round()
    tensor([[1., 0.],
            [0., 0.]])
    """
    if not 1 <= rank <= min(weight_OI.shape):
        raise ValueError(f"rank {rank} of a weight of shape {tuple(weight_OI.shape)}")
    check_gram(gram_II)
    wide_OI, wide_II = _wide(weight_OI), _wide(gram_II).clone()
    wide_II.diagonal().add_(damping * wide_II.diagonal().mean())
    vectors_OR, values_R = _leading(wide_OI, wide_II, rank)
    right_RI = vectors_OR.T @ wide_OI
    largest_R = right_RI.abs().argmax(dim=1, keepdim=True)
    sign_R1 = torch.where(right_RI.gather(1, largest_R) < 0, -1.0, 1.0)
    # half of the digits count, as squares were computed: below, a value is 0 and shares nothing
    root_R = torch.where(values_R > 1e-7 * values_R[0], values_R.sqrt(), 1.0)
    left_OR = vectors_OR * sign_R1.T * root_R
    right_RI = right_RI * sign_R1 / root_R[:, None]
    return Factors(*(part.to(weight_OI.device, weight_OI.dtype) for part in (left_OR, right_RI)))


def low_rank_dense(weight_OI: Tensor, gram_II: Tensor, rank: int, damping: float = 0.0) -> Tensor:
    """Return the best weight_OI of this rank as one matrix, in the weight's shape and dtype.

    Its factors are multiplied in float64. Rounded to 16 bits it is no longer of exactly this rank.
    """
    factors = low_rank_factors(_wide(weight_OI), gram_II, rank, damping)
    return (factors.left_OR @ factors.right_RI).to(weight_OI.device, weight_OI.dtype)


def dropped_error(weight_OI: Tensor, gram_II: Tensor, rank: int) -> float:
    """Return the share of a linear's output energy that the best weight of a rank loses.

    It is the sum of the squared singular values of W S that are dropped, over that of all.

    >>> weight, gram = torch.diag(torch.tensor([1.0, 1.5])), torch.diag(torch.tensor([4.0, 1.0]))
    >>> dropped_error(weight, gram, 1)
    0.36
    """
    check_gram(gram_II)
    squares_M, _, _ = _spectrum(_wide(weight_OI), _wide(gram_II))
    whole = float(squares_M.sum())
    return float(squares_M[rank:].sum()) / whole if whole else 0.0


def _leading(weight_OI: Tensor, gram_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors_OR of W S, and its singular values_R."""
    squares_M, vectors_MM, basis_OM = _spectrum(weight_OI, gram_II)
    vectors_OR = vectors_MM[:, :rank]
    if basis_OM is not None:
        vectors_OR = basis_OM @ vectors_OR
    return vectors_OR, squares_M[:rank].sqrt()


def _spectrum(weight_OI: Tensor, gram_II: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the squared singular values of W S, the largest first, and its left singular vectors.

    They are eigenvectors of W G W^T. Of a tall W = B T, with orthonormal columns in B, the smaller
    T G T^T is taken, and the vectors are in the basis B.
    """
    basis_OM = None
    if weight_OI.shape[0] > weight_OI.shape[1]:
        basis_OM, weight_OI = torch.linalg.qr(weight_OI)
    squares_M, vectors_MM = torch.linalg.eigh(weight_OI @ gram_II @ weight_OI.T)
    return squares_M.flip(0).clamp(min=0), vectors_MM.flip(1), basis_OM


def _wide(value: Tensor) -> Tensor:
    """Return a matrix in float64, on the host where it lies on MPS, which has no such numbers."""
    home = torch.device("cpu") if value.device.type == "mps" else value.device
    return value.to(home, torch.float64)
