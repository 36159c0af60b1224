"""Masks at one bit per weight, as they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class PackedMask(NamedTuple):
    """A mask as bits, with the shape that they unpack to."""

    bits: Tensor
    shape: tuple[int, ...]


def pack(keep: Tensor) -> Tensor:
    """Return a boolean mask of any shape as bits, uint8 (ceil(n / 8),), on the host.

    Row-major; the first weight is the highest bit; the last byte is filled with zeros.

    >>> pack(torch.tensor([[True, False], [True, True]]))
    tensor([176], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(keep.contiguous().cpu().numpy()))


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the boolean mask of this shape from its bits.

    Raises:
        ValueError: the number of bytes does not fit the shape.

    >>> unpack(torch.tensor([176], dtype=torch.uint8), (2, 2))
    tensor([[ True, False],
            [ True,  True]])
    """
    num_bits = math.prod(shape)
    if packed.shape != (math.ceil(num_bits / 8),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} takes {math.ceil(num_bits / 8)} bytes, "
            f"found {tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.contiguous().cpu().numpy(), count=num_bits)
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))
