"""How much of a linear's output is lost when a share of its weights goes.

Legend: O outputs, I inputs, R rows looked at, L levels of a curve.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.stats.precision import float32_products, wide_sum
from llmprune.stats.types import Stats

LEVELS = np.linspace(0.0, 1.0, 21)
"""The shares at which a curve is known; between them its cube root is taken as straight."""

_ROWS = (
    512  # of a linear that are looked at, evenly spread: each level is a product (R, I) x (I, I)
)

Floats = NDArray[np.float64]


def error_curve(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return tr(D G D^T) / tr(W G W^T) at all LEVELS, float64 (L,), from 0 to 1 and never falling.

    D holds the weights that Wanda removes from each row at that level, the others unchanged. Of
    more than 512 rows an even sample is looked at. Where no token reached the tap, or it carried
    nothing, inputs are taken as white. What an earlier pruning removed goes first and costs
    nothing.

    >>> stats = Stats(num_tokens=2, values={"gram": torch.eye(20)})
    >>> error_curve(torch.ones(1, 20), stats, None)[[0, 10, 20]].tolist()
    [0.0, 0.5, 1.0]
    """
    spread = max(1, -(-weight_OI.shape[0] // _ROWS))
    weight_RI = weight_OI.detach()[::spread].to(torch.float32)
    white_II = torch.eye(weight_RI.shape[1], device=weight_RI.device)
    grams = [stats["gram"].to(weight_RI)] if stats.num_tokens else []
    for gram_II in [*grams, white_II]:
        error_L = _errors(weight_RI, gram_II)
        if bool(error_L.isfinite().all()) and float(error_L[-1]) > 0:
            return (error_L / error_L[-1]).clamp_(0, 1).cummax(dim=0).values
    return torch.linspace(0, 1, len(LEVELS), dtype=torch.float64)


def weighted_curve(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return the error curve of a linear times what its block adds to the residual stream.

    A linear of a block that hardly changes what passes through it matters little, however much of
    its own output is lost: `influence` is the mean over tokens of ||output - input||^2 /
    ||output||^2 of the block, 1 where no token was seen.

    >>> stats = Stats(num_tokens=2, values={"gram": torch.eye(20), "influence": torch.tensor(0.1)})
    >>> round(float(weighted_curve(torch.ones(1, 20), stats, None)[10]), 6)
    0.05
    """
    influence = float(stats.values["influence"]) if "influence" in stats.values else 1.0
    return error_curve(weight_OI, stats, keep_OI) * influence


def error_at(curve_L: Floats, shares: Floats) -> Floats:
    """Return the error at any shares from 0 to 1, in the shape of these.

    For many small weights of even density the error grows with the cube of the share.

    >>> error_at(LEVELS**3, np.array([0.025])).round(9).tolist()
    [1.5625e-05]
    """
    found: Floats = np.interp(shares, LEVELS, np.cbrt(curve_L)) ** 3
    return found


def _errors(weight_RI: Tensor, gram_II: Tensor) -> Tensor:
    """Return tr(D G D^T) at all levels, float64 (L,), on the host."""
    num = weight_RI.shape[1]
    score_RI = weight_RI.abs() * gram_II.diagonal().clamp(min=0).sqrt()
    order_RI = score_RI.argsort(dim=1, stable=True)
    rank_RI = torch.empty_like(order_RI)
    rank_RI.scatter_(1, order_RI, torch.arange(num, device=rank_RI.device).expand_as(rank_RI))
    errors = []
    with float32_products(weight_RI.device):
        for level in LEVELS.tolist():
            lost_RI = weight_RI.masked_fill(rank_RI >= round(level * num), 0.0)
            errors.append(wide_sum((lost_RI @ gram_II).mul_(lost_RI)))
    return torch.stack(errors).cpu()
