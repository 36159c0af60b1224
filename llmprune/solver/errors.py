"""How far a change of weights moves a linear's output, from the Gram matrix alone.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmprune.stats.precision import float32_products

_PIECE = 2**24  # values of a change that are multiplied at a time
_PANEL = 512  # columns of the Gram matrix at a time


def row_errors(delta_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Return the squared change of every output over all tokens, float64 (O,), never below 0.

    That is the diagonal of D G D^T for a change D of the weights, O I^2 operations, no forward. Of
    the symmetric matrix what lies above the diagonal is read; it counts twice.

    >>> row_errors(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    tensor([3.], dtype=torch.float64)
    """
    home = torch.device("cpu") if gram_II.device.type == "mps" else gram_II.device
    rows = max(1, _PIECE // max(1, len(gram_II)))
    found = []
    with float32_products(gram_II.device):
        for part_OI in delta_OI.split(rows):
            part_OI = part_OI.to(torch.promote_types(part_OI.dtype, gram_II.dtype))
            error_O = torch.zeros(len(part_OI), dtype=torch.float64, device=home)
            for start in range(0, len(gram_II), _PANEL):
                cols = slice(start, start + _PANEL)
                panel_IP = gram_II[: start + _PANEL, cols].to(part_OI.dtype)
                product_OP = part_OI[:, cols] @ panel_IP[start:]
                product_OP.addmm_(part_OI[:, :start], panel_IP[:start], alpha=2)
                error_O += torch.linalg.vecdot(product_OP, part_OI[:, cols]).to(error_O)
            found.append(error_O)
    return torch.cat(found).clamp_(min=0)


def relative_error(weight_OI: Tensor, solved_OI: Tensor, gram_II: Tensor) -> float:
    """Return the norm of the change of a linear's output over the norm of its output.

    Where the output was zero all along it is 0, or infinity if it no longer is.

    >>> weight, gram = torch.tensor([[3.0, 4.0]]), torch.eye(2)
    >>> relative_error(weight, torch.tensor([[0.0, 4.0]]), gram)
    0.6
    """
    wide = torch.promote_types(weight_OI.dtype, gram_II.dtype)
    change = float(row_errors(weight_OI.to(wide) - solved_OI.to(wide), gram_II).sum())
    return relative(change, float(row_errors(weight_OI, gram_II).sum()))


def relative(change: float, whole: float) -> float:
    """Return the root of the share that one squared norm is of another.

    >>> relative(9.0, 25.0), relative(0.0, 0.0), relative(1.0, 0.0)
    (0.6, 0.0, inf)
    """
    if whole == 0:
        return 0.0 if change == 0 else math.inf
    return math.sqrt(change / whole)
