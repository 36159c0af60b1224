"""Patterns: what their names mean, what they choose, and what they refuse."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.mask.pattern import (
    NofM,
    Tiles,
    Units,
    Unstructured,
    choose_keep,
    fill_tiles,
    parse_pattern,
    pool,
    pool_tiles,
    tiles_kept,
)
from tests.reference.selection import keep_of_tiles

T2_WANDA = torch.tensor([[3.0, 10.0, 4.0, 2.0], [0.2, 1.0, 8.0, 4.0]])
T2_MAGNITUDE = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.2, 0.1, 4.0, 1.0]])


def test_names_and_their_sparsity() -> None:
    assert parse_pattern("unstructured") == Unstructured()
    assert parse_pattern("ffn-channels") == Units(kinds=("ffn-channels",))
    assert parse_pattern("2:4") == NofM(n=2, m=4)
    assert parse_pattern("5:8").sparsity == Fraction(3, 8)
    assert parse_pattern("16x32") == Tiles(height=16, width=32)
    assert parse_pattern("32x1").sparsity is None
    assert parse_pattern("unstructured").sparsity is None
    assert parse_pattern("ffn-channels").sparsity is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [("4:2", "2:4"), ("0:4", "2:4"), ("4:4", "2:4"), ("8:5", "5:8"), ("0:0", "2:4")],
)
def test_a_ratio_that_prunes_nothing_or_all_is_refused(text: str, meant: str) -> None:
    with pytest.raises(RecipeError, match="N:M keeps N of every M consecutive weights") as caught:
        parse_pattern(text)
    assert str(caught.value).startswith(f"pattern: '{text}'")
    assert str(caught.value).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("text", "meant"),
    [("unstructurd", "unstructured"), ("ffn_channels", "ffn-channels"), ("2-4", "2:4")],
)
def test_an_unknown_pattern_gets_its_near_match(text: str, meant: str) -> None:
    with pytest.raises(UnknownName, match=f"^pattern: .*Did you mean '{meant}'"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["1x1", "0x16", "16x0"])
def test_a_tile_of_less_than_two_weights_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"^pattern: '{text}'.*such as 16x16"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["", ":", "2:", "-2:4", "2:4:8", "2.0:4", "16x", "x16", "4x4x4"])
def test_what_is_nearly_a_ratio_is_unknown(text: str) -> None:
    with pytest.raises(UnknownName, match="unstructured"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("pattern", "group"),
    [(Unstructured(), "row"), (Unstructured(), "matrix"), (NofM(n=2, m=4), "row")],
)
def test_wanda_on_the_fixture(pattern: Unstructured | NofM, group: str) -> None:
    keep = choose_keep(pattern, T2_WANDA, 4, group)  # type: ignore[arg-type]
    assert keep.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_magnitude_on_the_fixture() -> None:
    keep = choose_keep(Unstructured(), T2_MAGNITUDE, 4, "row")
    assert keep.int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]


@given(
    data=st.data(),
    num_rows=st.integers(1, 7),
    num_columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("group", ["row", "matrix", "mass"])
def test_counts_are_exact_and_masks_nested(
    group: str, data: st.DataObject, num_rows: int, num_columns: int, seed: int
) -> None:
    score = torch.randint(4, (num_rows, num_columns), generator=torch.Generator().manual_seed(seed))
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, score.numel())] * 2)))
    gentle, harsh = (
        choose_keep(Unstructured(), score, count, group)  # type: ignore[arg-type]
        for count in (low, high)
    )
    assert int((~gentle).sum()) == low
    assert int((~harsh).sum()) == high
    assert not bool((harsh & ~gentle).any())
    if group == "row":
        per_row = (~harsh).sum(1)
        assert int(per_row.max() - per_row.min()) <= 1


def test_fewer_of_m_keeps_a_subset() -> None:
    score = torch.randint(5, (16, 32), generator=torch.Generator().manual_seed(0)).float()
    masks = [choose_keep(NofM(n, 8), score, 64 * (8 - n), "row") for n in range(1, 8)]
    assert not any(bool((few & ~more).any()) for few, more in pairwise(masks))


def test_a_count_that_contradicts_the_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="2:4 cannot prune 3 of 8 weights"):
        choose_keep(NofM(n=2, m=4), T2_WANDA, 3, "row")


def test_pooled_scores_of_channels_on_the_published_vector() -> None:
    weight, norm = torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([1.0, 10.0])
    assert pool(weight, "l2").tolist() == [5.0, 1.0]
    assert pool(weight * norm, "mean").tolist() == [3.5, 5.0]


WEIGHT = torch.arange(16.0).view(4, 4) - 7.5
GRADIENT = torch.tensor([[1.0, -1, 0, 2], [0, 1, 1, 0], [2, 0, -1, 1], [1, 1, 0, -1]])


def test_tiles_on_the_published_vector() -> None:
    score, tile = (WEIGHT * GRADIENT).abs(), Tiles(height=2, width=2)
    assert pool_tiles(score, tile, "mean").tolist() == [[4.125, 2.625], [2.75, 3.375]]
    keep = choose_keep(tile, score, 2, "matrix")
    assert tiles_kept(keep, tile).tolist() == [[True, False], [False, True]]
    assert torch.equal(keep, fill_tiles(tiles_kept(keep, tile), tile))


def test_the_norm_of_a_tile_is_not_its_mean() -> None:
    """One large weight decides a norm; four of middling size decide a mean."""
    score, tile = torch.tensor([[3.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), Tiles(2, 2)
    assert pool_tiles(score, tile, "mean").tolist() == [[0.75, 1.0]]
    assert pool_tiles(score, tile, "l2").tolist() == [[1.5, 1.0]]
    assert int(choose_keep(tile, score, 1, "matrix", "mean")[0].int().argmin()) == 0
    assert int(choose_keep(tile, score, 1, "matrix", "l2")[0].int().argmin()) == 2


@given(data=st.data(), seed=st.integers(0, 10**6))
def test_whole_tiles_go_as_a_slow_search_finds(data: st.DataObject, seed: int) -> None:
    height, width = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 3), (3, 2)]))
    shape = height * data.draw(st.integers(1, 4)), width * data.draw(st.integers(1, 4))
    score = torch.randint(9, shape, generator=torch.Generator().manual_seed(seed)).float()
    tile = Tiles(height=height, width=width)
    num_tiles = score.numel() // tile.size
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, num_tiles)] * 2)))
    gentle, harsh = (choose_keep(tile, score, count, "matrix") for count in (low, high))
    assert int((~gentle).sum()) == low * tile.size
    assert not bool((harsh & ~gentle).any())
    assert torch.equal(harsh, keep_of_tiles(score, height, width, high))


@pytest.mark.parametrize("group", ["row", "mass"])
def test_tiles_of_a_row_lose_equally(group: str) -> None:
    score = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    score[:2] *= 100
    keep = choose_keep(Tiles(height=2, width=3), score, 8, group)  # type: ignore[arg-type]
    assert tiles_kept(keep, Tiles(height=2, width=3)).sum(1).tolist() == [2, 2, 2, 2]


def test_what_was_removed_counts_nothing_in_a_tile_and_goes_first_as_a_whole_tile() -> None:
    gone = -torch.inf
    score = torch.tensor([[gone, 8.0, gone, gone, 0.0, 1.0]])
    tile = Tiles(height=1, width=2)
    assert pool_tiles(score, tile, "mean").tolist() == [[4.0, gone, 0.5]]
    assert choose_keep(tile, score, 1, "row").int().tolist() == [[1, 1, 0, 0, 1, 1]]


def test_tiles_that_do_not_fill_the_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="2x3 tiles do not fill 4 x 4 weights"):
        choose_keep(Tiles(height=2, width=3), WEIGHT, 1, "matrix")


def test_n_of_m_has_groups_of_its_own() -> None:
    row, mass = (choose_keep(NofM(2, 4), T2_WANDA, 4, group) for group in ("row", "mass"))  # type: ignore[arg-type]
    assert torch.equal(row, mass)
