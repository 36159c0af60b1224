"""Mean magnitudes of columns, sequence by sequence: the published vector, and any split."""

from __future__ import annotations

import pytest
import torch

from llmprune.stats.moments import ColumnMagnitudes, ColumnSquares
from llmprune.stats.types import Stats

SEQUENCES = torch.tensor([[[-3.0, 0.0], [3.0, 0.0]], [[4.0, 2.0], [-4.0, 0.0]]])


def collect(*batches: torch.Tensor) -> Stats:
    seen = ColumnMagnitudes()
    for batch in batches:
        seen.update(batch)
    return seen.result()


def test_means_of_sequences_are_squared_and_added() -> None:
    stats = collect(SEQUENCES)
    assert stats["col_abs"].tolist() == [25.0, 1.0]
    assert stats["col_abs"].dtype == torch.float64
    assert stats.num_tokens == 4


def test_it_depends_on_where_sequences_end_and_not_on_batches() -> None:
    assert torch.equal(collect(*SEQUENCES)["col_abs"], collect(SEQUENCES)["col_abs"])
    as_one = collect(SEQUENCES.reshape(1, 4, 2))["col_abs"]
    assert as_one.tolist() == [3.5**2, 0.5**2]
    assert torch.equal(collect(SEQUENCES.reshape(4, 2))["col_abs"], as_one)


def test_signs_do_not_matter_and_peaks_count_less_than_in_the_norm() -> None:
    x = torch.tensor([[[6.0, 3.0], [0.0, -3.0]]])
    assert collect(x)["col_abs"].tolist() == [9.0, 9.0]
    squares = ColumnSquares()
    squares.update(x)
    assert squares.result()["col_sq"].tolist() == [36.0, 18.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.stats.moments._CHUNK_BYTES", 64)
    x = torch.full((2, 300, 3), -1000.0, dtype=dtype)
    stats = collect(x)
    assert stats["col_abs"].tolist() == [2e6] * 3
    assert stats.num_tokens == 600
    assert bool((x == -1000).all())


def test_merging_equals_seeing_both() -> None:
    first, second, empty = ColumnMagnitudes(), ColumnMagnitudes(), ColumnMagnitudes()
    first.update(SEQUENCES[:1])
    second.update(SEQUENCES[1:])
    first.merge(second)
    first.merge(empty)
    empty.merge(first)
    for seen in (first, empty):
        assert torch.equal(seen.result()["col_abs"], collect(SEQUENCES)["col_abs"])
        assert seen.result().num_tokens == 4


def test_a_result_does_not_change_afterwards() -> None:
    seen = ColumnMagnitudes()
    seen.update(SEQUENCES)
    result = seen.result()
    seen.update(SEQUENCES)
    assert result["col_abs"].tolist() == [25.0, 1.0]


def test_no_tokens_means_no_statistic() -> None:
    for nothing in (torch.zeros(0, 4), torch.zeros(2, 0, 4), torch.zeros(0, 3, 4)):
        stats = collect(nothing)
        assert stats.num_tokens == 0 and not stats.values


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="4 columns was given tokens of 3 columns"):
        collect(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
