"""How float32 matrices are multiplied on CUDA, for as long as a sum or a solver needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def float32_products(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Multiply float32 matrices on a CUDA device in TF32, or strictly, whatever a program has set.

    TF32 has 11 significant bits. Solvers need all 24; inputs of half precision have no more than 11
    themselves, and products are summed in float32, so that nothing is rounded in TF32.

    >>> with float32_products(torch.device("cpu")):
    ...     pass
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def wide_sum(values: Tensor) -> Tensor:
    """Return the sum of all values in float64, (): on their device, or on the host for MPS, which
    has no such numbers.

    >>> wide_sum(torch.full((3,), 0.5))
    tensor(1.5000, dtype=torch.float64)
    """
    held = values.cpu() if values.device.type == "mps" else values
    return held.sum(dtype=torch.float64)
