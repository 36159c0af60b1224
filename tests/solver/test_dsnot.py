"""Growing and pruning towards a mean output that nothing changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.mask.pattern import NofM, Unstructured, choose_keep
from llmprune.solver import REFINEMENTS, dsnot
from llmprune.solver.dsnot import grow_and_prune
from llmprune.solver.swaps import swap
from llmprune.stats.types import Stats
from tests.reference.masks import grown_and_pruned

WEIGHT = torch.tensor([[2.0, 3.0, 1.0, -2.5, 5.0, -3.0, 2.0]])
MEAN = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0])
NORM = torch.tensor([0.5, 0.5, 0.5, 1.2, 2.0, 2.0, 2.0])


def stats(mean_I: torch.Tensor, norm_I: torch.Tensor, var_I: torch.Tensor) -> Stats:
    values = {"col_sq": norm_I.double().square(), "col_mean": mean_I.double()}
    return Stats(num_tokens=9, values={**values, "col_var": var_I.double()})


def example(seed: int, rows: int, inputs: int) -> tuple[torch.Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    shift_I = torch.randn(inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(30, inputs, generator=generator, dtype=torch.float64) + shift_I
    gram_II = x_TI.T @ x_TI
    mean_I, var_I = x_TI.mean(0), x_TI.var(0, correction=0)
    columns = {"col_sq": gram_II.diagonal(), "col_mean": mean_I, "col_var": var_I}
    return weight_OI, Stats(num_tokens=30, values={**columns, "gram": gram_II})


def misses(weight_OI: torch.Tensor, keep_OI: torch.Tensor, seen: Stats) -> torch.Tensor:
    """Return |E| of every row."""
    return ((weight_OI * ~keep_OI) @ seen["col_mean"].to(weight_OI)).abs()


def test_the_worked_example_swaps_once_and_refuses_to_overshoot() -> None:
    # Pruned are {0, 1, 2}, E = 4 + 3 + 1 = 8. Column 0 comes back and 3 goes: 8 - 4 - 2.5 = 1.5.
    # Column 1 for 5 would be 1.5 - 3 - 6 = -7.5, which is worse.
    keep = choose_keep(Unstructured(), WEIGHT.abs() * NORM, 3, "row")
    assert keep.tolist() == [[False, False, False, True, True, True, True]]
    found = grow_and_prune(WEIGHT, keep, stats(MEAN, NORM, torch.ones(7)), None)
    assert found.tolist() == [[True, False, False, False, True, True, True]]
    assert keep.tolist() == [[False, False, False, True, True, True, True]]


def test_scales_of_the_mean_and_the_sign_of_the_row_do_not_matter() -> None:
    keep = torch.tensor([[False, False, False, True, True, True, True]])
    found = grow_and_prune(WEIGHT, keep, stats(MEAN, NORM, torch.ones(7)), None)
    for scale in (-1.0, 1e-4, 512.0):
        seen = stats(MEAN * scale, NORM, torch.ones(7))
        assert torch.equal(grow_and_prune(WEIGHT, keep, seen, None), found)


def test_an_input_that_varies_little_comes_back_first() -> None:
    keep = torch.tensor([[False, False, False, True, True, True, True]])
    var = torch.tensor([10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = grow_and_prune(WEIGHT, keep, stats(MEAN, NORM, var), None)
    # 3 / 1 is above 4 / 10: column 1 for 3, E = 8 - 3 - 2.5 = 2.5; column 2 for 5 is worse (-4.5),
    # and so is column 0 for 5.
    assert found.tolist() == [[False, True, False, False, True, True, True]]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from([None, (2, 4), (4, 8)]),
    share=st.sampled_from([0.25, 0.5, 0.75]),
)
def test_rows_agree_with_the_definition_and_miss_the_mean_by_less(
    seed: int, pattern: tuple[int, int] | None, share: float
) -> None:
    weight_OI, seen = example(seed, 3, 24)
    score_OI = weight_OI.abs() * seen["col_sq"].sqrt()
    if pattern is None:
        keep_OI = choose_keep(Unstructured(), score_OI, round(72 * share), "row")
    else:
        keep_OI = choose_keep(NofM(*pattern), score_OI, 36, "row")
    within = None if pattern is None else pattern[1]
    found_OI = grow_and_prune(weight_OI, keep_OI, seen, within)
    assert torch.equal(found_OI.sum(1), keep_OI.sum(1))
    if pattern is not None:
        assert bool((found_OI.view(3, -1, pattern[1]).sum(2) == pattern[0]).all())
    before_O, after_O = (misses(weight_OI, keep, seen) for keep in (keep_OI, found_OI))
    assert bool((after_O <= before_O).all())
    inputs = zip(
        seen["col_mean"].tolist(),
        seen["col_sq"].sqrt().tolist(),
        seen["col_var"].tolist(),
        strict=True,
    )
    columns = list(inputs)
    for weight_I, keep_I, found_I in zip(weight_OI, keep_OI, found_OI, strict=True):
        expected = grown_and_pruned(
            weight_I.tolist(), keep_I.tolist(), columns, within, steps=dsnot.STEPS, near=dsnot.NEAR
        )
        assert found_I.tolist() == expected


def test_the_mean_is_what_it_cares_for_and_the_error_is_what_exchanges_care_for() -> None:
    weight_OI, seen = example(11, 8, 40)
    score_OI = weight_OI.abs() * seen["col_sq"].sqrt()
    keep_OI = choose_keep(Unstructured(), score_OI, 160, "row")
    mean_OI, error_OI = (fn(weight_OI, keep_OI, seen, None) for fn in (grow_and_prune, swap))
    assert not torch.equal(mean_OI, error_OI)
    assert float(misses(weight_OI, mean_OI, seen).sum()) < 0.3 * float(
        misses(weight_OI, keep_OI, seen).sum()
    )

    def error(keep_OI: torch.Tensor) -> float:
        lost_OI = weight_OI * ~keep_OI
        return float(((lost_OI @ seen["gram"]) * lost_OI).sum())

    assert error(error_OI) < min(error(mean_OI), error(keep_OI))


def test_inputs_of_mean_zero_and_inputs_that_never_came_move_nothing() -> None:
    keep = torch.tensor([[False, False, False, True, True, True, True]])
    zero = torch.zeros(7)
    for seen in (stats(zero, NORM, torch.ones(7)), stats(zero, zero, zero)):
        assert torch.equal(grow_and_prune(WEIGHT, keep, seen, None), keep)
    mean, norm, var = MEAN.clone(), NORM.clone(), torch.ones(7)
    for column in (0, 3):
        mean[column] = norm[column] = var[column] = 0
    found = grow_and_prune(WEIGHT, keep, stats(mean, norm, var), None)
    assert not bool(found[0, 0]) and bool(found[0, 3])


def test_a_constant_input_comes_back_and_removed_weights_do_not() -> None:
    keep = torch.tensor([[False, False, False, True, True, True, True]])
    var = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    found = grow_and_prune(WEIGHT, keep, stats(MEAN, NORM, var), None)
    assert bool(found[0, 2])
    weight = WEIGHT.clone()
    weight[0, 0] = 0
    found = grow_and_prune(weight, keep, stats(MEAN, NORM, torch.ones(7)), None)
    assert not bool(found[0, 0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_keeps_its_number(bad: float) -> None:
    weight = torch.cat([WEIGHT, WEIGHT])
    weight[0, 1] = bad
    keep = torch.tensor([[False, False, False, True, True, True, True]] * 2)
    found = grow_and_prune(weight, keep, stats(MEAN, NORM, torch.ones(7)), None)
    assert found.sum(1).tolist() == [4, 4]
    assert found[1].tolist() == [True, False, False, False, True, True, True]


def test_rows_taken_a_few_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, seen = example(12, 20, 16)
    keep_OI = (torch.arange(16) % 4 < 2).expand(20, 16)
    whole_OI = grow_and_prune(weight_OI, keep_OI, seen, 4)
    monkeypatch.setattr(dsnot, "_CHUNK", 3 * 16)
    assert torch.equal(grow_and_prune(weight_OI, keep_OI, seen, 4), whole_OI)


def test_the_table_reaches_it() -> None:
    row = REFINEMENTS["dsnot"]
    assert row.fn is grow_and_prune
    assert row.needs == ("col_sq", "col_mean", "col_var")
