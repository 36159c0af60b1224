"""A mask applied to a weight: what is not kept becomes +0.0.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmprune.mask.pieces import PIECE, in_pieces

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(weight_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """Return a new weight: kept ones bit for bit, the others +0.0, NaN and infinity among them.

    On the host the bits are multiplied by the mask, ten times faster than a masked fill, and a
    weight that is mapped from a file is only read, which spares a private copy of every page.

    >>> masked(torch.tensor([[3.0, -1.0]]), torch.tensor([[True, False]]))
    tensor([[3., 0.]])
    """
    if weight_OI.device.type != "cpu":
        return weight_OI.masked_fill(~keep_OI, 0)
    bits_OI = weight_OI.detach().view(_BITS[weight_OI.itemsize]).numpy()
    result_OI = np.empty(bits_OI.shape, bits_OI.dtype)
    keep = keep_OI.numpy()

    def work(rows: slice) -> None:
        np.multiply(bits_OI[rows], keep[rows], out=result_OI[rows])

    in_pieces(work, len(bits_OI), max(1, PIECE // max(1, bits_OI.shape[1])))
    return torch.from_numpy(result_OI).view(weight_OI.dtype)
