"""Counts are those of the decimal number that the user typed."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import RecipeError
from llmprune.mask.counts import exact_sparsity, round_half_up, spread


@pytest.mark.parametrize(("sparsity", "of", "count"), [(0.29, 100, 29), (0.7, 4096, 2867)])
def test_a_float_means_its_decimal(sparsity: float, of: int, count: int) -> None:
    assert round_half_up(exact_sparsity(sparsity) * of) == count


def test_the_binary_neighbour_would_lose_one() -> None:
    assert int(0.29 * 100) == 28
    assert exact_sparsity(0.29) * 100 == 29


@pytest.mark.parametrize("value", [0.25, "0.25", "1/4", Fraction(1, 4), Decimal("0.25"), "25e-2"])
def test_all_spellings_agree(value: float | str | Fraction | Decimal) -> None:
    assert exact_sparsity(value) == Fraction(1, 4)


@pytest.mark.parametrize("value", [-0.1, 1.5, "half", float("nan"), float("inf"), "1/0"])
def test_what_is_no_sparsity_is_refused_with_its_value(value: float | str) -> None:
    with pytest.raises(RecipeError, match=r"^sparsity: ") as caught:
        exact_sparsity(value)
    assert repr(value) in str(caught.value)


def test_halves_round_up() -> None:
    assert [round_half_up(Fraction(n, 2)) for n in range(5)] == [0, 1, 1, 2, 2]


@given(total=st.integers(0, 10**9), num_groups=st.integers(1, 200))
def test_spread_is_exact_and_even(total: int, num_groups: int) -> None:
    counts = spread(total, num_groups)
    assert counts.shape == (num_groups,)
    assert int(counts.sum()) == total
    assert int(counts.max() - counts.min()) <= 1


@given(total=st.integers(0, 500), more=st.integers(0, 500), num_groups=st.integers(1, 60))
def test_no_share_falls_when_the_total_grows(total: int, more: int, num_groups: int) -> None:
    assert bool((spread(total + more, num_groups) >= spread(total, num_groups)).all())
