"""Least squares on a support: the published solutions, and never worse than what it starts from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.solver.columnwise import sweep_columns
from llmprune.solver.least_squares import fit, fit_supports
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.types import Stats
from tests.reference import second_order

T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
T1_GRAM = torch.tensor([[6.0, 1, 2, 2], [1, 11, 4, -1], [2, 4, 6, 2], [2, -1, 2, 3]])
T1_KEEP = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()


def given_mask(keep: torch.Tensor) -> Choose:
    return Choose(fn=lambda weight, cols, curvature: keep[:, cols])


def largest_half(columns: int) -> Choose:
    def fn(weight: torch.Tensor, cols: slice, curvature: torch.Tensor | None) -> torch.Tensor:
        assert curvature is not None
        score = weight.abs() / curvature
        return score >= score.median()

    return Choose(fn=fn, adaptive=True, columns=columns)


def solve(
    weight: torch.Tensor, gram: torch.Tensor, choose: Choose, settings: Settings | None = None
) -> Solved:
    stats = Stats(num_tokens=5, values={"gram": gram})
    return fit_supports({"q": weight}, stats, {"q": choose}, settings or Settings())["q"]


def problem(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return weights, a Gram matrix of inputs that correlate, and a mask; the first row goes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, columns, generator=generator) > 0.5
    keep[0], keep[1] = False, True
    return weight, x.T @ x, keep


@pytest.mark.parametrize(
    ("damping", "expected", "distortion"),
    [
        (0.0, [[3.928571, 0, 0, -1.285714], [0, 4.82, -1.38, 0]], 17.622857),
        (0.01, [[3.944822, 0, 0, -1.332674], [0, 4.824542, -1.389641, 0]], 17.628439),
    ],
)
def test_the_fixture(damping: float, expected: list[list[float]], distortion: float) -> None:
    solved = solve(T1_WEIGHT, T1_GRAM, given_mask(T1_KEEP), Settings(damping=damping))
    torch.testing.assert_close(solved.weight_OI, torch.tensor(expected), rtol=0, atol=2e-5)
    found = second_order.distortion(T1_WEIGHT - solved.weight_OI, T1_GRAM)
    assert found == pytest.approx(distortion, abs=1e-4)
    assert torch.equal(solved.keep_OI, T1_KEEP)
    assert solved.facts == {"damping": damping}


@given(seed=st.integers(0, 10**6))
def test_every_row_solves_its_normal_equations(seed: int) -> None:
    weight, gram, keep = problem(5, 9, seed)
    solved = solve(weight, gram, given_mask(keep))
    hessian = second_order.damped(gram, 0.01)
    expected = second_order.least_squares(weight, keep, hessian)
    best = second_order.distortion(weight - expected, hessian)
    found = second_order.distortion(weight - solved.weight_OI, hessian)
    assert best * (1 - 1e-9) <= found <= best * 1.001
    assert torch.equal(solved.weight_OI == 0, ~keep)


@given(seed=st.integers(0, 10**6), iterations=st.integers(0, 4))
def test_no_step_is_worse_than_the_sweep_or_zeroing(seed: int, iterations: int) -> None:
    weight, gram, keep = problem(6, 24, seed)
    stats = Stats(num_tokens=5, values={"gram": gram})
    swept = sweep_columns({"q": weight}, stats, {"q": given_mask(keep)}, Settings())["q"]
    solved = solve(weight, gram, given_mask(keep), Settings(iterations=iterations))
    hessian = second_order.damped(gram, 0.01)
    for row in range(6):
        swept_row, zeroed_row, found = (
            second_order.distortion(weight[[row]] - other[[row]], hessian)
            for other in (swept.weight_OI, weight * keep, solved.weight_OI)
        )
        assert found <= min(swept_row, zeroed_row) * (1 + 1e-9) + 1e-9


def test_the_sweep_is_not_the_optimum() -> None:
    weight, gram, keep = problem(6, 24, 0)
    stats = Stats(num_tokens=5, values={"gram": gram})
    swept = sweep_columns({"q": weight}, stats, {"q": given_mask(keep)}, Settings())["q"]
    solved = solve(weight, gram, given_mask(keep))
    found, before = (
        second_order.distortion(weight - other.weight_OI, gram) for other in (solved, swept)
    )
    assert found < 0.9 * before


def test_a_score_that_adapts_gives_the_mask_of_the_sweep() -> None:
    weight, gram, _ = problem(6, 24, 1)
    stats = Stats(num_tokens=5, values={"gram": gram})
    swept = sweep_columns({"q": weight}, stats, {"q": largest_half(8)}, Settings())["q"]
    solved = solve(weight, gram, largest_half(8))
    assert torch.equal(solved.keep_OI, swept.keep_OI)
    hessian = second_order.damped(gram, 0.01)
    expected = second_order.least_squares(weight, swept.keep_OI, hessian)
    found, best = (
        second_order.distortion(weight - other, hessian) for other in (solved.weight_OI, expected)
    )
    assert found <= 1.002 * best


def test_rows_do_not_depend_on_the_rows_solved_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, keep = problem(7, 24, 2)
    whole = solve(weight, gram, given_mask(keep)).weight_OI
    monkeypatch.setattr("llmprune.solver.least_squares._PIECE", 24)
    alone = solve(weight, gram, given_mask(keep)).weight_OI
    hessian = second_order.damped(gram, 0.01)
    found, apart = (second_order.distortion(weight - other, hessian) for other in (whole, alone))
    assert apart == pytest.approx(found, rel=1e-3)


def test_a_row_that_loses_nothing_stays_and_one_that_loses_all_is_zero() -> None:
    weight, gram, keep = problem(4, 12, 3)
    weight = weight.float()
    solved = solve(weight, gram.float(), given_mask(keep)).weight_OI
    assert torch.equal(solved[1], weight[1])
    assert not solved[0].any()


def test_kept_weights_of_dead_inputs_stay_as_they_were() -> None:
    weight, gram, keep = problem(4, 8, 4)
    gram[2], gram[:, 2], weight[:, 2] = 0, 0, 99
    keep[:, 2] = torch.tensor([True, True, False, True])
    solved = solve(weight, gram, given_mask(keep)).weight_OI
    assert solved[:, 2].tolist() == [99, 99, 0, 99]
    alive = [0, 1, 3, 4, 5, 6, 7]
    alone = solve(weight[:, alive], gram[alive][:, alive], given_mask(keep[:, alive])).weight_OI
    torch.testing.assert_close(solved[:, alive], alone, rtol=1e-6, atol=1e-6)


def test_the_better_of_start_and_zeroing_is_where_a_row_starts() -> None:
    far = torch.full((2, 4), 1e3)
    none = fit(T1_WEIGHT, T1_KEEP, far, T1_GRAM, torch.zeros(4), 0)
    assert torch.equal(none, T1_WEIGHT * T1_KEEP)
    near = second_order.least_squares(T1_WEIGHT, T1_KEEP, T1_GRAM.double()).float()
    assert torch.equal(fit(T1_WEIGHT, T1_KEEP, near, T1_GRAM, torch.zeros(4), 0), near)


def test_nothing_given_is_changed() -> None:
    weight, gram, keep = problem(4, 12, 5)
    before = [each.clone() for each in (weight, gram, keep)]
    solve(weight, gram, given_mask(keep))
    for now, then in zip((weight, gram, keep), before, strict=True):
        assert torch.equal(now, then)
