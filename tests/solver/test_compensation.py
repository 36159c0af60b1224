"""What makes up for columns that go: the published vectors, and never worse than deletion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.solver.compensation import fit_columns, fit_with_bias, mean_bias, remove_columns
from tests.reference import second_order, unit_scores

A_WEIGHT, A_GRAM = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
B_GRAM = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])


def problem(
    seed: int, columns: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (5, columns), inputs that correlate and have a mean, and what is kept."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mix + 0.5
    weight = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(columns, generator=generator) > 0.4
    keep[0], keep[1] = True, False
    return weight.to(dtype), x.to(dtype), keep


def residual(x: Tensor, weight: Tensor, other: Tensor, bias: Tensor | None = None) -> float:
    """Return the squared change of the output over all tokens."""
    away = x.double() @ (weight.double() - other.double()).T
    return float((away if bias is None else away - bias).square().sum())


def test_the_first_fixture() -> None:
    keep, weight = remove_columns(A_WEIGHT, A_GRAM, 1, 0.0)
    assert keep.tolist() == [True, False]
    torch.testing.assert_close(weight, torch.tensor([[2.0, 0.0], [3.5, 0.0]]))
    assert second_order.distortion(A_WEIGHT - weight, A_GRAM) == pytest.approx(7.5)
    torch.testing.assert_close(fit_columns(A_WEIGHT, A_GRAM, keep, 0.0), weight)


def test_the_second_fixture() -> None:
    weight, keep = torch.ones(1, 3), torch.tensor([True, False, True])
    fitted = fit_columns(weight, B_GRAM, keep, 0.0)
    torch.testing.assert_close(fitted, torch.tensor([[1.5, 0.0, 1.5]]))
    assert second_order.distortion(weight - fitted, B_GRAM) == pytest.approx(1.0)
    assert second_order.distortion(weight - weight * keep, B_GRAM) == pytest.approx(2.0)


def test_a_constant_column_is_a_bias() -> None:
    """FLAP's fixture: column 1 is always 2, so its mean makes up for all of it."""
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, 2.0, 3.0], [2.0, 2.0, 1.0]])
    weight = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, -1.0]])
    keep = torch.tensor([True, False, True])
    bias = mean_bias(weight, x.mean(0), keep)
    assert bias.tolist() == [4.0, 2.0]
    assert residual(x, weight, weight * keep, bias) == 0.0
    fitted, both = fit_with_bias(weight, x.T @ x, x.mean(0), 4, keep, 0.0)
    assert residual(x, weight, fitted, both) == pytest.approx(0.0, abs=1e-9)
    assert residual(x, weight, fit_columns(weight, x.T @ x, keep, 0.0)) > 1.0


@given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.0, 0.01, 1.0]))
def test_never_worse_than_deletion(seed: int, damping: float) -> None:
    weight, x, keep = problem(seed)
    gram = x.T @ x
    fitted = fit_columns(weight, gram, keep, damping)
    assert bool((fitted[:, ~keep] == 0).all())
    found, deleted = (
        second_order.distortion(weight - other, gram) for other in (fitted, weight * keep)
    )
    assert found <= deleted * (1 + 1e-12)
    assert found < deleted or damping == 1.0


@given(seed=st.integers(0, 10**6))
def test_it_is_what_least_squares_on_the_tokens_finds(seed: int) -> None:
    weight, x, keep = problem(seed)
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    fitted = fit_columns(weight, x.T @ x, keep, 0.0)
    torch.testing.assert_close(fitted[:, keep], expected, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), damping=st.sampled_from([0.01, 0.3]))
def test_damping_is_of_the_whole_diagonal(seed: int, damping: float) -> None:
    weight, x, keep = problem(seed)
    hessian = second_order.damped(x.T @ x, damping)
    expected = second_order.least_squares(weight, keep.expand_as(weight), hessian)
    fitted = fit_columns(weight, x.T @ x, keep, damping)
    torch.testing.assert_close(fitted, expected, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 10**6))
