"""Selection by mass: the published shares, exact counts, nested masks, rows of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.mask import mass
from llmprune.mask.mass import counts_of_equal_mass, keep_equal_mass
from llmprune.mask.pattern import Unstructured, choose_keep
from tests.reference.selection import counts_of_mass

T2_WANDA = torch.tensor([[3.0, 10.0, 4.0, 2.0], [0.2, 1.0, 8.0, 4.0]])


@pytest.mark.parametrize(("num_pruned", "counts"), [(2, [0, 2]), (4, [2, 2]), (5, [2, 3])])
def test_wanda_alpha_on_the_fixture(num_pruned: int, counts: list[int]) -> None:
    """Sparsities 0.25, 0.5 and 0.625, which the published search meets at alpha 0.1, 0.3, 0.4."""
    assert counts_of_equal_mass(T2_WANDA, num_pruned).tolist() == counts
    assert (~keep_equal_mass(T2_WANDA, num_pruned)).sum(1).tolist() == counts


def test_it_differs_from_equal_counts() -> None:
    keep = choose_keep(Unstructured(), T2_WANDA, 2, "mass")
    assert keep.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert not torch.equal(keep, choose_keep(Unstructured(), T2_WANDA, 2, "row"))


@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 7), seed=st.integers(0, 999))
def test_rows_lose_what_a_slow_search_finds(
    data: st.DataObject, rows: int, columns: int, seed: int
) -> None:
    score = torch.randint(9, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, score.numel())] * 2)))
    gentle, harsh = counts_of_equal_mass(score, low), counts_of_equal_mass(score, high)
    assert gentle.tolist() == counts_of_mass(score, low)
    assert harsh.tolist() == counts_of_mass(score, high)
    assert bool((gentle <= harsh).all())
    keep = keep_equal_mass(score, low)
    assert int((~keep).sum()) == low
    assert not bool((keep_equal_mass(score, high) & ~keep).any())


def test_every_row_loses_about_the_same_share_of_its_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(64, 512, generator=generator) ** torch.arange(1, 65)[:, None]
    keep = keep_equal_mass(score, score.numel() // 2)
    lost = (score * ~keep).sum(1) / score.sum(1)
    assert float(lost.max() - lost.min()) < 0.02
    assert int((~keep).sum(1).max()) > 2 * int((~keep).sum(1).min())


def test_a_share_does_not_depend_on_the_scale_of_a_row() -> None:
    score = torch.rand(6, 40, generator=torch.Generator().manual_seed(1))
    scaled = score * torch.tensor([1.0, 2.0**-100, 2.0**90, 1.0, 4.0, 0.5])[:, None]
    assert torch.equal(keep_equal_mass(scaled, 100), keep_equal_mass(score, 100))


def test_pieces_do_not_change_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(30, 16, generator=torch.Generator().manual_seed(1))
    whole = keep_equal_mass(score, 200)
    monkeypatch.setattr(mass, "PIECE", 64)
    assert torch.equal(keep_equal_mass(score, 200), whole)


def test_what_was_removed_goes_first_then_what_carries_nothing() -> None:
    score = torch.tensor([[0.0, 1.0, 2.0], [-math.inf, 3.0, -math.inf], [0.0, 0.0, 0.0]])
    assert counts_of_equal_mass(score, 2).tolist() == [0, 2, 0]
    assert counts_of_equal_mass(score, 6).tolist() == [1, 2, 3]
    assert int((~keep_equal_mass(score, 9)).sum()) == 9


def test_an_infinite_score_stays_longest() -> None:
    score = torch.tensor([[math.inf, 1.0, 1.0], [1.0, 1.0, 5.0]])
    assert counts_of_equal_mass(score, 5).tolist() == [2, 3]


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_scores_that_are_no_mass_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not NaN and not below 0"):
        keep_equal_mass(torch.tensor([[1.0, value]]), 1)
