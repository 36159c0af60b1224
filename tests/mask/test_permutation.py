"""Column orders for N:M against exhaustive search, the slow formula and the paper's example."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.mask import permutation
from llmprune.mask.permutation import kept, permute_columns
from llmprune.mask.rank import keep_n_of_m

EXAMPLE = torch.tensor([[9, 8, 7, 6, 1, 2, 3, 4], [9, 7, 8, 5, 4, 3, 1, 2.0]])


def slow_kept(score_OI: Tensor, order: list[int], n: int, m: int) -> float:
    """Sum the n largest of every m columns in a loop."""
    total = 0.0
    for row in score_OI.double().tolist():
        values = [row[column] for column in order]
        for start in range(0, len(values), m):
            total += sum(sorted(values[start : start + m])[m - n :])
    return total


def slow_snake(score_OI: Tensor, m: int) -> list[int]:
    sums = score_OI.double().sum(0).tolist()
    rising = sorted(range(len(sums)), key=lambda column: (sums[column], column))
    size = len(sums) // m
    chunks = [rising[size * place : size * (place + 1)] for place in range(m)]
    chunks = [chunk[::-1] if place % 2 else chunk for place, chunk in enumerate(chunks)]
    return [chunk[group] for group in range(size) for chunk in chunks]


def test_the_example_goes_from_48_to_59_which_no_order_exceeds() -> None:
    order_I = permute_columns(EXAMPLE, 2, 4)
    assert order_I.tolist() == [6, 7, 3, 0, 4, 5, 1, 2]
    assert kept(EXAMPLE, torch.arange(8), 2, 4) == 48
    assert kept(EXAMPLE, order_I, 2, 4) == 59
    assert max(slow_kept(EXAMPLE, list(order), 2, 4) for order in permutations(range(8))) == 59


@given(st.integers(0, 10**6), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]))
def test_an_order_is_a_permutation_and_never_keeps_less(seed: int, ratio: tuple[int, int]) -> None:
    n, m = ratio
    generator = torch.Generator().manual_seed(seed)
    score_OI = torch.rand(3, 3 * m, generator=generator) * torch.rand(3 * m, generator=generator)
    order_I = permute_columns(score_OI, n, m)
    assert order_I.dtype == torch.int64 and sorted(order_I.tolist()) == list(range(3 * m))
    found = slow_kept(score_OI, order_I.tolist(), n, m)
    assert found == pytest.approx(kept(score_OI, order_I, n, m))
    assert found >= slow_kept(score_OI, list(range(3 * m)), n, m) - 1e-9
    assert found >= slow_kept(score_OI, slow_snake(score_OI, m), n, m) - 1e-4


def test_the_kept_score_is_what_the_mask_of_permuted_columns_keeps() -> None:
    score_OI = torch.rand(16, 32, generator=torch.Generator().manual_seed(0))
    order_I = permute_columns(score_OI, 2, 4)
    permuted_OI = score_OI[:, order_I]
    expected = permuted_OI[keep_n_of_m(permuted_OI, 2, 4)].double().sum()
    assert kept(score_OI, order_I, 2, 4) == pytest.approx(float(expected))


def test_assignment_keeps_more_than_the_snake_alone() -> None:
    score_OI = torch.rand(8, 64, generator=torch.Generator().manual_seed(3)) ** 4
    order_I = permute_columns(score_OI, 2, 4)
    snake = slow_snake(score_OI, 4)
    assert slow_kept(score_OI, order_I.tolist(), 2, 4) > slow_kept(score_OI, snake, 2, 4)


def test_each_exchange_is_the_best_assignment_of_columns_to_groups() -> None:
    score_OI = torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) ** 2
    start = torch.arange(16).view(4, 4)
    first = permutation._exchange(score_OI, start, 2)
    best = 0.0
    for dealt in permutations(range(4)):
        tried = start.clone()
        tried[:, 0] = start[list(dealt), 0]
        best = max(best, slow_kept(score_OI, tried.flatten().tolist(), 2, 4))
    only_first = start.clone()
    only_first[:, 0] = first[:, 0]
    assert slow_kept(score_OI, only_first.flatten().tolist(), 2, 4) == pytest.approx(best)


def test_wide_inputs_are_exchanged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    score_OI = torch.rand(4, 64, generator=torch.Generator().manual_seed(2)) ** 3
    whole = kept(score_OI, permute_columns(score_OI, 2, 4), 2, 4)
    monkeypatch.setattr(permutation, "WIDEST", 5)
    order_I = permute_columns(score_OI, 2, 4)
    assert sorted(order_I.tolist()) == list(range(64))
    found = slow_kept(score_OI, order_I.tolist(), 2, 4)
    assert found == pytest.approx(kept(score_OI, order_I, 2, 4))
    assert slow_kept(score_OI, slow_snake(score_OI, 4), 2, 4) < found <= whole * 1.01


def test_columns_that_are_equal_stay_where_they_are() -> None:
    assert permute_columns(torch.ones(2, 8), 2, 4).tolist() == list(range(8))


def test_the_scores_given_stay_as_they_are_and_answers_repeat() -> None:
    score_OI = torch.rand(6, 24, generator=torch.Generator().manual_seed(4))
    before = score_OI.clone()
    assert torch.equal(permute_columns(score_OI, 2, 4), permute_columns(score_OI, 2, 4))
    assert torch.equal(score_OI, before)


def test_columns_removed_before_count_as_the_lowest() -> None:
    score_OI = EXAMPLE.clone()
    score_OI[:, 4:] = -torch.inf
    order_I = permute_columns(score_OI, 2, 4)
    removed = (order_I >= 4).view(2, 4).sum(1)
    assert removed.tolist() == [2, 2], "the strong columns are spread over both groups"


def test_every_group_whole_or_empty_needs_no_order() -> None:
    assert permute_columns(EXAMPLE, 4, 4).tolist() == list(range(8))
    assert permute_columns(EXAMPLE, 0, 4).tolist() == list(range(8))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (5, 4), (-1, 4)])
def test_columns_that_m_does_not_divide_are_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="does not divide 8 columns"):
        permute_columns(EXAMPLE, n, m)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="hold NaN"):
        permute_columns(torch.full((1, 4), torch.nan), 2, 4)