def test_with_a_bias_it_is_least_squares_with_an_intercept(seed: int) -> None:
    weight, x, keep = problem(seed)
    with_one = torch.cat([x[:, keep], torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    expected = torch.linalg.lstsq(with_one, x @ weight.T).solution.T
    gram, mean = x.T @ x, x.mean(0)
    fitted, bias = fit_with_bias(weight, gram, mean, len(x), keep, 0.0)
    torch.testing.assert_close(fitted[:, keep], expected[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, expected[:, -1], rtol=1e-4, atol=1e-5)
    found = residual(x, weight, fitted, bias)
    alone = residual(x, weight, fit_columns(weight, gram, keep, 0.0))
    shifted = residual(x, weight, weight * keep, mean_bias(weight, mean, keep))
    assert found < min(alone, shifted) * (1 + 1e-9)


@given(seed=st.integers(0, 10**6), column=st.integers(0, 7))
def test_one_column_is_what_the_surgeon_does(seed: int, column: int) -> None:
    weight, x, _ = problem(seed)
    keep = torch.arange(8) != column
    hessian = second_order.damped(x.T @ x, 0.01)
    inverse = torch.linalg.inv(hessian)
    step = weight[:, [column]] * inverse[[column]] / inverse[column, column]
    fitted = fit_columns(weight, x.T @ x, keep, 0.01)
    torch.testing.assert_close(fitted, (weight - step) * keep, rtol=1e-6, atol=1e-8)


@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 2, 4]), share=st.floats(0, 1))
@settings(max_examples=60)
def test_greedy_removal_takes_the_cheapest_each_time(seed: int, width: int, share: float) -> None:
    weight, x, _ = problem(seed)
    gram, count = x.T @ x, round(share * (8 // width - 1))
    hessian = second_order.damped(gram, 0.01)
    gone = unit_scores.greedy_removal(weight, hessian, count, width)
    expected = torch.tensor([unit not in gone for unit in range(8 // width)])
    keep, solved = remove_columns(weight, gram, count, 0.01, width)
    assert torch.equal(keep, expected.repeat_interleave(width))
    fitted = fit_columns(weight, gram, keep, 0.01)
    torch.testing.assert_close(solved, fitted, rtol=1e-6, atol=1e-8)
    assert torch.equal(solved == 0, (~keep).expand_as(solved))


def test_greedy_removal_differs_from_the_lowest_scores_at_once() -> None:
    """Each of two equal columns costs nothing, but not both; the third is cheap."""
    base = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([base[:, 0], base[:, 0], 0.1 * base[:, 1]], dim=1)
    gram, weight = x.T @ x + 1e-6 * torch.eye(3), torch.ones(1, 3, dtype=torch.float64)
    at_once = [unit_scores.cost_of_removal(weight, gram, [column]) for column in range(3)]
    assert max(at_once[:2]) < at_once[2]
    keep, _ = remove_columns(weight, gram, 2, 0.0)
    assert not keep[2] and int(keep[:2].sum()) == 1


def test_float32_of_columns_that_are_nearly_alike_is_as_good() -> None:
    """The condition of the Gram matrix is past float32: more precision or damping must help."""
    weight, x, keep = problem(3, columns=24, dtype=torch.float32)
    x[:, 1::2] = x[:, 0::2] + 1e-5 * x[:, 1::2]
    gram = x.T @ x
    fitted = fit_columns(weight, gram, keep, 0.0)
    assert fitted.dtype == torch.float32
    exact = fit_columns(weight.double(), x.double().T @ x.double(), keep, 1e-6)
    found, best, deleted = (residual(x, weight, w) for w in (fitted, exact, weight * keep))
    assert found < 1.05 * best < 0.5 * deleted


def test_dead_inputs_go_first_and_change_nothing() -> None:
    weight, x, _ = problem(0)
    x[:, 3] = 0
    keep, solved = remove_columns(weight, x.T @ x, 1, 0.01)
    assert keep.tolist() == [True, True, True, False, True, True, True, True]
    torch.testing.assert_close(solved[:, keep], weight[:, keep])
    held = torch.ones(8, dtype=torch.bool)
    held[5] = False
    fitted = fit_columns(weight, x.T @ x, held, 0.01)
    assert torch.equal(fitted[:, 3], weight[:, 3])
    assert residual(x, weight, fitted) < residual(x, weight, weight * held)


def test_nothing_or_everything_may_go_and_arguments_stay() -> None:
    weight, x, keep = problem(1)
    gram, mean = x.T @ x, x.mean(0)
    before = [each.clone() for each in (weight, gram, mean, keep)]
    all_kept, none_kept = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    assert torch.equal(fit_columns(weight, gram, all_kept, 0.01), weight)
    assert not fit_columns(weight, gram, none_kept, 0.01).any()
    assert torch.equal(mean_bias(weight, mean, all_kept), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(mean_bias(weight, mean, none_kept), weight @ mean)
    nothing, everything = (remove_columns(weight, gram, count, 0.01) for count in (0, 8))
    assert nothing[0].all() and torch.equal(nothing[1], weight)
    assert not everything[0].any() and not everything[1].any()
    fit_columns(weight, gram, keep, 0.01)
    fit_with_bias(weight, gram, mean, len(x), keep, 0.01)
    remove_columns(weight, gram, 3, 0.01, width=2)
    for each, held in zip((weight, gram, mean, keep), before, strict=True):
        assert torch.equal(each, held)


def test_rows_do_not_depend_on_the_rows_fitted_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, keep = problem(2)
    whole = fit_columns(weight, x.T @ x, keep, 0.01)
    bias = mean_bias(weight, x.mean(0), keep)
    monkeypatch.setattr("llmprune.solver.compensation._PIECE", 16)
    torch.testing.assert_close(fit_columns(weight, x.T @ x, keep, 0.01), whole)
    torch.testing.assert_close(mean_bias(weight, x.mean(0), keep), bias)


@pytest.mark.parametrize("count", [-1, 3])
def test_more_units_than_there_are_cannot_go(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot remove {count} units of 1 of 2 columns"):
        remove_columns(A_WEIGHT, A_GRAM, count, 0.0)
    with pytest.raises(ValueError, match="cannot remove 1 units of 3 of 2 columns"):
        remove_columns(A_WEIGHT, A_GRAM, 1, 0.0, width=3)


def test_a_matrix_that_is_not_finite_is_refused() -> None:
    broken = A_GRAM.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN or infinity in 1 columns"):
        fit_columns(A_WEIGHT, broken, torch.tensor([True, False]), 0.01)
    with pytest.raises(NumericalError, match="has no inverse with damping"):
        remove_columns(A_WEIGHT, broken, 1, 0.01)
