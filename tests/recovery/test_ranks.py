"""Ranks follow importance, and their total is what equal ranks would cost."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmprune.allocation.influence import cfsp_keep
from llmprune.base.errors import NumericalError, RecipeError
from llmprune.recovery.ranks import importance_of_angles, ranks_by_importance

values = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(0, 3).map(float))


def wished(importance: list[float], total: int, least: int, most: int) -> list[float]:
    """Return limited shares of one factor, which is found by halving."""
    low, high = 0.0, 1e15
    for _ in range(300):
        middle = (low + high) / 2
        found = sum(min(max(middle * each, least), most) for each in importance)
        low, high = (middle, high) if found < total else (low, middle)
    return [min(max(high * each, least), most) for each in importance]


def test_the_worked_example_of_three_blocks() -> None:
    # 24 g / 1.5 is [11.70, 8.00, 4.30]: floors of 23, and the largest remainder is the first.
    importance = importance_of_angles({0: 3e4, 1: 2e4, 2: 1e4}, slope=1e-4)
    assert [round(each, 4) for each in importance.values()] == [0.7311, 0.5, 0.2689]
    assert ranks_by_importance(importance, 8) == {0: 12, 1: 8, 2: 4}


def test_importance_is_what_the_allocation_keeps_in_proportion() -> None:
    angles = {0: 0.31, 1: 0.27, 2: 0.3, 3: 0.25}
    importance = list(importance_of_angles(angles).values())
    kept = cfsp_keep(list(angles.values()), 0.9)  # far from its cap
    assert max(kept) < 0.9
    assert [each / sum(importance) for each in importance] == pytest.approx(
        [each / sum(kept) for each in kept]
    )
    assert importance_of_angles({0: -1e9, 1: 1e9}) == {0: 0.0, 1: 1.0}
    assert importance_of_angles({}) == {}


def test_what_a_limit_takes_is_shared_in_proportion() -> None:
    # 40 of [8, 4, 1, 1] would be [22.9, 11.4, 2.9, 2.9]. At most 16: 24 of [4, 1, 1] are 16, 4, 4.
    assert ranks_by_importance({0: 8, 1: 4, 2: 1, 3: 1}, 10, most=16) == {0: 16, 1: 16, 2: 4, 3: 4}
    # 32 of [10, 5, 0, 1] would be [20, 10, 0, 2]: the third takes 2, 30 of [10, 5, 1] the rest,
    # [18.75, 9.375, 1.875], so the fourth takes 2 as well, and 28 of [10, 5] are 18.67 and 9.33.
    assert ranks_by_importance({0: 10, 1: 5, 2: 0, 3: 1}, 8) == {0: 19, 1: 9, 2: 2, 3: 2}


def test_equal_blocks_have_equal_ranks_and_the_first_get_what_is_left() -> None:
    assert ranks_by_importance(dict.fromkeys(range(4), 0.3), 8) == dict.fromkeys(range(4), 8)
    assert ranks_by_importance(dict.fromkeys(range(3), 0.0), 4) == dict.fromkeys(range(3), 4)
    # 12 of [1, 1, 3] are [2.4, 2.4, 7.2]; of [1, 1, 1.2] [3.75, 3.75, 4.5].
    assert ranks_by_importance({0: 1, 1: 1, 2: 3}, 4) == {0: 3, 1: 2, 2: 7}
    assert ranks_by_importance({7: 1, 3: 1, 5: 1.2}, 4) == {3: 4, 5: 4, 7: 4}
    assert list(ranks_by_importance({7: 1, 3: 1, 5: 1}, 4)) == [3, 5, 7]


@given(st.lists(values, min_size=1, max_size=8), st.integers(1, 16), st.integers(0, 4), st.data())
def test_the_total_is_exact_and_ranks_lie_within_limits_in_order(
    importance: list[float], rank: int, least: int, data: st.DataObject
) -> None:
    assume(least <= rank)
    most = data.draw(st.integers(rank, 40))
    found = ranks_by_importance(dict(enumerate(importance)), rank, least=least, most=most)
    assert sum(found.values()) == rank * len(importance)
    assert all(least <= each <= most for each in found.values())
    for first, second in itertools.permutations(range(len(importance)), 2):
        if importance[first] > importance[second]:
            assert found[first] >= found[second]
        if importance[first] == importance[second] and first < second:
            assert found[second] <= found[first] <= found[second] + 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(2, 5), st.integers(0, 6))
@settings(max_examples=60)
def test_no_other_ranks_are_nearer_to_the_limited_shares(
    importance: list[int], rank: int, room: int
) -> None:
    total, most = rank * len(importance), rank + room
    shares = wished([float(each) for each in importance], total, 2, most)

    def distance(ranks: tuple[int, ...]) -> float:
        return sum((each - share) ** 2 for each, share in zip(ranks, shares, strict=True))

    choices = itertools.product(range(2, most + 1), repeat=len(importance))
    nearest = min(distance(ranks) for ranks in choices if sum(ranks) == total)
    found = ranks_by_importance(dict(enumerate(map(float, importance))), rank, most=most)
    assert distance(tuple(found.values())) == pytest.approx(nearest, abs=1e-6)


def test_a_mean_outside_the_limits_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recover\.rank: a mean rank of 1 .*type --rank 2"):
        ranks_by_importance({0: 1.0, 1: 2.0}, 1)
    with pytest.raises(RecipeError, match=r"between 2 and 6.*type --rank 6"):
        ranks_by_importance({0: 1.0}, 8, most=6)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_an_importance_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(NumericalError, match=f"block 1 is {value}.*0 or more"):
        ranks_by_importance({0: 1.0, 1: value}, 8)


def test_no_blocks_have_no_ranks() -> None:
    assert ranks_by_importance({}, 8) == {}
