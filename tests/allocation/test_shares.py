"""Allocations by hand and by rank: shares that meet the total, and what cannot be met."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.manual import as_named
from llmprune.allocation.projector import project
from llmprune.allocation.types import Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up
from llmprune.stats import STATISTICS
from llmprune.stats.types import Stats


def sites(*units: int, cost: int = 1) -> list[Site]:
    return [
        Site(name=f"s{index}", block=index, spans=(), num_units=num, unit_cost=cost)
        for index, num in enumerate(units)
    ]


def counts(
    units: tuple[int, ...], target: str, named: Mapping[str, str], cost: int = 1
) -> list[int]:
    shares = {name: Fraction(share) for name, share in named.items()}
    request = Request(sites=sites(*units, cost=cost), target=Fraction(target), named=shares)
    found = as_named(request)
    return [int(found[f"s{index}"] * num) for index, num in enumerate(units)]


def test_named_sites_lose_their_share_and_others_what_is_left() -> None:
    assert counts((100, 100, 200), "0.5", {"s0": "0.2"}) == [20, 60, 120]
    assert counts((100, 100, 200), "0.5", {"s0": "0"}) == [0, 67, 133]
    assert counts((100, 100), "0.35", {"s0": "0.2", "s1": "0.5"}) == [20, 50]


@given(
    units=st.lists(st.integers(2, 60), min_size=2, max_size=6),
    target=st.fractions(0, Fraction(9, 10), max_denominator=100),
    share=st.fractions(0, Fraction(99, 100), max_denominator=100),
    cost=st.sampled_from([1, 16]),
)
def test_the_total_is_exact_and_a_named_site_keeps_its_share(
    units: list[int], target: Fraction, share: Fraction, cost: int
) -> None:
    wanted = round_half_up(target * sum(units))
    own = min(round_half_up(share * units[0]), units[0] - 1)
    free = sum(units[1:]) - len(units[1:])
    if own <= wanted <= own + free:
        found = counts(tuple(units), str(target), {"s0": str(share)}, cost)
        assert found[0] == own and sum(found) == wanted
        assert all(0 <= count < num for count, num in zip(found, units, strict=True))
    else:
        with pytest.raises(RecipeError, match=r"can be reached, but sparsity is"):
            counts(tuple(units), str(target), {"s0": str(share)}, cost)


def test_masks_are_nested_when_more_is_asked() -> None:
    before = [0, 0, 0, 0]
    for percent in range(5, 90):
        found = counts((7, 11, 13, 40), f"{percent / 100}", {"s0": "0.4"})
        assert found[0] == 3
        assert percent == 5 or all(a <= b for a, b in zip(before, found, strict=True))
        before = found


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(RecipeError, match=r"0\.4000 to 0\.8950 can be reached, .*is 0\.3\."):
        counts((100, 100), "0.3", {"s0": "0.8"})
    with pytest.raises(RecipeError, match=r"name every linear and remove 0\.3500.*--sparsity 0"):
        counts((100, 100), "0.5", {"s0": "0.2", "s1": "0.5"})


def test_tiles_are_counted_to_the_tile() -> None:
    """Rounded half up each, seven linears of three tiles would lose 14 of 21 at one half."""
    names = [f"s{index}" for index in range(7)]
    half, units, costs = Fraction(1, 2), dict.fromkeys(names, 3), dict.fromkeys(names, 256)
    shares = dict.fromkeys(names, half)
    assert sum(project(shares, units, costs, budget=half).values()) == 14
    found = project(shares, units, costs, budget=11 * 256, exact=True)
    assert sum(found.values()) == 11 and set(found.values()) == {1, 2}


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_an_allocation_that_needs_a_profile_has_one(name: str) -> None:
    row = ALLOCATIONS[name]
    assert ("profile" in row.needs) == (row.profile is not None)
    if row.profile is not None:
        assert set(row.profile.needs) <= set(STATISTICS)
    assert 0 <= row.min_keep < 1


def test_evidence_leaves_the_weight_alone() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    profile = ALLOCATIONS["global"].profile
    assert profile is not None
    score = profile.fn(weight, Stats(num_tokens=0, values={}), None)
    assert score.tolist() == [[1.0, 2.0]] and weight.tolist() == [[1.0, -2.0]]
    assert score.data_ptr() != weight.data_ptr()
