"""Writing a mask into a weight: what is not kept becomes +0.0, in place.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmprune.mask.pieces import PIECE, in_pieces

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_out(weight_OI: Tensor, keep_OI: Tensor) -> None:
    """Set the weights that are not kept to +0.0, in place; NaN and infinity become zero too.

    On the host the bits of the weights are multiplied by the mask, about thirty times faster than a
    masked fill; the others stay bit for bit.

    >>> weight_OI = torch.tensor([[3.0, -1.0]])
    >>> zero_out(weight_OI, torch.tensor([[True, False]]))
    >>> weight_OI
    tensor([[3., 0.]])
    """
    if weight_OI.device.type != "cpu":
        weight_OI.masked_fill_(~keep_OI, 0)
        return
    bits_OI = weight_OI.detach().view(_BITS[weight_OI.itemsize]).numpy()
    keep = keep_OI.numpy()

    def work(rows: slice) -> None:
        np.multiply(bits_OI[rows], keep[rows], out=bits_OI[rows])

    in_pieces(work, len(bits_OI), max(1, PIECE // max(1, bits_OI.shape[1])))
