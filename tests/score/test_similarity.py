"""How far a block moves what passes it: by hand, against a slow version, and in parts."""

from __future__ import annotations

import math

import pytest
import torch

from llmprune.arch.types import Span
from llmprune.score import UNIT_SCORES
from llmprune.score.members import Member
from llmprune.stats.residual import ResidualSums
from llmprune.stats.types import Stats


def member(stats: Stats) -> Member:
    return Member(Span(linear="o", axis="all"), torch.ones(1, 1), stats)


def test_the_published_vector() -> None:
    """(1, 0) becomes (1, 1): block influence 0.29289, angle a quarter of pi."""
    seen = ResidualSums()
    seen.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    here = [member(seen.result())]
    assert float(UNIT_SCORES["influence"].fn(here, 1)) == pytest.approx(0.29289, abs=1e-5)
    assert float(UNIT_SCORES["angle"].fn(here, 1)) == pytest.approx(0.25, abs=1e-6)


def test_sums_are_those_of_single_tokens_in_any_parts() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    expected = [0.0, 0.0, 0.0, 7.0]
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        long, short = math.hypot(*a), math.hypot(*b)
        cosine = sum(p * q for p, q in zip(a, b, strict=True)) / (long * short)
        expected[0] += cosine
        expected[1] += math.acos(cosine) / math.pi
        expected[2] += math.dist(a, b) / long
    first, second = ResidualSums(), ResidualSums()
    first.add(x[:3], y[:3])
    second.add(x[3:], y[3:])
    first.merge(second)
    found = first.result()["residual"]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


def test_a_token_of_zeros_counts_as_not_moved() -> None:
    seen = ResidualSums()
    seen.add(torch.zeros(1, 3), torch.ones(1, 3))
    assert seen.result()["residual"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_influence_and_angle_rank_differently() -> None:
    """A block that turns few tokens a lot against one that turns all a little."""
    few, all_ = ResidualSums(), ResidualSums()
    right, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    few.add(right.repeat(2, 1), torch.cat([right, up]))
    turned = torch.tensor([[math.cos(0.9), math.sin(0.9)]])
    all_.add(right.repeat(2, 1), turned.repeat(2, 1))
    scores = {
        name: [float(UNIT_SCORES[name].fn([member(each.result())], 1)) for each in (few, all_)]
        for name in ("influence", "angle")
    }
    assert scores["influence"][0] > scores["influence"][1]
    assert scores["angle"][0] < scores["angle"][1]
