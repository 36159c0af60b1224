"""Blocks by how little they turn the residual stream: the published vectors, and exact totals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.allocation.influence import (
    SLOPE,
    Residual,
    adapt_importance,
    adapt_shares,
    angular_distance,
    block_influence,
    by_angle,
    by_similarity,
    cfsp_keep,
)
from llmprune.allocation.types import Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError

COSINES = st.lists(st.floats(-1, 1), min_size=1, max_size=8)
PROFILE = [[0.9, 0.14, 0.4], [0.95, 0.1, 0.3], [0.7, 0.25, 0.9]]


def request(
    target: Fraction, profiles: Sequence[Sequence[float]], units: int = 120, **options: float
) -> Request:
    """Return a request of two sites a block; profiles are means over 10 tokens."""
    sites, found = [], {}
    for block, means in enumerate(profiles):
        for name in ("attention", "ffn"):
            sites.append(
                Site(name=f"{block}.{name}", block=block, spans=(), num_units=units, unit_cost=3)
            )
            sums = [10 * mean for mean in means]
            found[f"{block}.{name}"] = torch.tensor([*sums, 10.0], dtype=torch.float64)
    return Request(sites=sites, target=target, profiles=found, options=options)


def test_similarity_of_the_fixture() -> None:
    """(1, 0) becomes (1, 1)."""
    cosine = 1 / math.sqrt(2)
    assert block_influence(cosine) == pytest.approx(0.29289, abs=1e-5)
    assert angular_distance(cosine) == pytest.approx(0.25)


def test_the_angle_of_cosines_that_rounding_put_out_of_range() -> None:
    assert angular_distance(1 + 1e-7) == 0.0
    assert angular_distance(-1 - 1e-7) == 1.0


def test_the_mean_of_angles_is_not_the_angle_of_the_mean() -> None:
    angles = [angular_distance(cosine) for cosine in (1.0, 0.0)]
    assert sum(angles) / 2 == pytest.approx(0.25)
    assert angular_distance(0.5) == pytest.approx(1 / 3)


def test_means_over_tokens_and_none_without() -> None:
    assert Residual.of(torch.tensor([3.0, 1.0, 2.0, 4.0])) == Residual(0.75, 0.25, 0.5)
    assert all(math.isnan(value) for value in Residual.of(torch.zeros(4)))


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([1000.0, 2000.0, 3000.0], [0.76003, 0.8, 0.83997]),
        ([5e4, 1e4, 0.0], [0.99048, 0.73296, 0.67656]),
    ],
)
def test_cfsp_on_its_fixtures(sums: list[float], expected: list[float]) -> None:
    assert cfsp_keep(sums, 0.2, slope=1e-4) == pytest.approx(expected, abs=1e-5)
    means = [each / 131072 for each in sums]
    assert cfsp_keep(means, 0.2) == pytest.approx(expected, abs=1e-3)
    assert pytest.approx(131072 * 1e-4, abs=0.01) == SLOPE


@given(
    distances=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    removed=st.floats(0, 0.95),
    slope=st.floats(0, 100),
)
def test_cfsp_keeps_what_was_asked_on_the_mean_and_never_more_than_all(
    distances: list[float], removed: float, slope: float
) -> None:
    keeps = cfsp_keep(distances, removed, slope)
    assert sum(keeps) / len(keeps) == pytest.approx(1 - removed)
    assert all(0 < keep <= 1 + 1e-12 for keep in keeps)
    order = sorted(range(len(keeps)), key=lambda index: distances[index])
    ascending = [keeps[index] for index in order]
    assert all(a <= b + 1e-12 for a, b in pairwise(ascending))


def test_adapt_pruner_on_its_fixture() -> None:
    assert adapt_importance([0.9, 0.95, 0.7]) == pytest.approx([-1 / 3, -2 / 3, 1.0])
    shares = adapt_shares([0.0] * 3, [0.9, 0.95, 0.7], 0.02, 0.02)
    assert shares == pytest.approx([0.02667, 0.03333, 0.0], abs=1e-5)


def test_steps_add_up_and_drift_where_shares_end_at_zero() -> None:
    shares = [0.0, 0.0, 0.0]
    for _ in range(2):
        shares = adapt_shares(shares, [0.9, 0.95, 0.7], 0.02, 0.05)
    assert shares == pytest.approx([0.04 + 0.1 / 3, 0.04 + 0.2 / 3, 0.0])
    assert sum(shares) / 3 > 0.04
    assert adapt_shares([0.98], [0.5], 0.5, 0.0) == [0.99]


@given(cosines=COSINES)
def test_importance_is_centred_and_its_largest_is_one(cosines: list[float]) -> None:
    found = adapt_importance(cosines)
    assert max(abs(each) for each in found) in (0.0, 1.0)
    assert sum(found) == pytest.approx(0.0, abs=1e-3) or max(cosines) - min(cosines) < 1e-9
    for one, other in pairwise(cosines):
        if one < other - 1e-6:
            assert found[cosines.index(one)] > found[cosines.index(other)]


@pytest.mark.parametrize(
    ("fn", "options"), [(by_angle, {"slope": SLOPE}), (by_similarity, {"spread": 0.2})]
)
@given(percent=st.integers(0, 60))
def test_shares_are_whole_units_meet_the_target_and_follow_the_score(
    fn: type, options: dict[str, float], percent: int
) -> None:
    asked = request(Fraction(percent, 100), PROFILE, **options)
    shares = fn(asked)
    assert list(shares) == [site.name for site in asked.sites]
    counts = [share * 120 for share in shares.values()]
    assert all(count.denominator == 1 for count in counts)
    assert abs(sum(counts) - Fraction(percent, 100) * 720) <= 1
    # the sites of a block lose alike, to within a unit; the second turns least and loses most
    of_block = [(counts[2 * block] + counts[2 * block + 1]) / 2 for block in range(3)]
    assert all(abs(counts[2 * block] - counts[2 * block + 1]) <= 1 for block in range(3))
    assert of_block[1] >= of_block[0] - 1 >= of_block[2] - 2
    if percent >= 20:
        assert of_block[1] > of_block[2]


def test_the_two_differ_where_a_few_tokens_turn_far() -> None:
    """Equal cosines, but the angles of the first block are those of a few tokens."""
    profiles = [[0.9, 0.05, 0.0], [0.9, 0.15, 0.0]]
    by_cosine = by_similarity(request(Fraction(3, 10), profiles, spread=0.2))
    assert len(set(by_cosine.values())) == 1
    of_angle = by_angle(request(Fraction(3, 10), profiles, slope=SLOPE))
    assert of_angle["0.ffn"] > of_angle["1.ffn"]


def test_a_block_without_tokens_loses_the_target() -> None:
    for fn, options in ((by_angle, {"slope": 1.0}), (by_similarity, {"spread": 0.1})):
        asked = request(Fraction(1, 4), [[0.9, 0.1, 0.0]] * 2, **options)
        profiles = {**asked.profiles}
        for name in ("1.attention", "1.ffn"):
            profiles[name] = torch.zeros(4, dtype=torch.float64)
        some = Request(
            sites=asked.sites, target=asked.target, profiles=profiles, options=asked.options
        )
        assert set(fn(some).values()) == {Fraction(1, 4)}
        nothing = dict.fromkeys(profiles, torch.zeros(4))
        none = Request(
            sites=asked.sites, target=asked.target, profiles=nothing, options=asked.options
        )
        assert set(fn(none).values()) == {Fraction(1, 4)}


def test_a_number_out_of_range_is_told() -> None:
    with pytest.raises(RecipeError, match=r"prune\.options\.spread: 2 is out of range"):
        by_similarity(request(Fraction(1, 4), PROFILE, spread=2.0))
    with pytest.raises(RecipeError, match=r"prune\.options\.slope: -1 is out of range"):
        by_angle(request(Fraction(1, 4), PROFILE, slope=-1.0))
