"""Scores: the published vectors, float32, and no change to what they read."""

from __future__ import annotations

import pytest
import torch

from llmprune.score import SCORES
from llmprune.stats import STATISTICS
from llmprune.stats.types import Stats

T2_WEIGHT = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.2, -0.1, 4.0, 1.0]])
T2_STATS = Stats(
    num_tokens=1, values={"col_sq": torch.tensor([1.0, 100.0, 4.0, 16.0], dtype=torch.float64)}
)


def test_magnitude_on_the_fixture() -> None:
    assert torch.equal(SCORES["magnitude"].fn(T2_WEIGHT, T2_STATS), T2_WEIGHT.abs())


def test_wanda_on_the_fixture() -> None:
    expected = torch.tensor([[3.0, 10.0, 4.0, 2.0], [0.2, 1.0, 8.0, 4.0]])
    torch.testing.assert_close(SCORES["wanda"].fn(T2_WEIGHT, T2_STATS), expected)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_score_is_new_float32_and_changes_nothing(name: str, dtype: torch.dtype) -> None:
    weight, col_sq = T2_WEIGHT.to(dtype), T2_STATS["col_sq"].clone()
    before = weight.clone()
    score = SCORES[name].fn(weight, T2_STATS)
    assert score.dtype == torch.float32
    assert score.shape == weight.shape
    assert score.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert torch.equal(T2_STATS["col_sq"], col_sq)


@pytest.mark.parametrize("name", SCORES)
def test_every_need_is_a_statistic_and_enough(name: str) -> None:
    score = SCORES[name]
    stats = Stats(num_tokens=1, values={need: T2_STATS[need] for need in score.needs})
    assert set(score.needs) <= set(STATISTICS)
    assert bool(score.fn(T2_WEIGHT, stats).isfinite().all())


def test_norms_that_overflow_float32_when_squared_still_score() -> None:
    stats = Stats(num_tokens=1, values={"col_sq": torch.full((4,), 1e60, dtype=torch.float64)})
    torch.testing.assert_close(SCORES["wanda"].fn(T2_WEIGHT, stats), T2_WEIGHT.abs() * 1e30)
