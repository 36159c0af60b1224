"""Packed masks come back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.mask.packed import pack, unpack


@given(num_rows=st.integers(1, 9), num_columns=st.integers(1, 19), seed=st.integers(0, 99))
def test_round_trip(num_rows: int, num_columns: int, seed: int) -> None:
    keep = torch.rand(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(keep)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-keep.numel() // 8),)
    assert torch.equal(unpack(packed, keep.shape), keep)
    assert unpack(packed, keep.shape).dtype == torch.bool


def test_bits_are_row_major_with_the_first_weight_highest() -> None:
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[0, 0] = keep[1, 7] = True
    assert pack(keep).tolist() == [128, 1]
    assert pack(keep.T.contiguous().T).tolist() == [128, 1]


def test_bytes_that_do_not_fit_the_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 4\) takes 2 bytes, found \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), (4, 4))
