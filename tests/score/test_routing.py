"""Scores of experts: the vectors of their formulas, and the search over all subsets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from llmprune.arch.types import Span
from llmprune.base.errors import NumericalError, TooLarge
from llmprune.score.members import Member
from llmprune.score.routing import ean, frequency, least_error_subset, reap, weighted_ean
from llmprune.stats.types import Stats
from tests.reference import routing as reference

LOGITS = ((2.0, 1.0, 0.0), (0.0, 1.0, 2.0))
NORMS = ((3.0, 4.0, 5.0), (6.0, 2.0, 1.0))


def members_of(values: dict[str, list[float]]) -> list[Member]:
    """Return one member, which holds the statistics of the mixture as all do."""
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    span = Span(linear="experts.0.down_proj", axis="all")
    return [Member(span, torch.zeros(1, 1), Stats(num_tokens=2, values=tensors))]


def two_tokens() -> list[Member]:
    """Return the statistics of two tokens that meet two of three experts each."""
    chosen, gates = zip(*(reference.top_gates(row, 2) for row in LOGITS), strict=True)
    outputs = [[[row[e]] for e in experts] for row, experts in zip(NORMS, chosen, strict=True)]
    return members_of(reference.routing(chosen, gates, outputs, 3))


def assert_near(found: Tensor, expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_vectors_of_two_tokens() -> None:
    members = two_tokens()
    assert_near(reap(members, 3), (2.19318, 0.80682, 0.73106))
    assert_near(frequency(members, 3), (1, 2, 1))
    assert_near(ean(members, 3), (3, 3, 1))
    assert_near(weighted_ean(members, 3), (2.19318, 1.61364, 0.73106))


def test_gates_as_the_model_applies_them_weigh_less_where_they_do_not_add_up_to_one() -> None:
    members = members_of(
        reference.routing([(0, 1), (1, 0)], [(0.5, 0.25), (0.3, 0.3)], [[[3], [4]], [[6], [2]]], 2)
    )
    assert_near(reap(members, 2), ((2.0 + 1.0) / 2, (4 / 3 + 3.0) / 2))
    assert_near(reap(members, 2, renormalise=0), ((1.5 + 0.6) / 2, (1.0 + 1.8) / 2))


def test_an_expert_without_tokens_scores_nothing() -> None:
    members = members_of(reference.routing([(0,)], [(1.0,)], [[[2.0]]], 2))
    for score in (reap, frequency, ean, weighted_ean):
        assert score(members, 2).tolist()[1] == 0 < score(members, 2).tolist()[0]


def test_scores_leave_the_statistics_as_they_are() -> None:
    members = two_tokens()
    before = {name: value.clone() for name, value in members[0].stats.values.items()}
    for score in (reap, frequency, ean, weighted_ean):
        score(members, 3).zero_()
    assert all(torch.equal(members[0].stats[name], value) for name, value in before.items())


def test_the_best_subset_is_that_of_least_error() -> None:
    errors = dict(zip(combinations(range(5), 3), torch.randperm(10).tolist(), strict=True))
    best = min(errors, key=lambda kept: errors[kept])
    assert tuple(least_error_subset(errors.__getitem__, 5, 3).tolist()) == best


def test_pairs_that_need_each_other_stay_together() -> None:
    def error(kept: tuple[int, ...]) -> float:  # experts 1 and 3 are worth something as a pair
        return 0.0 if {1, 3} <= set(kept) else 1.0 + len({1, 3} & set(kept))

    assert least_error_subset(error, 4, 2).tolist() == [1, 3]


def test_too_many_subsets_are_refused_before_any_is_tried() -> None:
    def error(kept: tuple[int, ...]) -> float:
        raise AssertionError("tried")

    with pytest.raises(TooLarge, match="8 of 16 experts can be kept in 12,870 ways"):
        least_error_subset(error, 16, 8)


def test_an_error_that_is_no_number_is_refused() -> None:
    with pytest.raises(NumericalError, match=r"with experts \(0,\) alone"):
        least_error_subset(lambda kept: float("nan"), 2, 1)
