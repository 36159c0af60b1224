"""Scores as their formulas read: one weight after the other, in Python's floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def relative_importance(
    weight: Sequence[Sequence[float]], norms: Sequence[float]
) -> list[list[float]]:
    """Return RIA with the exponent 0.5; a weight in an empty row or column counts nothing there."""

    def part(value: float, whole: float) -> float:
        return value / whole if whole else 0.0

    found = []
    for row in weight:
        in_row = sum(abs(value) for value in row)
        scores = []
        for column, value in enumerate(row):
            in_column = sum(abs(other[column]) for other in weight)
            share = part(abs(value), in_column) + part(abs(value), in_row)
            scores.append(share * math.sqrt(norms[column]))
        found.append(scores)
    return found


def layer_adaptive(weights: Sequence[float]) -> list[float]:
    """Return LAMP: each square over the sum of the squares that are as large or larger."""
    squares = [value * value for value in weights]
    sums = [math.fsum(other for other in squares if other >= square) for square in squares]
    return [square / whole if whole else 0.0 for square, whole in zip(squares, sums, strict=True)]
