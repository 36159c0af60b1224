"""The projector: integer counts that meet the budget, ties and widths."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.projector import default_multiple, project
from llmprune.allocation.types import Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up

SHARES = st.integers(0, 100).map(lambda percent: Fraction(percent, 100))


@st.composite
def houses(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sites in ties and alone, with wishes that need not add up to the budget."""
    units: dict[str, int] = {}
    ties = []
    for tie in range(draw(st.integers(0, 2))):
        width = draw(st.integers(1, 40))
        sites = [f"tied{tie}.{index}" for index in range(draw(st.integers(1, 3)))]
        ties.append(sites)
        units |= dict.fromkeys(sites, width)
    for index in range(draw(st.integers(1, 4))):
        units[f"free{index}"] = draw(st.integers(1, 40))
    return {
        "shares": {site: draw(SHARES) for site in units},
        "units": units,
        "costs": {site: draw(st.integers(1, 5)) for site in units},
        "ties": ties,
        "multiple": draw(st.none() | st.sampled_from([1, 2, 4, 8])),
    }


def removed(house: dict[str, Any], counts: dict[str, int]) -> int:
    return sum(house["costs"][site] * count for site, count in counts.items())


def total(house: dict[str, Any]) -> int:
    return sum(house["costs"][site] * units for site, units in house["units"].items())


def attempt(house: dict[str, Any], budget: Fraction) -> dict[str, int]:
    try:
        return project(**house, budget=budget)
    except RecipeError:
        assume(False)
        raise


@given(house=houses(), budget=SHARES)
def test_legal_counts_of_a_grid_are_the_grid(house: dict[str, Any], budget: Fraction) -> None:
    assume(house["multiple"])
    multiple = house["multiple"]
    legal = {
        site: sorted({0, *range(units % multiple, units - multiple + 1, multiple)})
        for site, units in house["units"].items()
    }
    expected = attempt(house, budget)
    assert project(**(house | {"multiple": None}), budget=budget, legal=legal) == expected


def test_only_legal_counts_are_taken() -> None:
    wish = {"shares": {"a": Fraction(0)}, "units": {"a": 8}, "costs": {"a": 1}}
    legal = {"a": [0, 4, 6, 7]}
    found = [project(**wish, budget=gone, legal=legal)["a"] for gone in range(8)]
    assert found == [0, 4, 4, 4, 4, 6, 6, 7]
    with pytest.raises(RecipeError, match=r"At most 0\.75 can"):
        project(**wish, budget=7, legal={"a": [0, 4, 6]})


@given(house=houses(), budget=SHARES)
def test_budget_ties_and_multiples_hold(house: dict[str, Any], budget: Fraction) -> None:
    counts = attempt(house, budget)
    assert list(counts) == list(house["units"])
    multiple = house["multiple"] or 1
    for site, count in counts.items():
        kept = house["units"][site] - count
        assert count == 0 or (kept > 0 and kept % multiple == 0)
    for tie in house["ties"]:
        assert len({counts[site] for site in tie}) == 1
    short = budget * total(house) - removed(house, counts)
    if house["ties"] or house["multiple"]:
        assert short <= 0
    else:
        assert 2 * short <= sum(house["costs"].values())


@given(house=houses(), budgets=st.tuples(SHARES, SHARES))
def test_no_count_falls_when_the_budget_grows(
    house: dict[str, Any], budgets: tuple[Fraction, Fraction]
) -> None:
    assume(house["ties"] or house["multiple"])
    low, high = (attempt(house, budget) for budget in sorted(budgets))
    assert all(low[site] <= high[site] for site in low)


@given(house=houses(), budget=SHARES)
def test_the_last_step_was_needed(house: dict[str, Any], budget: Fraction) -> None:
    assume(house["ties"] or house["multiple"])
    counts = attempt(house, budget)
    over = removed(house, counts) - budget * total(house)
    multiple = house["multiple"] or 1
    alone = [[site] for site in counts if not any(site in tie for tie in house["ties"])]
    steps = [
        min(multiple, counts[tie[0]]) * sum(house["costs"][site] for site in tie)
        for tie in [*house["ties"], *alone]
    ]
    assert over == 0 or over < max(steps)


@given(
    units=st.dictionaries(st.text(max_size=3), st.integers(2, 10**8), min_size=1, max_size=9),
    budget=SHARES,
)
def test_plain_sites_with_uniform_shares_lose_exactly_their_share(
    units: dict[str, int], budget: Fraction
) -> None:
    counts = {site: round_half_up(budget * number) for site, number in units.items()}
    total = sum(units.values())
    assume(all(counts[site] < units[site] for site in units))
    assume(budget * total <= total - len(units))  # one unit of each stays
    sites = [
        Site(name=site, block=0, spans=(), num_units=number, unit_cost=1)
        for site, number in units.items()
    ]
    shares = ALLOCATIONS["uniform"].fn(Request(sites=sites, target=budget))
    assert project(shares, units, dict.fromkeys(units, 1), budget=budget) == counts


