"""The exponent of a spectrum's tail, as its description reads, one try after the other."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def exponent(weight: NDArray[np.float64]) -> float:
    """Square the singular values, find the fullest of 100 bins, and try every beginning near it."""
    values = sorted(float(value) ** 2 for value in np.linalg.svd(weight, compute_uv=False))
    decades = [math.log10(value) for value in values]
    width = (decades[-1] - decades[0]) / 100
    counts = [0] * 100
    for decade in decades:
        counts[min(99, int((decade - decades[0]) / width))] += 1
    peak = 10 ** (decades[0] + (counts.index(max(counts)) + 0.5) * width)
    tries = []
    for start, first in enumerate(values[:-1]):
        if 0.95 * peak <= first <= 1.5 * peak:
            tail = values[start:]
            alpha = 1 + len(tail) / sum(math.log(value / first) for value in tail)
            distance = max(
                abs(1 - (value / first) ** (1 - alpha) - rank / len(tail))
                for rank, value in enumerate(tail)
            )
            tries.append((distance, alpha))
    return min(tries)[1]
