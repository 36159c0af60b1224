"""Zeroing: kept weights untouched, the others exactly zero."""

from __future__ import annotations

import math

import pytest
import torch

from llmprune.mask.pattern import Unstructured, choose_keep
from llmprune.solver import SOLVERS
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.types import Stats

EMPTY = Stats(num_tokens=0, values={})
T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])


def solve(weight: torch.Tensor, keep: torch.Tensor) -> Solved:
    asked = []

    def choose(weight: torch.Tensor, cols: slice, curvature: torch.Tensor | None) -> torch.Tensor:
        asked.append((cols, curvature))
        return keep

    solved = SOLVERS["zero"].fn({"q": weight}, EMPTY, {"q": Choose(fn=choose)}, Settings())
    assert list(solved) == ["q"]
    assert asked == [(slice(0, weight.shape[1]), None)]
    return solved["q"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_of_each_row_goes_and_the_rest_stays(dtype: torch.dtype) -> None:
    keep = choose_keep(Unstructured(), T1_WEIGHT.abs(), 4, "row")
    solved = solve(T1_WEIGHT.to(dtype, copy=True), keep)
    assert solved.weight_OI.tolist() == [[4.0, 0.0, 0.0, -3.0], [0.0, 5.0, -2.0, 0.0]]
    assert solved.weight_OI.dtype == dtype
    assert torch.equal(solved.keep_OI, keep)


def test_the_tensor_given_stays_as_it_is() -> None:
    weight = T1_WEIGHT.clone()
    solved = solve(weight, weight > 0)
    assert solved.weight_OI.tolist() == [[4.0, 0.0, 2.0, 0.0], [1.0, 5.0, 0.0, 0.5]]
    assert torch.equal(weight, T1_WEIGHT)


def test_a_transposed_weight_is_zeroed_where_its_rows_say() -> None:
    weight = T1_WEIGHT.T.contiguous().T
    assert torch.equal(solve(weight, weight > 0).weight_OI, T1_WEIGHT.clamp(min=0))


def test_what_is_pruned_becomes_positive_zero_whatever_it_was() -> None:
    weight = torch.tensor([[math.inf, math.nan, -1.0, -0.0]])
    solved = solve(weight, torch.zeros(1, 4, dtype=torch.bool))
    assert solved.weight_OI.view(torch.int32).tolist() == [[0, 0, 0, 0]]


def test_a_kept_zero_is_still_kept() -> None:
    solved = solve(torch.zeros(1, 2), torch.tensor([[True, False]]))
    assert solved.keep_OI.tolist() == [[True, False]]
