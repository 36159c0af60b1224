"""One ranking of all units: exact counts from histograms, floors, ties, and a second look."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.allocation.evidence import layer_adaptive
from llmprune.allocation.threshold import (
    REMOVED,
    Histogram,
    count_lowest,
    histogram,
    lowest,
    spare,
)
from tests.reference import formulas
from tests.reference.selection import counts_of_lowest

FALLING = [5.0, 4.0, 3.0, 2.0]
SMALL = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


class Scores:
    """Scores by site, looked at through histograms; remembers how closely."""

    def __init__(self, scores: dict[str, list[float]], dtype: torch.dtype = torch.float32) -> None:
        self.scores = {site: torch.tensor(values, dtype=dtype) for site, values in scores.items()}
        self.looks: list[int | None] = []

    def look(self, within: int | None) -> Iterator[tuple[str, Histogram]]:
        self.looks.append(within)
        for site, score in self.scores.items():
            yield site, histogram(score.float(), within=within)


def counts(scores: dict[str, list[float]], num: int, floor: int = 0) -> dict[str, int]:
    return count_lowest(Scores(scores).look, num, dict.fromkeys(scores, floor))


def test_global_magnitude_without_a_floor_empties_the_small_linear() -> None:
    assert counts({"A": FALLING, "B": SMALL}, 8) == {"A": 0, "B": 8}


def test_a_floor_keeps_the_largest_of_each() -> None:
    """The published vector: with two of each safe, A keeps 5 and 4, and B 0.7 and 0.8."""
    assert counts({"A": FALLING, "B": SMALL}, 8, floor=2) == {"A": 2, "B": 6}


def test_lamp_on_the_published_vector() -> None:
    """Keep 3 of A = [3, 1] and B = [10, 10, 1]: the 3 and both 10s."""
    relative = {
        "A": layer_adaptive(torch.tensor([3.0, 1.0])).tolist(),
        "B": layer_adaptive(torch.tensor([10.0, 10.0, 1.0])).tolist(),
    }
    assert relative["A"] == pytest.approx([0.1, 1.0])
    assert relative["B"] == pytest.approx([0.004975, 0.5, 0.5], abs=1e-6)
    assert counts(relative, 2) == {"A": 1, "B": 1}
    assert counts({"A": [3.0, 1.0], "B": [10.0, 10.0, 1.0]}, 3) == {"A": 2, "B": 1}


def test_lamp_differs_from_global_magnitude() -> None:
    """A linear of small weights loses everything globally, and its share under LAMP."""
    scores = {"A": FALLING, "B": [value / 10 for value in FALLING]}
    relative = {site: layer_adaptive(torch.tensor(v)).tolist() for site, v in scores.items()}
    assert counts(scores, 4) == {"A": 0, "B": 4}
    assert counts(relative, 4) == {"A": 2, "B": 2}


SCORE = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0000001, 1.0000002, 2.0, 1e-30, float("inf")]),
    st.floats(0, 3, width=32),
)
SITES = st.lists(st.lists(SCORE, min_size=1, max_size=8), min_size=1, max_size=4)


@given(values=SITES, floor=st.integers(0, 3), data=st.data())
def test_counts_are_those_of_one_long_list(
    values: list[list[float]], floor: int, data: st.DataObject
) -> None:
    scores = {
        f"s{index}": torch.tensor(each).tolist() for index, each in enumerate(values)
    }  # as float32 holds them
    safe = {site: min(floor, len(each)) for site, each in scores.items()}
    most = sum(len(each) for each in values) - sum(safe.values())
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, most)] * 2)))
    few, many = counts(scores, low, floor), counts(scores, high, floor)
    assert few == counts_of_lowest(scores, low, safe)
    assert many == counts_of_lowest(scores, high, safe)
    assert sum(few.values()) == low
    assert all(few[site] <= many[site] for site in scores)


@given(values=SITES, data=st.data())
def test_bfloat16_is_looked_at_once(values: list[list[float]], data: st.DataObject) -> None:
    scores = Scores({f"s{index}": each for index, each in enumerate(values)}, dtype=torch.bfloat16)
    num = data.draw(st.integers(0, sum(map(len, values))))
    found = count_lowest(scores.look, num, dict.fromkeys(scores.scores, 0))
    assert scores.looks == [None]
    plain = {site: score.float().tolist() for site, score in scores.scores.items()}
    assert found == counts_of_lowest(plain, num, dict.fromkeys(plain, 0))


def test_a_second_look_sees_the_threshold_alone() -> None:
    near = {"A": [1.0, 1.0 + 2**-20, 3.0], "B": [1.0 + 2**-21, 1.0 + 2**-19, 0.1]}
    scores = Scores(near)
    assert count_lowest(scores.look, 3, {"A": 0, "B": 0}) == {"A": 1, "B": 2}
    assert len(scores.looks) == 2
    (edge,) = set(scores.looks) - {None}
    assert [each.total for _, each in scores.look(edge)] == [2, 2]
    whole = Scores(near)
    assert count_lowest(whole.look, 5, {"A": 0, "B": 0}) == {"A": 2, "B": 3}
    assert whole.looks == [None]


def test_of_equal_scores_the_first_sites_go_first() -> None:
    tied = {"A": [1.0, 1.0], "B": [1.0, 1.0], "C": [0.5, 1.0]}
    assert [counts(tied, num) for num in (1, 2, 4)] == [
        {"A": 0, "B": 0, "C": 1},
        {"A": 1, "B": 0, "C": 1},
        {"A": 2, "B": 1, "C": 1},
    ]


def test_what_was_removed_ranks_below_all_and_is_never_spared() -> None:
    def look(within: int | None) -> Iterator[tuple[str, Histogram]]:
        yield "A", histogram(torch.tensor([0.0, 0.5]), num_removed=2, within=within)
        yield "B", histogram(torch.tensor([0.1, 0.2]), within=within)

    floor = {"A": 3, "B": 1}
    found = [count_lowest(look, num, floor) for num in range(4)]
    assert [each["A"] for each in found] == [0, 1, 2, 2]
    assert [each["B"] for each in found] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="4 of 3 scores"):
        count_lowest(look, 4, floor)


def test_a_histogram_holds_only_bins_in_use_and_takes_any_shape() -> None:
    score = torch.tensor([[1.0, -0.0], [1.0, 0.0]])
    found = histogram(score, num_removed=3)
    assert found.bins_B.tolist() == [REMOVED, 0, 0x3F80] and found.counts_B.tolist() == [3, 2, 2]
    assert found.settled and found.total == 7 and found.at(0x3F80) == 2 and found.at(5) == 0
    assert not histogram(score + 0.1).settled
    assert torch.equal(score, torch.tensor([[1.0, -0.0], [1.0, 0.0]]))
    assert histogram(score.T).counts_B.tolist() == [2, 2]


def test_pieces_do_not_change_a_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(100, generator=torch.Generator().manual_seed(0))
    whole = histogram(score)
    monkeypatch.setattr("llmprune.allocation.threshold.PIECE", 7)
    assert histogram(score).counts_B.tolist() == whole.counts_B.tolist()


@pytest.mark.parametrize("value", [float("nan"), -1.0, -float("inf")])
def test_scores_that_cannot_be_ranked_by_their_bits_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or are negative"):
        histogram(torch.tensor([1.0, value]))


def test_spared_are_the_highest() -> None:
    found = spare(histogram(torch.tensor([1.0, 2.0, 2.0, 4.0])), 2)
    assert found.counts_B.tolist() == [1, 1, 0]
    assert lowest({"A": found}, 2).counts == {"A": 2}


def lamp(values: Tensor) -> Tensor:
    return layer_adaptive(values.abs())


@given(
    weights=st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-4, 4, width=32)),
        min_size=1,
        max_size=12,
    ),
    piece=st.integers(1, 5),
)
def test_lamp_as_its_formula_reads(weights: list[float], piece: int) -> None:
    expected = sorted(formulas.layer_adaptive(torch.tensor(weights).tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.allocation.evidence.PIECE", piece)
        found = lamp(torch.tensor(weights))
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    assert all(a <= b for a, b in pairwise(found.tolist()))


def test_the_largest_of_a_linear_scores_one() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert float(lamp(values)[-1]) == 1.0
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]
