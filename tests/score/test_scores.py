"""Scores: the published vectors, float32, and no change to what they read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.score import SCORES
from llmprune.score.noise import seed_of
from llmprune.score.types import GIVEN
from llmprune.stats import STATISTICS
from llmprune.stats.types import Stats
from tests.reference import formulas

T2_WEIGHT = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.2, -0.1, 4.0, 1.0]])
T2_STATS = Stats(
    num_tokens=1,
    values={
        "col_sq": torch.tensor([1.0, 100.0, 4.0, 16.0], dtype=torch.float64),
        "seed": torch.tensor(5),
        "curvature": torch.tensor([1.0, 0.1, 0.5, 0.25]),
        "grad_sum": torch.tensor([[0.0, -0.4, 0.2, 0.8], [0.2, 0.2, -0.2, 0.0]]),
        "grad_abs": torch.tensor([[0.2, 0.4, 0.2, 0.8], [0.8, 0.2, 0.2, 0.4]]),
        "grad_sq": torch.tensor([[0.02, 0.08, 0.04, 0.32], [0.34, 0.02, 0.02, 0.08]]),
        "region_sq": torch.tensor([[0.5, 0.0, 2.0, 8.0], [0.0, 2.0, 0.5, 0.02]]),
    },
    num_sequences=2,
)


def test_magnitude_on_the_fixture() -> None:
    assert torch.equal(SCORES["magnitude"].fn(T2_WEIGHT, T2_STATS), T2_WEIGHT.abs())


def test_wanda_on_the_fixture() -> None:
    expected = torch.tensor([[3.0, 10.0, 4.0, 2.0], [0.2, 1.0, 8.0, 4.0]])
    torch.testing.assert_close(SCORES["wanda"].fn(T2_WEIGHT, T2_STATS), expected)


def test_obs_on_its_fixture() -> None:
    """The scores before the first update, with the factor of the fixture's Gram matrix."""
    weight = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
    curvature = torch.tensor([0.471118, 0.401895, 0.458352, 0.571195])
    expected = torch.tensor([[72.088, 6.191, 19.040, 27.585], [4.505, 154.780, 19.040, 0.766]])
    score = SCORES["obs"].fn(weight, Stats(num_tokens=5, values={"curvature": curvature}))
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_score_is_new_float32_and_changes_nothing(name: str, dtype: torch.dtype) -> None:
    weight = T2_WEIGHT.to(dtype)
    before, known = weight.clone(), {key: each.clone() for key, each in T2_STATS.values.items()}
    score = SCORES[name].fn(weight, T2_STATS)
    assert score.dtype == torch.float32
    assert score.shape == weight.shape
    assert score.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)
    assert all(torch.equal(T2_STATS[key], each) for key, each in known.items())


@pytest.mark.parametrize("name", SCORES)
def test_every_need_is_a_statistic_and_enough(name: str) -> None:
    score = SCORES[name]
    stats = replace(T2_STATS, values={need: T2_STATS[need] for need in score.needs})
    assert set(score.needs) <= {*STATISTICS, *GIVEN}
    assert set(score.learnt) <= set(STATISTICS)
    assert bool(score.fn(T2_WEIGHT, stats).isfinite().all())


def test_norms_that_overflow_float32_when_squared_still_score() -> None:
    stats = Stats(num_tokens=1, values={"col_sq": torch.full((4,), 1e60, dtype=torch.float64)})
    torch.testing.assert_close(SCORES["wanda"].fn(T2_WEIGHT, stats), T2_WEIGHT.abs() * 1e30)


def test_ria_on_its_fixture() -> None:
    weight = torch.tensor([[2.0, -1.0, 1.0], [4.0, 1.0, -0.1], [0.1, 0.5, 0.4]])
    norm = torch.tensor([1.0, 16.0, 4.0], dtype=torch.float64)
    expected = torch.tensor(
        [[0.827869, 2.6, 1.833333], [1.440051, 2.384314, 0.172549], [0.116393, 2.8, 1.333333]]
    )
    score = SCORES["ria"].fn(weight, Stats(num_tokens=1, values={"col_sq": norm**2}))
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 10**6), empty_row=st.booleans(), empty_column=st.booleans())
def test_ria_as_its_formula_reads(seed: int, empty_row: bool, empty_column: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 5, generator=generator)
    norm = torch.rand(5, generator=generator, dtype=torch.float64)
    if empty_row:
        weight[2] = 0
    if empty_column:
        weight[:, 3] = 0
    score = SCORES["ria"].fn(weight, Stats(num_tokens=1, values={"col_sq": norm**2}))
    expected = formulas.relative_importance(weight.tolist(), norm.tolist())
    torch.testing.assert_close(score, torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_ria_does_not_depend_on_the_pieces_it_is_computed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    stats = Stats(num_tokens=1, values={"col_sq": torch.arange(1.0, 6.0).double()})
    whole = SCORES["ria"].fn(weight, stats)
    monkeypatch.setattr("llmprune.score.activation._PIECE", 10)
    assert torch.equal(SCORES["ria"].fn(weight, stats), whole)


def test_ria_ranks_differently_from_wanda() -> None:
    """The only weight of its column is all that reads this input, however small it is."""
    weight = torch.tensor([[4.0, 4.0, 0.1], [4.0, 4.0, 0.0], [4.0, 4.0, 0.0]])
    stats = Stats(num_tokens=1, values={"col_sq": torch.ones(3, dtype=torch.float64)})
    wanda, ria = (SCORES[name].fn(weight, stats) for name in ("wanda", "ria"))
    assert wanda[0, 2] < wanda[0, 0]
    assert ria[0, 2] > ria[0, 0]


def noise(seed: int, linear: str, *shape: int) -> torch.Tensor:
    stats = Stats(num_tokens=0, values={"seed": seed_of(seed, linear)})
    return SCORES["random"].fn(torch.zeros(shape), stats)


def test_noise_follows_from_seed_and_name_alone() -> None:
    first = noise(0, "model.layers.0.mlp.up_proj", 8, 8)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert torch.equal(noise(0, "model.layers.0.mlp.up_proj", 8, 8), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(noise(1, "model.layers.0.mlp.up_proj", 8, 8), first)
    assert not torch.equal(noise(0, "model.layers.1.mlp.up_proj", 8, 8), first)
    assert bool((first >= 0).all()) and bool((first < 1).all()) and len(first.unique()) == 64
