"""What a change of weights costs, and which solved rows are taken."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.solver.acceptance import accept
from llmprune.solver.errors import relative_error, row_errors
from llmprune.solver.types import Solved
from tests.reference import second_order

T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
T1_GRAM = torch.tensor([[6.0, 1, 2, 2], [1, 11, 4, -1], [2, 4, 6, 2], [2, -1, 2, 3]])
T1_KEEP = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
T1_BEST = torch.tensor([[3.928571, 0, 0, -1.285714], [0, 4.82, -1.38, 0]])
T1_ZEROED = T1_WEIGHT * T1_KEEP


def test_errors_on_the_fixture() -> None:
    errors = row_errors(T1_WEIGHT - T1_ZEROED, T1_GRAM)
    assert errors.dtype == torch.float64
    assert float(errors.sum()) == pytest.approx(27.75)
    assert float(row_errors(T1_WEIGHT - T1_BEST, T1_GRAM).sum()) == pytest.approx(17.622857)


@given(seed=st.integers(0, 10**6), panel=st.sampled_from([1, 2, 3, 512]))
def test_errors_are_those_of_the_outputs(seed: int, panel: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, change = (torch.randn(*shape, generator=generator) for shape in ((9, 5), (3, 5)))
    expected = (x.double() @ change.double().T).square().sum(0)
    with patch("llmprune.solver.errors._PANEL", panel):
        found = row_errors(change, x.T @ x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gram = x.double().T @ x.double()
    assert float(found.sum()) == pytest.approx(second_order.distortion(change, gram), rel=1e-4)


def test_errors_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    change = torch.randint(-4, 5, (7, 4), generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = row_errors(change, T1_GRAM)
    monkeypatch.setattr("llmprune.solver.errors._PIECE", 8)
    assert torch.equal(row_errors(change, T1_GRAM), whole)


def test_relative_errors() -> None:
    whole = second_order.distortion(T1_WEIGHT, T1_GRAM)
    expected = math.sqrt(27.75 / whole)
    assert relative_error(T1_WEIGHT, T1_ZEROED, T1_GRAM) == pytest.approx(expected)
    assert relative_error(T1_WEIGHT, 0 * T1_WEIGHT, T1_GRAM) == 1.0
    assert relative_error(T1_WEIGHT, T1_WEIGHT, T1_GRAM) == 0.0
    assert relative_error(0 * T1_WEIGHT, 0 * T1_WEIGHT, T1_GRAM) == 0.0
    assert relative_error(0 * T1_WEIGHT, T1_WEIGHT, T1_GRAM) == math.inf


def test_better_rows_are_taken_and_worse_ones_zeroed_bit_for_bit() -> None:
    solved = Solved(torch.stack([T1_BEST[0], 3 * T1_BEST[1]]), T1_KEEP, {"damping": 0.01})
    accepted, share, *_ = accept(T1_WEIGHT, solved, T1_GRAM, torch.float32)
    assert torch.equal(accepted.weight_OI, torch.stack([T1_BEST[0], T1_ZEROED[1]]))
    assert accepted.weight_OI[1].view(torch.int32).tolist()[0] == 0  # +0.0
    assert share == 0.5
    assert accepted.facts == {"damping": 0.01} and torch.equal(accepted.keep_OI, T1_KEEP)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e39])
def test_a_row_that_is_not_finite_once_stored_is_zeroed(value: float) -> None:
    broken = T1_BEST.double()
    broken[0, 0] = value
    accepted, share, *_ = accept(T1_WEIGHT, Solved(broken, T1_KEEP), T1_GRAM, torch.bfloat16)
    assert torch.equal(accepted.weight_OI[0], T1_ZEROED[0].bfloat16())
    assert torch.equal(accepted.weight_OI[1], T1_BEST[1].bfloat16())
    assert share == 0.5


def test_what_is_compared_is_what_will_be_stored() -> None:
    """In float32 the update is better; rounded to bfloat16 it falls back to the original."""
    weight, keep = torch.tensor([[1.0, 2.0**-10]]), torch.tensor([[True, False]])
    gram = torch.tensor([[1.0, 3.0], [3.0, 21.0]])
    solved = Solved(torch.tensor([[1 + 4.2 * 2**-10, 0.0]]), keep)
    kept, *_ = accept(weight, solved, gram, torch.float32)
    assert torch.equal(kept.weight_OI, solved.weight_OI)
    rounded, share, *_ = accept(weight, solved, gram, torch.bfloat16)
    assert rounded.weight_OI.dtype == torch.bfloat16
    assert rounded.weight_OI.tolist() == [[1.0, 0.0]] and share == 0.0


def test_zeros_are_made_where_the_solver_left_something() -> None:
    accepted, share, *_ = accept(T1_WEIGHT, Solved(T1_BEST + 1e-3, T1_KEEP), T1_GRAM, torch.float32)
    assert torch.equal(accepted.weight_OI == 0, ~T1_KEEP)
    assert share == 1.0


def test_a_row_that_loses_nothing_is_the_original_and_counts_as_accepted() -> None:
    keep = torch.tensor([[True] * 4, [False] * 4])
    accepted, share, *_ = accept(T1_WEIGHT, Solved(9 * T1_WEIGHT, keep), T1_GRAM, torch.float32)
    assert torch.equal(accepted.weight_OI, torch.stack([T1_WEIGHT[0], torch.zeros(4)]))
    assert share == 1.0


def test_nothing_given_is_changed() -> None:
    weight, gram, solved = T1_WEIGHT.clone(), T1_GRAM.clone(), T1_BEST.clone()
    accepted, *_ = accept(weight, Solved(solved, T1_KEEP), gram, torch.float32)
    accepted.weight_OI.zero_()
    assert torch.equal(weight, T1_WEIGHT) and torch.equal(gram, T1_GRAM)
    assert torch.equal(solved, T1_BEST)


def test_the_errors_returned_are_those_of_zeroing_and_of_what_is_stored() -> None:
    broken = T1_BEST.clone()
    broken[1, 1] = 50.0  # one row of two is worse than zeroing
    solved, share, zeroed, left = accept(
        T1_WEIGHT, Solved(broken, T1_KEEP), T1_GRAM, torch.bfloat16
    )
    plain = (T1_WEIGHT * T1_KEEP).bfloat16().float()
    assert share == 0.5
    assert zeroed == pytest.approx(float(row_errors(T1_WEIGHT - plain, T1_GRAM).sum()))
    stored = solved.weight_OI.float()
    assert left == pytest.approx(float(row_errors(T1_WEIGHT - stored, T1_GRAM).sum()))
    assert left < zeroed
