"""Exchanges of kept and pruned weights: never worse, in the end no single one would be better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.mask.pattern import NofM, Unstructured, choose_keep
from llmprune.solver import REFINEMENTS, swaps
from llmprune.solver.types import Settings
from llmprune.stats.types import Stats
from tests.reference.masks import lost_error, solved_error, swapped_once

T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
T1_GRAM = torch.tensor(
    [[6.0, 1.0, 2.0, 2.0], [1.0, 11.0, 4.0, -1.0], [2.0, 4.0, 6.0, 2.0], [2.0, -1.0, 2.0, 3.0]]
)
T1_KEEP = torch.tensor([[True, False, False, True], [False, True, True, False]])

Refine = Callable[[torch.Tensor, torch.Tensor, Stats, int | None], torch.Tensor]


def stats(gram_II: torch.Tensor) -> Stats:
    return Stats(num_tokens=5, values={"gram": gram_II})


def example(seed: int, rows: int, inputs: int, tokens: int = 40) -> tuple[torch.Tensor, ...]:
    """Return weights, inputs that correlate and differ in size, and scores, all float64."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix_II
    x_TI *= torch.rand(inputs, generator=generator, dtype=torch.float64).mul(3).exp()
    gram_II = x_TI.T @ x_TI
    return weight_OI, gram_II, weight_OI.abs() * gram_II.diagonal().sqrt()


def lost_errors(
    weight_OI: torch.Tensor, keep_OI: torch.Tensor, gram_II: torch.Tensor
) -> list[float]:
    rows = zip(weight_OI, keep_OI.tolist(), strict=True)
    return [lost_error(weight_I, keep_I, gram_II) for weight_I, keep_I in rows]


def solved_errors(
    weight_OI: torch.Tensor, keep_OI: torch.Tensor, gram_II: torch.Tensor
) -> list[float]:
    rows = zip(weight_OI, keep_OI.tolist(), strict=True)
    return [solved_error(weight_I, keep_I, gram_II) for weight_I, keep_I in rows]


def test_one_exchange_changes_the_error_of_the_fixture_by_what_the_formula_says() -> None:
    # Row 0 with columns 1 and 3 kept loses d = (4, 0, 2, 0): 6*16 + 6*4 + 2*2*8 = 152. The best is
    # to lose (0, -1, 2, 0): 11 + 24 - 16 = 19. Row 1 loses (1, 0, 0, .5): 6 + .75 + 2 = 8.75.
    start = torch.tensor([[False, True, False, True], [False, True, True, False]])
    assert lost_errors(T1_WEIGHT, start, T1_GRAM) == [152.0, 8.75]
    found = swaps.swap(T1_WEIGHT, start, stats(T1_GRAM), None)
    assert torch.equal(found, T1_KEEP)
    assert lost_errors(T1_WEIGHT, found, T1_GRAM) == [19.0, 8.75]
    assert start.tolist() == [[False, True, False, True], [False, True, True, False]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kept=st.integers(1, 11))
def test_rows_never_get_worse_and_no_single_exchange_is_left(seed: int, kept: int) -> None:
    weight_OI, gram_II, score_OI = example(seed, 3, 12)
    keep_OI = choose_keep(Unstructured(), score_OI, 3 * (12 - kept), "row")
    found_OI = swaps.swap(weight_OI, keep_OI, stats(gram_II), None)
    assert found_OI.sum(1).tolist() == [kept] * 3
    before, after = (lost_errors(weight_OI, keep, gram_II) for keep in (keep_OI, found_OI))
    assert all(new <= old * (1 + 1e-12) for new, old in zip(after, before, strict=True))
    for weight_I, keep_I, error in zip(weight_OI, found_OI.tolist(), after, strict=True):
        others = [lost_error(weight_I, other, gram_II) for other in swapped_once(keep_I, None)]
        assert min(others) >= error * (1 - 2e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from([(2, 4), (1, 4), (3, 6), (4, 8)]))
