"""Ranking: exact counts, ties by place, and agreement with a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.mask import rank_cpu, rank_torch
from llmprune.mask.rank import keep_highest, keep_highest_flat, keep_n_of_m
from tests.reference.selection import keep_of_groups, keep_of_rows, keep_of_vector

FEW_VALUES = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 1.0, 1e-30, math.inf])


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """Draw a matrix that is full of ties, or of bfloat16 numbers."""
    num_rows, num_columns = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        score = torch.randn(num_rows, num_columns, generator=generator)
        return (score / 100).bfloat16() if draw(st.booleans()) else score.abs()
    row = st.lists(FEW_VALUES, min_size=num_columns, max_size=num_columns)
    return torch.tensor(draw(st.lists(row, min_size=num_rows, max_size=num_rows)))


@given(data=st.data(), score=scores())
def test_columns_one_after_the_other_give_the_mask_of_rows(
    data: st.DataObject, score: Tensor
) -> None:
    """As a solver asks: M columns that lie apart, each of them in one piece."""
    m = score.shape[1]
    n = data.draw(st.integers(0, m))
    lying = score.T.contiguous().T
    found = keep_n_of_m(lying, n, m)
    assert torch.equal(found, keep_of_rows(score, torch.full((len(score),), m - n)))


@given(data=st.data(), score=scores())
def test_rows_agree_with_a_stable_sort(data: st.DataObject, score: Tensor) -> None:
    counts = st.lists(st.integers(0, score.shape[1]), min_size=len(score), max_size=len(score))
    prune = torch.tensor(data.draw(counts))
    expected = keep_of_rows(score, prune)
    assert torch.equal(keep_highest(score, prune), expected)
    assert torch.equal(rank_torch.keep_rows(score, prune), expected)
    assert (~expected).sum(1).tolist() == prune.tolist()


@given(data=st.data(), score=scores())
def test_a_vector_agrees_with_a_stable_sort(data: st.DataObject, score: Tensor) -> None:
    vector = score.flatten()
    count = data.draw(st.integers(0, len(vector)))
    assert torch.equal(keep_highest_flat(vector, count), keep_of_vector(vector, count))


@given(data=st.data(), score=scores())
def test_a_higher_count_prunes_a_superset(data: st.DataObject, score: Tensor) -> None:
    vector = score.flatten()
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, len(vector))] * 2)))
    assert not bool((keep_highest_flat(vector, high) & ~keep_highest_flat(vector, low)).any())


@given(data=st.data(), num_rows=st.integers(1, 4), m=st.integers(1, 20))
def test_every_group_keeps_its_n_highest(data: st.DataObject, num_rows: int, m: int) -> None:
    n, num = data.draw(st.integers(0, m)), m * data.draw(st.integers(1, 3))
    flat = data.draw(st.lists(FEW_VALUES, min_size=num_rows * num, max_size=num_rows * num))
    score = torch.tensor(flat).view(num_rows, num)
    keep = keep_n_of_m(score, n, m)
    assert torch.equal(keep, keep_of_groups(score, n, m))
    assert set(keep.view(-1, m).sum(1).tolist()) == {n}


PIECE = 2**14
LONG = 15 * PIECE + 1001


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vectors of this size long ones."""
    monkeypatch.setattr(rank_cpu, "PIECE", PIECE)


def long_vectors() -> dict[str, Tensor]:
    noise = torch.randn(LONG, generator=torch.Generator().manual_seed(0)).abs()
    rare = torch.where(noise > 3.5, noise, 0.0)
    return {
        "distinct": noise,
        "ascending": noise.sort().values,
        "bfloat16": (noise / 50).bfloat16(),
        "constant": torch.ones(LONG),
        "two values": (noise > 0.6745).float(),
        "mostly zero": rare,
        "half removed before": torch.where(noise < 0.6745, -math.inf, noise),
        "half protected": torch.where(noise < 0.6745, noise, math.inf),
        "outlier columns": (noise * torch.where(torch.arange(LONG) % 64 == 0, 1e4, 1.0)),
    }


