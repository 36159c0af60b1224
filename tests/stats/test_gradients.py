"""Moments of gradients: sums over sequences, the same however sequences are parted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.stats import STATISTICS
from llmprune.stats.gradients import GradientMoment

FIRST = torch.tensor([[0.1, -0.2, 0.0, 0.4], [0.5, 0.1, -0.1, 0.2]])
SECOND = torch.tensor([[-0.1, -0.2, 0.2, 0.4], [-0.3, 0.1, -0.1, -0.2]])
EXPECTED = {
    "grad_sum": torch.tensor([[0.0, -0.4, 0.2, 0.8], [0.2, 0.2, -0.2, 0.0]]),
    "grad_abs": torch.tensor([[0.2, 0.4, 0.2, 0.8], [0.8, 0.2, 0.2, 0.4]]),
    "grad_sq": torch.tensor([[0.02, 0.08, 0.04, 0.32], [0.34, 0.02, 0.02, 0.08]]),
}
NAMES = (*EXPECTED, "region_sq")


def moment(name: str, *gradients: Tensor) -> GradientMoment:
    found = STATISTICS[name].accumulator()
    assert isinstance(found, GradientMoment)
    for gradient in gradients:
        found.update(gradient)
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_moments_of_two_gradients(name: str) -> None:
    found = moment(name, FIRST, SECOND).result()
    torch.testing.assert_close(found[name], EXPECTED[name], rtol=0, atol=1e-7)
    assert (found.num_sequences, found[name].dtype) == (2, torch.float32)


def test_the_region_s_square_is_a_square() -> None:
    found = moment("region_sq", FIRST, SECOND).result()["region_sq"]
    torch.testing.assert_close(found, EXPECTED["grad_sq"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_is_no_statistic(name: str) -> None:
    found = moment(name).result()
    assert (found.values, found.num_sequences) == ({}, 0)


def test_half_precision_is_widened_before_it_is_squared() -> None:
    large, small = torch.full((1, 1), 1000.0), torch.full((1, 1), 2.0**-14)
    found = moment("grad_sq", large.half(), small.half()).result()["grad_sq"]
    assert float(found) == 1e6
    assert float(moment("grad_sq", small.half()).result()["grad_sq"]) == 2.0**-28


def test_a_result_stays_as_it_was_given_away() -> None:
    seen = moment("grad_sum", FIRST)
    before = seen.result()["grad_sum"]
    seen.update(SECOND)
    assert torch.equal(before, FIRST)
    later = moment("grad_sum")
    later.begin_with(seen.result())
    later.update(SECOND)
    torch.testing.assert_close(seen.result()["grad_sum"], FIRST + SECOND)


@given(seed=st.integers(0, 10**6), parts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_the_bits_do_not_depend_on_how_sequences_are_parted(seed: int, parts: list[int]) -> None:
    gradients = torch.randn(sum(parts), 3, 5, generator=torch.Generator().manual_seed(seed))
    for name in NAMES:
        whole, before = moment(name, *gradients).result(), None
        for part in gradients.split(parts):
            seen = moment(name)
            if before is not None:
                seen.begin_with(before)
            for gradient in part:
                seen.update(gradient)
            before = seen.result()
        assert before is not None
        assert torch.equal(before[name], whole[name])
        assert before.num_sequences == whole.num_sequences == sum(parts)


def test_merged_sums_are_those_of_all_sequences() -> None:
    seen, empty = moment("grad_abs", FIRST), moment("grad_abs")
    seen.merge(moment("grad_abs", SECOND))
    seen.merge(empty)
    empty.merge(seen)
    for each in (seen, empty):
        torch.testing.assert_close(each.result()["grad_abs"], EXPECTED["grad_abs"])
        assert each.result().num_sequences == 2


def test_pieces_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    whole = moment("grad_sq", gradient).result()["grad_sq"]
    monkeypatch.setattr("llmprune.stats.gradients._PIECE", 8)
    assert torch.equal(moment("grad_sq", gradient).result()["grad_sq"], whole)
    strided = moment("grad_sq", gradient.T).result()["grad_sq"]
    assert torch.equal(strided, whole.T)
    assert strided.is_contiguous()


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[4, 2\]"):
        moment("grad_sum", FIRST, FIRST.T)
