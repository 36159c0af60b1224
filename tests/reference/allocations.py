"""Shares under a budget as their definitions read: every combination, every level on its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def cheapest_of_all(errors: Sequence[Sequence[float]], budget: int) -> float:
    """Return the least sum of errors over all combinations that spend the budget."""
    return min(
        sum(each[units] for each, units in zip(errors, chosen, strict=True))
        for chosen in product(*[range(len(each)) for each in errors])
        if sum(chosen) == budget
    )


def error_curve(weight_OI: Tensor, gram_II: Tensor, levels: Sequence[float]) -> list[float]:
    """Return the relative output error of Wanda's mask at every level, row by row, in float64."""
    weight, gram = weight_OI.double(), gram_II.double()
    whole = sum(float(row @ gram @ row) for row in weight)
    found = []
    for level in levels:
        error = 0.0
        for row in weight:
            scores = (row.abs() * gram.diagonal().sqrt()).tolist()
            lost = torch.zeros_like(row)
            for index in sorted(range(len(row)), key=scores.__getitem__)[: round(level * len(row))]:
                lost[index] = row[index]
            error += float(lost @ gram @ lost)
        found.append(error / whole)
    return found