def test_groups_keep_their_number_and_no_exchange_in_them_is_left(
    seed: int, pattern: tuple[int, int]
) -> None:
    n, m = pattern
    weight_OI, gram_II, score_OI = example(seed, 2, 24)
    keep_OI = choose_keep(NofM(n, m), score_OI, 48 * (m - n) // m, "row")
    found_OI = swaps.swap(weight_OI, keep_OI, stats(gram_II), m)
    assert bool((found_OI.view(2, -1, m).sum(2) == n).all())
    before, after = (lost_errors(weight_OI, keep, gram_II) for keep in (keep_OI, found_OI))
    assert all(new <= old * (1 + 1e-12) for new, old in zip(after, before, strict=True))
    for weight_I, keep_I, error in zip(weight_OI, found_OI.tolist(), after, strict=True):
        others = [lost_error(weight_I, other, gram_II) for other in swapped_once(keep_I, m)]
        assert min(others) >= error * (1 - 2e-6)


def test_correlated_inputs_are_seen_where_a_score_of_norms_is_blind() -> None:
    # Inputs 0 and 1 are the same, with opposite weights: both may go at no cost.
    weight = torch.tensor([[5.0, -5.0, 1.0, 2.0]])
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.0
    keep = choose_keep(Unstructured(), weight.abs(), 2, "row")
    assert keep.tolist() == [[True, True, False, False]]
    found = swaps.swap(weight, keep, stats(gram), None)
    assert found.tolist() == [[True, True, False, False]]  # no single exchange leads there
    longer = torch.tensor([[True, False, False, True]])
    found = swaps.swap(weight, longer, stats(gram), None)
    assert found.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("swap", [swaps.swap, swaps.swap_updated])
def test_what_an_earlier_pruning_removed_stays_removed(swap: Refine) -> None:
    weight_OI, gram_II, score_OI = example(3, 6, 16)
    gone_OI = torch.arange(16).expand(6, 16) % 3 == 0
    weight_OI = weight_OI.masked_fill(gone_OI, 0)
    keep_OI = choose_keep(Unstructured(), score_OI.masked_fill(gone_OI, -torch.inf), 54, "row")
    found_OI = swap(weight_OI, keep_OI, stats(gram_II), None)
    assert not bool((found_OI & gone_OI).any())
    assert not torch.equal(found_OI, keep_OI)


@pytest.mark.parametrize("swap", [swaps.swap, swaps.swap_updated])
@pytest.mark.parametrize("within", [None, 4])
def test_rows_that_are_not_finite_stay_and_the_others_do_not_notice(
    swap: Refine, within: int | None
) -> None:
    weight_OI, gram_II, _ = example(4, 5, 16)
    keep_OI = (torch.arange(16) % 4 < 2).expand(5, 16)
    alone_OI = swap(weight_OI, keep_OI, stats(gram_II), within)
    broken_OI = weight_OI.clone()
    broken_OI[1, 0], broken_OI[3, 2] = torch.nan, torch.inf
    found_OI = swap(broken_OI, keep_OI, stats(gram_II), within)
    good = torch.tensor([True, False, True, False, True])
    assert torch.equal(found_OI[~good], keep_OI[~good])
    assert torch.equal(found_OI[good], alone_OI[good])
    assert not torch.equal(alone_OI[good], keep_OI[good])


@pytest.mark.parametrize("swap", [swaps.swap, swaps.swap_updated])
def test_inputs_that_never_came_and_masks_that_are_full_or_empty(swap: Refine) -> None:
    weight_OI, gram_II, _ = example(5, 3, 8)
    for dead in (slice(2, 4), slice(0, 8)):
        gram_II = gram_II.clone()
        gram_II[dead] = gram_II[:, dead] = 0
        keep_OI = torch.tensor([[True] * 8, [False] * 8, [True, False] * 4])
        found_OI = swap(weight_OI, keep_OI, stats(gram_II), None)
        assert found_OI.sum(1).tolist() == [8, 0, 4]
    assert torch.equal(found_OI, keep_OI)


@pytest.mark.parametrize("within", [None, 4])
def test_rows_taken_a_few_at_a_time_change_nothing(
    within: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI, gram_II, _ = example(6, 40, 32)
    keep_OI = (torch.arange(32) % 4 < 2).expand(40, 32)
    whole_OI = swaps.swap(weight_OI, keep_OI, stats(gram_II), within)
    monkeypatch.setattr(swaps, "_CHUNK", {"cpu": 3 * 16 * swaps.CANDIDATES**2})
    assert torch.equal(swaps.swap(weight_OI, keep_OI, stats(gram_II), within), whole_OI)


def test_no_row_gets_worse_in_float32_under_massive_activations() -> None:
    weight_OI, gram_II, score_OI = example(7, 30, 64)
    scale_I = torch.ones(64, dtype=torch.float64)
    scale_I[::16] = 1e4
    gram_II = gram_II * scale_I * scale_I[:, None]
    keep_OI = choose_keep(Unstructured(), score_OI * scale_I, 30 * 32, "row")
    found_OI = swaps.swap(weight_OI.float(), keep_OI, stats(gram_II.float()), None)
    before, after = (lost_errors(weight_OI, keep, gram_II) for keep in (keep_OI, found_OI))
    assert all(new <= old * (1 + 1e-5) for new, old in zip(after, before, strict=True))
    assert sum(after) < 0.9 * sum(before)


@pytest.mark.parametrize("within", [None, 4])
def test_exchanges_that_know_of_the_update_lower_what_is_left_after_it(within: int | None) -> None:
    weight_OI, gram_II, score_OI = example(8, 12, 32, tokens=200)
    pattern = Unstructured() if within is None else NofM(2, 4)
    keep_OI = choose_keep(pattern, score_OI, 12 * 16, "row")
    zeroed_OI = swaps.swap(weight_OI, keep_OI, stats(gram_II), within)
    updated_OI = swaps.swap_updated(weight_OI, keep_OI, stats(gram_II), within)
    assert torch.equal(updated_OI.sum(1), keep_OI.sum(1))
    if within:
        assert bool((updated_OI.view(12, -1, 4).sum(2) == 2).all())
    first, plain, aware = (
        solved_errors(weight_OI, keep, gram_II) for keep in (keep_OI, zeroed_OI, updated_OI)
    )
    assert all(new <= old * 1.001 for new, old in zip(aware, first, strict=True))
    assert sum(aware) < 0.9 * sum(first)
    if within:
        assert sum(aware) < sum(plain)
    assert sum(lost_errors(weight_OI, zeroed_OI, gram_II)) < sum(
        lost_errors(weight_OI, updated_OI, gram_II)
    )


def test_the_fixture_after_an_update_moves_as_well() -> None:
    # Row 0 from columns 0 and 1: 14.477; the best two after an update are 0 and 3: 10.643.
    start = torch.tensor([[True, True, False, False], [False, True, True, False]])
    assert solved_errors(T1_WEIGHT, start, T1_GRAM) == pytest.approx([14.477, 6.980], abs=1e-3)
    found = swaps.swap_updated(T1_WEIGHT, start, stats(T1_GRAM), None)
    assert torch.equal(found, T1_KEEP)
    assert solved_errors(T1_WEIGHT, found, T1_GRAM) == pytest.approx([10.643, 6.980], abs=1e-3)


def test_the_table_reaches_both() -> None:
    assert REFINEMENTS["swaps"].fn is swaps.swap
    assert REFINEMENTS["swaps-updated"].fn is swaps.swap_updated
    assert REFINEMENTS["swaps"].needs == REFINEMENTS["swaps-updated"].needs == ("gram",)


@pytest.mark.parametrize("damp", ["mean", "diag"])
def test_damping_is_the_one_asked_for(damp: Literal["mean", "diag"]) -> None:
    """Damping is the same as a Gram matrix that has it already, and another one than none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    gram, weight = x.T @ x, torch.randn(16, 24, generator=generator)
    keep = weight.abs() > weight.abs().median()
    added = gram.diagonal().mean() if damp == "mean" else gram.diagonal()
    damped = gram + torch.diag_embed(0.5 * added.expand(24))
    ours, theirs, none = (
        swaps.swap_updated(weight, keep, stats(of), None, Settings(damping=by, damp=damp))
        for of, by in ((gram, 0.5), (damped, 1e-9), (gram, 1e-9))
    )
    assert torch.equal(ours, theirs) and not torch.equal(ours, none)
