"""Column sums of squares: exact enough, in any split, in any dtype."""

from __future__ import annotations

import pytest
import torch

from llmprune.stats import STATISTICS
from llmprune.stats.moments import ColumnSquares
from llmprune.stats.types import Stats

T1_INPUTS = torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, 0], [2, 0, 0, 1], [1, 1, 0, -1], [0, 3, 1, 0]])


def collect(*batches: torch.Tensor) -> Stats:
    seen = ColumnSquares()
    for batch in batches:
        seen.update(batch)
    return seen.result()


def test_sums_are_the_diagonal_of_the_gram_matrix() -> None:
    stats = collect(T1_INPUTS)
    assert stats["col_sq"].tolist() == [6.0, 11.0, 6.0, 3.0]
    assert stats["col_sq"].dtype == torch.float64
    assert stats.num_tokens == 5


def test_leading_shape_does_not_matter() -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(collect(x)["col_sq"], collect(x.reshape(6, 5))["col_sq"])
    assert collect(x).num_tokens == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((300, 3), 1000.0, dtype=dtype)
    assert collect(x)["col_sq"].tolist() == [300e6] * 3


def test_batches_of_one_agree_with_one_batch() -> None:
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (x * x).sum(0)
    torch.testing.assert_close(collect(*x.split(1))["col_sq"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(collect(x)["col_sq"], expected, rtol=1e-12, atol=0)


def test_wide_inputs_are_taken_in_chunks_and_left_alone() -> None:
    x = torch.randn(40, 2**18, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    stats = collect(x)
    torch.testing.assert_close(stats["col_sq"], x.double().square().sum(0), rtol=1e-5, atol=0)
    assert torch.equal(x, before)
    assert stats.num_tokens == 40


def test_merging_equals_seeing_both() -> None:
    first, second, empty = ColumnSquares(), ColumnSquares(), ColumnSquares()
    first.update(T1_INPUTS[:2])
    second.update(T1_INPUTS[2:])
    first.merge(second)
    first.merge(empty)
    empty.merge(first)
    for seen in (first, empty):
        assert torch.equal(seen.result()["col_sq"], collect(T1_INPUTS)["col_sq"])
        assert seen.result().num_tokens == 5


def test_a_result_does_not_change_afterwards() -> None:
    seen = ColumnSquares()
    seen.update(T1_INPUTS)
    result = seen.result()
    seen.update(T1_INPUTS)
    assert result["col_sq"].tolist() == [6.0, 11.0, 6.0, 3.0]


def test_no_tokens_means_no_statistic() -> None:
    stats = collect(torch.zeros(0, 4))
    assert stats.num_tokens == 0
    with pytest.raises(KeyError, match="over 0 tokens"):
        stats["col_sq"]


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="4 columns was given tokens of 3 columns"):
        collect(torch.zeros(2, 4), torch.zeros(2, 3))


def test_a_missing_statistic_says_what_is_there_and_what_to_do() -> None:
    with pytest.raises(KeyError, match=r"'gram'.*present: col_sq.*declare it in `needs`"):
        collect(T1_INPUTS)["gram"]


@pytest.mark.parametrize("name", [name for name in STATISTICS if STATISTICS[name].observe == "tap"])
def test_every_row_of_a_tap_collects_the_statistic_of_its_name(name: str) -> None:
    accumulator = STATISTICS[name].accumulator()
    accumulator.update(T1_INPUTS)
    assert accumulator.result()[name].shape == (4,) * STATISTICS[name].shape.count("I")
