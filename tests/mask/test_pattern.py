"""Patterns: what their names mean, what they choose, and what they refuse."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.mask.pattern import Channels, NofM, Unstructured, choose_keep, parse_pattern, pool

T2_WANDA = torch.tensor([[3.0, 10.0, 4.0, 2.0], [0.2, 1.0, 8.0, 4.0]])
T2_MAGNITUDE = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.2, 0.1, 4.0, 1.0]])


def test_names_and_their_sparsity() -> None:
    assert parse_pattern("unstructured") == Unstructured()
    assert parse_pattern("ffn-channels") == Channels(coupling="ffn")
    assert parse_pattern("2:4") == NofM(n=2, m=4)
    assert parse_pattern("5:8").sparsity == Fraction(3, 8)
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


@pytest.mark.parametrize("text", ["", ":", "2:", "-2:4", "2:4:8", "2.0:4"])
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
@pytest.mark.parametrize("group", ["row", "matrix"])
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
