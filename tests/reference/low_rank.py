"""A low-rank linear as the paper writes it: whiten with Cholesky, cut the SVD, undo S."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def whitened_truncation(weight: Matrix, gram: Matrix, rank: int) -> tuple[Matrix, Matrix, float]:
    """Return U_r Sigma_r^(1/2), Sigma_r^(1/2) V_r^T S^-1, and the sum of the squares dropped."""
    root = np.linalg.cholesky(gram)
    left, values, right = np.linalg.svd(weight @ root, full_matrices=False)
    half = np.diag(np.sqrt(values[:rank]))
    inverse = np.linalg.inv(root)
    return left[:, :rank] @ half, half @ right[:rank] @ inverse, float((values[rank:] ** 2).sum())