def test_shares_that_miss_the_budget_are_shifted_alike_up_to_the_ceiling() -> None:
    """One unit of 20 must stay, so the ceiling is 0.95 and the shift 0.23: .59, .95, .83."""
    shares = {"a": Fraction("0.36"), "b": Fraction("0.84"), "c": Fraction("0.6")}
    counts = project(
        shares,
        dict.fromkeys(shares, 20),
        {"a": 10**6, "b": 10**6, "c": 2 * 10**6},
        budget=Fraction("0.8"),
    )
    assert counts == {"a": 12, "b": 19, "c": 17}


@pytest.mark.parametrize("num_blocks", [1, 2, 32])
def test_tied_blocks_shrink_to_the_next_multiple_not_above_the_asked_size(num_blocks: int) -> None:
    sites = [f"{block}.ffn" for block in range(num_blocks)]
    counts = project(
        dict.fromkeys(sites, Fraction(1, 5)),
        dict.fromkeys(sites, 11008),
        dict.fromkeys(sites, 3 * 4096),
        budget=Fraction(1, 5),
        ties=[sites],
        multiple=128,
    )
    assert set(counts.values()) == {11008 - 8704}  # 8806.4 asked; 8832 would be above it


def test_untied_blocks_reach_a_closer_size_than_tied_ones() -> None:
    sites = [f"{block}.ffn" for block in range(32)]
    counts = project(
        dict.fromkeys(sites, Fraction(1, 5)),
        dict.fromkeys(sites, 11008),
        dict.fromkeys(sites, 3),
        budget=Fraction(1, 5),
        multiple=128,
    )
    kept = sum(11008 - count for count in counts.values())
    asked = Fraction(4, 5) * 32 * 11008
    assert asked - 128 < kept <= asked


def test_a_width_off_the_grid_may_stay_but_not_shrink_off_it() -> None:
    def kept(budget: Fraction) -> int:
        wish = {"a": budget}
        return 100 - project(wish, {"a": 100}, {"a": 7}, budget=budget, multiple=32)["a"]

    assert [kept(Fraction(n, 100)) for n in (0, 1, 4, 5, 36, 37, 68)] == [
        100,
        96,
        96,
        64,
        64,
        32,
        32,
    ]


def test_a_budget_in_parameters_is_met() -> None:
    shares = {"a": Fraction(1, 2), "b": Fraction(1, 2)}
    counts = project(shares, {"a": 8, "b": 8}, {"a": 10, "b": 10}, budget=81, multiple=1)
    assert sorted(counts.values()) == [4, 5]


def test_nothing_asked_removes_nothing() -> None:
    wish = {"a": Fraction(1, 2)}
    assert project(wish, {"a": 9}, {"a": 1}, budget=0, multiple=4) == {"a": 0}


def test_many_weights_in_a_tie_take_no_longer() -> None:
    units = {"q": 4096 * 4096, "k": 4096 * 4096}
    wish = {"q": Fraction(1, 10), "k": Fraction(9, 10)}
    counts = project(wish, units, {"q": 1, "k": 1}, budget=Fraction(1, 3), ties=[["q", "k"]])
    assert counts == dict.fromkeys(units, -(-(4096 * 4096) // 3))


def test_an_impossible_budget_says_how_much_is_possible() -> None:
    wish = {"a": Fraction(95, 100)}
    with pytest.raises(RecipeError, match=r"^sparsity: 0\.95 cannot .* 0\.9375 .* width of 4"):
        project(wish, {"a": 64}, {"a": 3}, budget=Fraction(95, 100), multiple=4)
    with pytest.raises(
        RecipeError, match=r"^sparsity: 1 cannot .* 0\.984375 .*one unit; lower `spa"
    ):
        project({"a": Fraction(1)}, {"a": 64}, {"a": 3}, budget=Fraction(1))


def test_ties_that_cannot_hold_are_refused() -> None:
    wish = dict.fromkeys("abc", Fraction(0))
    units, costs = {"a": 4, "b": 4, "c": 5}, dict.fromkeys("abc", 1)
    with pytest.raises(ValueError, match="two ties"):
        project(wish, units, costs, budget=0, ties=[["a", "b"], ["b"]])
    with pytest.raises(ValueError, match="differ in units"):
        project(wish, units, costs, budget=0, ties=[["a", "c"]])


@pytest.mark.parametrize(
    ("width", "multiple"),
    [(11008, 128), (2048, 128), (768, 32), (172, 8), (64, 4), (16, 1), (3, 1)],
)
def test_default_multiple(width: int, multiple: int) -> None:
    assert default_multiple(width) == multiple


def test_default_multiples_are_powers_of_two_up_to_a_sixteenth() -> None:
    found = [default_multiple(width) for width in range(1, 5000)]
    assert all(low <= high for low, high in pairwise(found))
    assert all(m == 1 or m * 16 <= width for width, m in enumerate(found, start=1))
    assert set(found) == {2**power for power in range(8)}
