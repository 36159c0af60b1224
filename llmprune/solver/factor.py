"""The factor of the inverse of a damped Gram matrix, made once for all linears of a tap.

Legend: I inputs of the tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.solver.types import Settings

_INVERTED_AT_ONCE = 128
_FIRST_DAMPING, _LARGEST_DAMPING = 1e-4, 1.0  # the first where none was asked for
_MISSED = 0.1  # of a vector, when a factor maps it forth and back


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What solvers need of a Gram matrix G of one tap.

    `upper_II` is U with (G + diag(added_I))^-1 = U^T U, upper triangular, float32 or float64; none
    where no damping helped, and then `degraded` is True. `damping` is what multiplied the diagonal
    in the end, in the unit of the recipe. `dead_I` marks inputs that were always zero: 1 is added
    there, so that the rest is what it would be without them.
    """

    upper_II: Tensor | None
    damping: float
    added_I: Tensor
    dead_I: Tensor

    @property
    def degraded(self) -> bool:
        """Tell that there is no factor."""
        return self.upper_II is None


def factorise(gram_II: Tensor, settings: Settings) -> Factor:
    """Return the factor of a Gram matrix, which stays as it is.

    The damping asked for is tried in float32, then in float64, then times 10 up to 1, always from
    the matrix given. A factor must be finite, and map a vector forth and back.

    The factor is the inverse of a Cholesky factor taken from the last row upwards, which costs half
    of what Cholesky, inverse and Cholesky again do, and never holds the inverse itself.

    Raises:
        NumericalError: the matrix is not finite; names columns.

    >>> found = factorise(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), Settings(damping=0.5))
    >>> found.added_I, found.upper_II
    (tensor([1., 1.]), tensor([[0.5000, 0.0000],
            [0.0000, 0.7071]]))
    """
    check_gram(gram_II)
    dead_I = gram_II.diagonal() == 0
    added_I = torch.zeros_like(gram_II.diagonal())
    damping = settings.damping
    for damping in _dampings(settings.damping):
        added_I = _added(gram_II, dead_I, damping, settings).masked_fill_(dead_I, 1)
        for dtype in dict.fromkeys((gram_II.dtype, torch.float64)):
            upper_II = _inverse_factor(gram_II, added_I, dtype)
            if upper_II is not None and _maps_back(gram_II, added_I, upper_II):
                return Factor(upper_II=upper_II, damping=damping, added_I=added_I, dead_I=dead_I)
    return Factor(upper_II=None, damping=damping, added_I=added_I, dead_I=dead_I)


def check_gram(gram_II: Tensor) -> None:
    """Check a Gram matrix for NaN and infinity.

    Raises:
        NumericalError: it is not finite; names columns.
    """
    low, high = torch.aminmax(gram_II)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    broken = (~torch.isfinite(gram_II).all(dim=0)).nonzero().flatten().tolist()
    named = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
    raise NumericalError(
        f"the Gram matrix of {len(gram_II)} inputs holds NaN or infinity in {len(broken)} columns "
        f"({named}). Finite activations are needed: use --dtype bfloat16 or float32 where float16 "
        "overflows; otherwise the checkpoint is damaged."
    )


def _dampings(first: float) -> Iterator[float]:
    """Yield the damping asked for, and ten times more until it is 1."""
    yield first
    damping = first or _FIRST_DAMPING / 10
    while damping < _LARGEST_DAMPING * (1 - 1e-9):
        damping = min(10 * damping, _LARGEST_DAMPING)
        yield damping


def _added(gram_II: Tensor, dead_I: Tensor, damping: float, settings: Settings) -> Tensor:
    """Return new numbers to add to the diagonal; dead inputs do not count in the mean."""
    diagonal_I = gram_II.diagonal()
    if settings.damp == "diag":
        return damping * diagonal_I
    num_alive = len(diagonal_I) - int(dead_I.count_nonzero())
    mean = float(diagonal_I.sum(dtype=_sum_dtype(gram_II))) / max(1, num_alive)
    return torch.full_like(diagonal_I, damping * mean)


def _sum_dtype(gram_II: Tensor) -> torch.dtype:
    """Return float64, or what the device has."""
    return gram_II.dtype if gram_II.device.type == "mps" else torch.float64


def _inverse_factor(gram_II: Tensor, added_I: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return U, upper, with (G + diag(added_I))^-1 = U^T U, or None where Cholesky breaks down.

    With both axes flipped, G + diag = L L^T becomes R R^T with an upper R, and U is its inverse.
    Three matrices of this size at most are alive: the one given and two more.
    """
    home = torch.device("cpu") if gram_II.device.type == "mps" else gram_II.device
    damped_II = gram_II.to(home, dtype).flip(0, 1)
    damped_II.diagonal().add_(added_I.to(home, dtype).flip(0))
    lower_II, info = torch.linalg.cholesky_ex(damped_II)
    del damped_II
    if int(info) != 0:
        return None
    _invert_lower(lower_II)
    upper_II: Tensor = lower_II.flip(0, 1)
    del lower_II
    return upper_II.to(gram_II.device, gram_II.dtype)


def _invert_lower(lower_II: Tensor) -> None:
    """Turn a lower triangular matrix into its inverse, in its place, in n^3 / 3 multiply-adds.

    The inverse of [[A, 0], [B, C]] is [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    size = len(lower_II)
    if size <= _INVERTED_AT_ONCE:
        one_II = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        lower_II.copy_(torch.linalg.solve_triangular(lower_II, one_II, upper=False))
        return
    half = _INVERTED_AT_ONCE * -(-size // (2 * _INVERTED_AT_ONCE))
    first, below, last = lower_II[:half, :half], lower_II[half:, :half], lower_II[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    torch.mm(last, below @ first, out=below)
    below.neg_()


def _maps_back(gram_II: Tensor, added_I: Tensor, upper_II: Tensor) -> bool:
    """Tell whether a factor is one: (G + diag) U^T U z is close to z for a z of +-1.

    Cholesky in float32 ends without complaint on matrices that are far too ill-conditioned for it.
    """
    size = len(upper_II)
    signs_I = torch.ones(size, dtype=upper_II.dtype, device=upper_II.device)
    signs_I[torch.arange(size, device=upper_II.device).square() % 7 % 2 == 1] = -1
    solved_I = upper_II.T @ (upper_II @ signs_I)
    back_I = gram_II @ solved_I + added_I * solved_I
    missed = torch.linalg.vector_norm(back_I - signs_I)
    return bool(missed <= _MISSED * size**0.5)