@pytest.mark.parametrize("name", long_vectors())
def test_long_vectors_agree_with_a_stable_sort(name: str) -> None:
    vector = long_vectors()[name]
    for count in (0, 1, 17, LONG // 10, LONG // 2, LONG - LONG // 500, LONG - 1, LONG):
        keep = keep_highest_flat(vector, count)
        assert torch.equal(keep, keep_of_vector(vector, count)), count


@pytest.mark.parametrize("bracket", [(5.0, 6.0), (-2.0, -1.0), (0.5, 0.5), (0.9, 0.1)])
def test_a_missed_bracket_only_costs_time(
    bracket: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_cpu, "_bracket", lambda score, rank: bracket)
    vector = long_vectors()["distinct"]
    assert torch.equal(keep_highest_flat(vector, LONG // 2), keep_of_vector(vector, LONG // 2))


def test_the_bracket_of_a_long_vector_is_narrow_and_holds() -> None:
    vector = long_vectors()["outlier columns"]
    low, high = rank_cpu._bracket(vector.numpy(), LONG // 2)
    exact = float(vector.kthvalue(LONG // 2).values)
    assert low < exact < high
    assert int(((vector > low) & (vector < high)).sum()) < LONG // 10


def test_many_threads_give_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = long_vectors()["bfloat16"]
    matrix = vector[: 5 * PIECE].view(-1, 64)
    prune = torch.arange(len(matrix)) % 5 + 30

    def masks() -> list[Tensor]:
        return [
            keep_highest(matrix, prune),
            keep_highest_flat(vector, LONG // 2),
            keep_n_of_m(matrix, 2, 4),
        ]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = masks()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, masks(), strict=True))
    assert torch.equal(alone[0], rank_torch.keep_rows(matrix, prune))


def test_scores_are_left_alone() -> None:
    score = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    before = score.clone()
    keep_highest(score, torch.full((8,), 20))
    keep_highest_flat(score.flatten(), 20)
    keep_n_of_m(score, 2, 4)
    keep_n_of_m(score, 8, 16)
    assert torch.equal(score, before)


def test_strided_scores_are_read_in_their_order() -> None:
    score = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(keep_n_of_m(score[:, :4], 1, 2), keep_of_groups(score[:, :4], 1, 2))
    prune = torch.arange(8) % 6
    assert torch.equal(keep_highest(score, prune), keep_of_rows(score, prune))


def test_empty_scores_give_empty_masks() -> None:
    assert keep_highest(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    assert keep_highest(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)).shape == (2, 0)
    assert keep_highest_flat(torch.zeros(0), 0).shape == (0,)
    assert keep_n_of_m(torch.zeros(0, 8), 2, 4).shape == (0, 8)


@pytest.mark.parametrize("where", [0, 5, 15])
def test_nan_is_refused(where: int) -> None:
    score = torch.zeros(16)
    score[where] = math.nan
    for select in (
        lambda: keep_highest(score.view(2, 8), torch.tensor([1, 1])),
        lambda: keep_highest_flat(score, 3),
        lambda: keep_n_of_m(score.view(2, 8), 2, 4),
        lambda: keep_n_of_m(score.view(1, 16), 8, 16),
    ):
        with pytest.raises(ValueError, match="NaN"):
            select()


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="pruning 5 of 4"):
        keep_highest_flat(torch.zeros(4), 5)
    with pytest.raises(ValueError, match=r"pruning \[5\] of 4"):
        keep_highest(torch.zeros(1, 4), torch.tensor([5]))
    with pytest.raises(ValueError, match="2:4 does not divide 6 columns"):
        keep_n_of_m(torch.zeros(1, 6), 2, 4)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_accelerators_flat_ranking_agrees_with_the_hosts(share: float, ties: bool) -> None:
    score = torch.rand(3 * 2**19, generator=torch.Generator().manual_seed(1))
    score = (score * 50).floor() if ties else score
    count = int(share * len(score))
    assert torch.equal(rank_torch.keep_flat(score, count), keep_highest_flat(score, count))
