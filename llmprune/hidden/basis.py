"""On which axes the residual stream is kept: its principal axes, or its channels of most weight.

Legend: D hidden size, K channels that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.solver.factor import check_gram


def principal_axes(gram_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotation_DD and energy_D: eigenvectors as columns, and eigenvalues, the largest first.

    Float64 on the host. The sign of a column is that of its largest entry (the first of several),
    made positive, so that the same Gram matrix gives the same axes. Axes of equal energy are any of
    their plane. No damping is added: it would add one number to all eigenvalues and turn no axis.

    Raises:
        NumericalError: the matrix is not finite.

    Source: SliceGPT, section 3.3.

    >>> principal_axes(torch.tensor([[7.0, 5.0], [5.0, 7.0]]))[1].round()
    tensor([12.,  2.], dtype=torch.float64)
    """
    check_gram(gram_DD)
    wide_DD = gram_DD.detach().to("cpu", torch.float64)
    energy_D, axes_DD = torch.linalg.eigh((wide_DD + wide_DD.T) / 2)
    energy_D, axes_DD = energy_D.flip(0), axes_DD.flip(1)
    largest_D = axes_DD.abs().max(dim=0).values
    first_D = (axes_DD.abs() >= largest_D * (1 - 1e-9)).int().argmax(dim=0)
    signs_D = axes_DD.gather(0, first_D[None])[0].sign()
    return (axes_DD * signs_D).contiguous(), energy_D.clamp(min=0)


def kept_energy(energy_D: Tensor, width: int) -> float:
    """Return the share of the stream's energy that the first `width` axes hold.

    >>> kept_energy(torch.tensor([12.0, 2.0]), 1)
    0.8571428571428571
    """
    whole = float(energy_D.double().sum())
    return float(energy_D[:width].double().sum()) / whole if whole else 1.0


def top_channels(score_D: Tensor, width: int) -> Tensor:
    """Return kept_K, ascending: the channels of the highest scores; of equal ones the first.

    >>> top_channels(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
    tensor([1, 2])
    """
    order_D = torch.argsort(score_D.detach().cpu(), descending=True, stable=True)
    return order_D[:width].sort().values
