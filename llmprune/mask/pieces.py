"""Work on long arrays in pieces that stay near the cache, on as many threads as torch was given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

PIECE = 2**20  # values handled at a time: enough work for a thread, yet near the cache


def in_pieces(work: Callable[[slice], T], length: int, size: int) -> list[T]:
    """Run `work` on consecutive slices, on torch's number of threads; results in order."""
    parts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    num_threads = min(torch.get_num_threads(), len(parts))
    if num_threads < 2 or len(parts) < 16:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, parts))
