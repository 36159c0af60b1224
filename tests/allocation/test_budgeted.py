"""Allocations that minimise a sum or search: the exact optimum on toys, invariants, edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.curves import LEVELS, error_at, error_curve
from llmprune.allocation.distortion import teams_of
from llmprune.allocation.knapsack import cheapest, cheapest_shares
from llmprune.allocation.learned import (
    candidate_shares,
    expected_share,
    keep_probability,
    mixture,
    tilted,
)
from llmprune.allocation.perturbation import keep_counts
from llmprune.allocation.types import Candidate, Measured, Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up
from llmprune.stats.types import Stats
from tests.reference import allocations

CUBE = torch.from_numpy(LEVELS**3)


def sites(*units: int, blocks: Sequence[int] | None = None) -> list[Site]:
    return [
        Site(
            name=f"s{index}",
            block=blocks[index] if blocks else index,
            spans=(),
            num_units=num,
            unit_cost=1,
        )
        for index, num in enumerate(units)
    ]


class Toy:
    """A probe whose divergence is a sum over sites; remembers what it was asked."""

    def __init__(self, errors: Mapping[str, Callable[[float], float]], loss: float = 1.0) -> None:
        self.errors, self.loss, self.rounds = errors, loss, list[list[Candidate]]()

    def divergence(self, shares: Mapping[str, Fraction]) -> float:
        return sum(self.errors[name](float(share)) for name, share in shares.items())

    def __call__(self, candidates: Sequence[Candidate]) -> list[Measured]:
        self.rounds.append(list(candidates))
        answers = []
        for candidate in candidates:
            kl = torch.full((2,), self.divergence(candidate.shares), dtype=torch.float64)
            change = sum(self.errors[name](scale) for name, scale in candidate.noise.items())
            loss = torch.tensor([self.loss + change, self.loss - change], dtype=torch.float64)
            answers.append(Measured(kl_S=kl, loss_S=loss))
        return answers


def ask(
    name: str,
    where: Sequence[Site],
    target: str,
    probe: Toy | None = None,
    profiles: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    **options: float,
) -> dict[str, float]:
    row = ALLOCATIONS[name]
    request = Request(
        sites=where,
        target=Fraction(target),
        profiles=profiles or {},
        options={**row.options, **options},
        probe=probe,
        seed=seed,
    )
    shares = row.fn(request)
    removed = sum(shares[site.name] * site.num_weights for site in where)
    assert removed == round_half_up(request.target * sum(site.num_weights for site in where))
    if probe is not None:
        assert row.rounds is not None
        planned = row.rounds(len(where), request.options)
        assert len(probe.rounds) <= len(planned)
        for asked, most in zip(probe.rounds, planned, strict=False):
            assert len(asked) <= most
    return {name: float(share) for name, share in shares.items()}


def test_the_exact_optimum_on_the_published_vector() -> None:
    """Greedy steps would give (3, 0, 2), which costs 9."""
    errors = [np.array(each) for each in ([0, 1, 3, 6], [0, 4, 4.2, 4.4], [0, 1, 3, 6])]
    found = cheapest([each.astype(float) for each in errors], 5)
    assert found == [1, 3, 1]
    assert sum(each[k] for each, k in zip(errors, found, strict=True)) == pytest.approx(6.4)


@given(
    errors=st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.0, float("inf")]), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_no_combination_costs_less(errors: list[list[float]], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(len(each) - 1 for each in errors)))
    least = allocations.cheapest_of_all(errors, budget)
    if least == float("inf"):
        return
    found = cheapest([np.array(each) for each in errors], budget)
    assert sum(found) == budget
    assert sum(each[k] for each, k in zip(errors, found, strict=True)) == pytest.approx(least)


def test_what_cannot_be_spent_or_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="5 units are asked"):
        cheapest([np.array([0.0, 1.0])], 5)
    with pytest.raises(ValueError, match="no number"):
        cheapest([np.array([0.0, float("nan")])], 1)


def test_units_shrink_to_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.allocation.knapsack._UNITS", 100)
    found = cheapest_shares([lambda s: s**2, lambda s: 3 * s**2], [10**9, 10**9], 0.5, at_most=1)
    assert found == [0.76, 0.24] or found == [0.74, 0.26] or found == [0.75, 0.25]


def test_a_curve_is_that_of_its_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 20, generator=draw)
    x = torch.randn(50, 20, generator=draw) * torch.rand(20, generator=draw)
    gram = x.T @ x
    found = error_curve(weight, Stats(num_tokens=50, values={"gram": gram}), None)
    expected = allocations.error_curve(weight, gram, LEVELS.tolist())
    assert found.tolist() == pytest.approx(np.maximum.accumulate(expected).tolist(), rel=1e-4)
    scaled = Stats(num_tokens=50, values={"gram": gram * 7.3})
    assert error_curve(weight * 3, scaled, None).tolist() == pytest.approx(found.tolist(), rel=1e-4)


def test_a_curve_of_many_rows_is_that_of_an_even_sample() -> None:
    weight = torch.randn(1100, 20, generator=torch.Generator().manual_seed(0))
    stats = Stats(num_tokens=9, values={"gram": torch.eye(20)})
    found = error_curve(weight, stats, None)
    assert found.tolist() == error_curve(weight[::3], stats, None).tolist()
    lost_OI = weight.square().sort(dim=1).values.cumsum(dim=1)
    assert found[1:].tolist() == pytest.approx(
        (lost_OI.sum(0) / lost_OI[:, -1].sum()).tolist(), abs=0.02
    )


def test_a_curve_without_tokens_is_that_of_white_inputs_and_of_nothing_a_line() -> None:
    weight = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    white = error_curve(weight, Stats(num_tokens=9, values={"gram": torch.eye(20)}), None)
    unseen = Stats(num_tokens=0, values={"gram": torch.zeros(20, 20)})
    broken = Stats(num_tokens=9, values={"gram": torch.full((20, 20), float("nan"))})
    for stats in (unseen, broken, Stats(num_tokens=9, values={"gram": torch.zeros(20, 20)})):
        assert error_curve(weight, stats, None).tolist() == white.tolist()
    assert error_curve(weight * 0, unseen, None).tolist() == pytest.approx(LEVELS.tolist())


def test_between_levels_a_cube_stays_a_cube() -> None:
    share = np.array([0.0, 0.31, 0.5, 0.98, 1.0])
    assert error_at(LEVELS**3, share).tolist() == pytest.approx((share**3).tolist())


def test_rate_distortion_takes_from_the_linear_that_loses_least() -> None:
    """Of s^3 and 4 s^3 the slopes meet where one share is twice the other."""
    profiles = {"s0": CUBE / 4, "s1": CUBE}
    where = sites(3000, 3000)
    found = ask("rate-distortion", where, "0.3", profiles=profiles)
    assert found == pytest.approx({"s0": 0.4, "s1": 0.2}, abs=1e-3)
    limited = ask("rate-distortion", where, "0.3", profiles=profiles, max_share=0.35)
    assert limited == pytest.approx({"s0": 0.35, "s1": 0.25}, abs=1e-3)


def test_size_says_how_much_a_large_linear_counts() -> None:
    profiles = {"s0": CUBE, "s1": CUBE}
    where = sites(1000, 4000)
    even = ask("rate-distortion", where, "0.4", profiles=profiles, size=1)
    assert even == pytest.approx({"s0": 0.4, "s1": 0.4}, abs=2e-3)
    published = ask("rate-distortion", where, "0.4", profiles=profiles, size=0)
    assert published["s1"] == pytest.approx(2 * published["s0"], rel=0.02)


@pytest.mark.parametrize("name", ["rate-distortion", "learned"])
def test_a_high_target_raises_the_limit(name: str) -> None:
    profiles = {"s0": CUBE, "s1": CUBE}
    found = ask(name, sites(1000, 1000), "0.97", profiles=profiles)
    assert found == pytest.approx({"s0": 0.97, "s1": 0.97}, abs=2e-3)
    assert ask(name, sites(1000, 1000), "0", profiles=profiles) == {"s0": 0, "s1": 0}


def test_sensitivity_finds_the_site_that_does_not_matter() -> None:
    """The curves are alike; alone at the target the second costs a hundred times the first."""
    toy = Toy({"s0": lambda s: s**3 / 100, "s1": lambda s: s**3, "s2": lambda s: s**3})
    where, profiles = sites(1000, 1000, 1000), {"s0": CUBE, "s1": CUBE, "s2": CUBE}
    found = ask("sensitivity", where, "0.5", toy, profiles, power=1)
    assert [list(each.shares.items()) for each in toy.rounds[0]] == [
        [(f"s{index}", Fraction(1, 2))] for index in range(3)
    ]
    assert found == pytest.approx({"s0": 0.95, "s1": 0.275, "s2": 0.275}, abs=2e-3)
    careful = ask("sensitivity", where, "0.5", Toy(toy.errors), profiles, power=2)
    assert 0.275 < careful["s1"] < careful["s0"] < 0.95
    blind = ask("rate-distortion", where, "0.5", profiles=profiles)
    assert blind == pytest.approx(dict.fromkeys(found, 0.5), abs=2e-3)


def test_divergences_that_are_no_number_do_no_harm() -> None:
    toy = Toy({"s0": lambda s: float("nan"), "s1": lambda s: -1e-9, "s2": lambda s: s**3})
    profiles = {"s0": CUBE, "s1": CUBE, "s2": CUBE}
    found = ask("sensitivity", sites(100, 100, 100), "0.5", toy, profiles)
    assert found["s1"] == 0.95 and found["s0"] == pytest.approx(found["s2"], abs=0.02)
    ask("evopress", sites(100, 100, 100), "0.5", Toy(toy.errors), generations=2)
    ask("ecoflap", sites(100, 100, 100), "0.5", Toy(toy.errors))


def test_experts_of_a_block_are_a_team_where_there_are_many() -> None:
    many = [
        Site(name=f"{b}.{e}", block=b, spans=(), num_units=8, unit_cost=1, shape=(2, 4))
        for b in range(3)
        for e in range(400)
    ]
    assert [len(team) for team in teams_of(many)] == [400, 400, 400]
    assert [len(team) for team in teams_of(many[:1000])] == [1] * 1000


def test_ecoflap_on_the_published_vector() -> None:
    assert keep_counts([100, 100, 200], [1, 3, 4], 0.5, most=0.6) == [45, 55, 100]
    assert keep_counts([100, 100], [0, 0], 0.5, most=0.6) == [50, 50]
    assert keep_counts([10, 100], [1, 0], 0.2, most=0.9) == [10, 78]
    toy = Toy({"s0": lambda e: e, "s1": lambda e: 3 * e, "s2": lambda e: 4 * e})
    shares = ask("ecoflap", sites(100, 100, 200), "0.5", toy)
    assert list(shares.values()) == [0.55, 0.45, 0.5]
    asked = [(dict(each.shares), dict(each.noise)) for each in toy.rounds[0]]
    assert asked[:3] == [({}, {"s0": 1e-3}), ({}, {"s0": -1e-3}), ({}, {"s1": 1e-3})]
    assert len(asked) == 6


def test_ecoflap_adds_up_the_linears_of_a_block() -> None:
    toy = Toy({"s0": lambda e: e, "s1": lambda e: 2 * e, "s2": lambda e: 4 * e})
    found = ask("ecoflap", sites(50, 50, 100, blocks=[0, 0, 1]), "0.5", toy)
    assert found["s0"] == pytest.approx(found["s1"], abs=0.021) and found["s2"] < found["s0"]
    with pytest.raises(RecipeError, match=r"^prune\.options\.eps: 0 is out of range\. .* above 0;"):
        ask("ecoflap", sites(50), "0.5", toy, eps=0)


def test_learned_thresholds_on_the_published_vector() -> None:
    part, candidate = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([1.0, 0.5, 0.0])
    assert float(expected_share(part, candidate)) == 0.5
    assert keep_probability(part, candidate, 4).tolist() == [0.25, 0.25, 0.75, 0.75]
    assert candidate_shares()[[0, 1, -1]].tolist() == [1.0, 0.99, 0.0]


def test_a_tilt_meets_the_budget_and_carries_its_derivative() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 11, generator=draw, dtype=torch.float64).requires_grad_()
    candidate, weight = candidate_shares(11), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    worth = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)

    def shares(logits_LD: Tensor) -> Tensor:
        return expected_share(mixture(tilted(logits_LD, candidate, weight, 0.7)), candidate)

    found = shares(logits)
    assert (found * weight).sum().item() / 8 == pytest.approx(0.7)
    assert torch.autograd.gradcheck(lambda x: (shares(x) ** 2 * worth).sum(), logits, atol=1e-5)


def test_descent_ends_where_dynamic_programming_does_on_convex_curves() -> None:
    profiles = {"s0": CUBE / 4, "s1": CUBE, "s2": CUBE**1.5}
    where = sites(4000, 1000, 4000)
    exact = ask("rate-distortion", where, "0.4", profiles=profiles)
    learned = ask("learned", where, "0.4", profiles=profiles)
    assert learned == pytest.approx(exact, abs=0.02)


def levels_of(toy: Toy, where: Sequence[Site], target: Fraction, step: int) -> list[list[Fraction]]:
    return [
        [(each.shares[s.name] - target) * s.num_weights / step for s in where]
        for asked in toy.rounds
        for each in asked
    ]


@given(seed=st.integers(0, 5), target=st.sampled_from(["0.1", "0.5", "0.9"]))
def test_every_candidate_of_a_search_removes_the_same(seed: int, target: str) -> None:
    toy = Toy({f"s{i}": lambda s, i=i: (i + 1) * s**3 for i in range(4)})  # type: ignore[misc]
    where = sites(100, 200, 400, 100)
    ask("evopress", where, target, toy, seed=seed, start=0, generations=4, offspring=6)
    levels = levels_of(toy, where, Fraction(target), 10)
    assert all(sum(each) == 0 for each in levels)
    assert all(level.denominator == 1 and abs(level) <= 8 for each in levels for level in each)
    assert all(
        0 <= share <= 0.95 for asked in toy.rounds for c in asked for share in c.shares.values()
    )
    parents = {tuple(asked[0].shares.items()) for asked in toy.rounds}
    others = [tuple(each.shares.items()) for asked in toy.rounds for each in asked[1:]]
    assert len(set(others)) == len(others)
    assert tuple(toy.rounds[0][0].shares.items()) not in others and parents <= {
        tuple(toy.rounds[0][0].shares.items()),
        *others,
    }


def test_a_search_is_the_same_for_a_seed_and_never_ends_above_its_start() -> None:
    def run(seed: int, num: int) -> tuple[dict[str, float], Toy]:
        toy = Toy({f"s{i}": lambda s, i=i: (i + 1) * s**4 for i in range(6)})  # type: ignore[misc]
        where = sites(*[1000] * 6)
        return ask("evopress", where, "0.5", toy, seed=seed, start=0, generations=num), toy

    (first, toy), (again, _) = run(0, 8), run(0, 8)
    assert first == again
    assert run(0, 1)[1].rounds[0] != run(1, 1)[1].rounds[0]
    own = [asked[0] for asked in toy.rounds]
    found = [toy.divergence(each.shares) for each in own]
    assert found == sorted(found, reverse=True) and found[-1] < found[0]


def test_a_separable_search_finds_the_optimum_of_dynamic_programming() -> None:
    """Three sites, 20 levels each of a twentieth; the sum is least at unequal shares."""
    errors: dict[str, Any] = {
        "s0": lambda s: 8 * s**3,
        "s1": lambda s: s**3,
        "s2": lambda s: 0.3 * s if s < 0.7 else 0.3 * s + 2 * (s - 0.7),
    }
    where, toy = sites(200, 200, 200), Toy(errors)
    found = ask("evopress", where, "0.5", toy, start=0, generations=30, offspring=12, max_level=12)
    tables = [np.array([error(k / 20) for k in range(20)]) for error in errors.values()]
    best = cheapest(tables, 30)
    assert [round(share * 20, 9) for share in found.values()] == best


def test_a_search_that_can_move_nothing_ends() -> None:
    toy = Toy({"s0": lambda s: s})
    assert ask("evopress", sites(100), "0.5", toy, start=0) == {"s0": 0.5}
    assert not toy.rounds
    toy = Toy({"s0": lambda s: s, "s1": lambda s: s})
    found = ask("evopress", sites(100, 100), "0.5", toy, start=0, max_level=1, offspring=50)
    assert set(found.values()) == {0.5} and sum(map(len, toy.rounds)) <= 4


def test_a_search_may_start_from_single_divergences() -> None:
    """Of s^8 and 100 s^8 the slopes meet where the shares differ by the seventh root of 100."""
    toy = Toy({"s0": lambda s: s**3 / 100, "s1": lambda s: s**3})
    found = ask("evopress", sites(1000, 1000), "0.4", toy, start=1, generations=0)
    assert len(toy.rounds) == 1 and found["s0"] == pytest.approx(0.527, abs=2e-3)
