"""Gram matrices, means and variances: exact enough, in any split, in any dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmprune.stats.gram import GramMatrix
from llmprune.stats.moments import ColumnMeans, ColumnSquares, ColumnVariances

T1_INPUTS = torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, 0], [2, 0, 0, 1], [1, 1, 0, -1], [0, 3, 1, 0]])
T1_GRAM = [[6.0, 1, 2, 2], [1, 11, 4, -1], [2, 4, 6, 2], [2, -1, 2, 3]]
KINDS = [("gram", GramMatrix), ("col_mean", ColumnMeans), ("col_var", ColumnVariances)]
every_kind = pytest.mark.parametrize(("key", "kind"), KINDS)


def collect(kind: Callable[[], Any], *batches: torch.Tensor) -> Any:
    seen = kind()
    for batch in batches:
        seen.update(batch)
    return seen


def gram(*batches: torch.Tensor) -> torch.Tensor:
    return collect(GramMatrix, *batches).result()["gram"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_fixture() -> None:
    stats = collect(GramMatrix, T1_INPUTS).result()
    assert stats["gram"].tolist() == T1_GRAM
    assert stats["gram"].dtype == torch.float32
    assert stats.num_tokens == 5


def test_panels_make_up_the_whole_and_mirror_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmprune.stats.gram._PANEL", 3)
    x = normal(50, 8)
    found = gram(x.float())
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, (x.T @ x).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-12, atol=1e-12)


@every_kind
def test_the_split_into_batches_does_not_matter(key: str, kind: Any) -> None:
    x = normal(64, 7) + 3
    one, eight = (collect(kind, *x.split(size)).result() for size in (1, 8))
    torch.testing.assert_close(one[key], eight[key], rtol=1e-11, atol=1e-11)
    assert one.num_tokens == eight.num_tokens == 64


@every_kind
def test_leading_shape_does_not_matter(key: str, kind: Any) -> None:
    x = normal(2, 3, 5)
    whole, flat = (collect(kind, each).result() for each in (x, x.reshape(6, 5)))
    assert torch.equal(whole[key], flat[key])
    assert whole.num_tokens == 6


@every_kind
def test_merging_equals_seeing_both(key: str, kind: Any) -> None:
    x = normal(20, 6) + 1
    first, second, empty = collect(kind, x[:7]), collect(kind, x[7:]), kind()
    first.merge(second)
    first.merge(empty)
    empty.merge(first)
    expected = collect(kind, x).result()[key]
    for seen in (first, empty):
        torch.testing.assert_close(seen.result()[key], expected, rtol=1e-12, atol=1e-12)
        assert seen.result().num_tokens == 20
    torch.testing.assert_close(second.result()[key], collect(kind, x[7:]).result()[key])


@every_kind
def test_a_result_does_not_change_afterwards(key: str, kind: Any) -> None:
    seen = collect(kind, T1_INPUTS)
    result, other = seen.result()[key], seen.result()[key]
    before = result.clone()
    seen.update(T1_INPUTS + 1)
    seen.merge(collect(kind, T1_INPUTS))
    assert torch.equal(result, before) and torch.equal(other, before)
    assert seen.result().num_tokens == 15


@every_kind
def test_no_tokens_means_no_statistic(key: str, kind: Any) -> None:
    result = collect(kind, torch.zeros(0, 4)).result()
    assert result.num_tokens == 0 and not result.values


@every_kind
def test_other_widths_are_refused(key: str, kind: Any) -> None:
    with pytest.raises(ValueError, match="4 columns was given tokens of 3 columns"):
        collect(kind, torch.zeros(2, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_half_precision_is_widened_before_anything_else(
    key: str, kind: Any, dtype: torch.dtype
) -> None:
    x = (normal(300, 5) * 1000).to(dtype)
    before = x.clone()
    found = collect(kind, x).result()[key]
    expected = collect(kind, x.double()).result()[key]
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-5, atol=1e-4 * expected.abs().max()
    )
    assert torch.equal(x, before)


def test_half_precision_is_cast_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(-8, 9, (100, 5), generator=torch.Generator().manual_seed(0)).half()
    whole = gram(x)
    monkeypatch.setattr("llmprune.stats.gram._CAST_ROWS", 7)
    monkeypatch.setattr("llmprune.stats.gram._CAST_BYTES", 0)
    assert torch.equal(gram(x), whole)  # small integers: no order of summation rounds


def test_inputs_of_two_dtypes_add_up_in_the_wider_one() -> None:
    found = gram(T1_INPUTS, T1_INPUTS.double(), T1_INPUTS.half())
    assert found.dtype == torch.float64
    assert torch.equal(found, 3 * torch.tensor(T1_GRAM).double())


def test_the_diagonal_is_what_wanda_reads_and_the_scale_that_of_a_sum() -> None:
    x = normal(40, 6)
    squares = collect(ColumnSquares, x).result()["col_sq"]
    torch.testing.assert_close(gram(x).diagonal(), squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(gram(x, x, x), 3 * gram(x), rtol=1e-12, atol=1e-12)


def test_variance_is_that_of_all_tokens_and_not_within_sequences() -> None:
    sequences = torch.tensor([[[1.0], [1.0]], [[3.0], [3.0]]])
    seen = collect(ColumnVariances, *sequences)
    assert seen.result()["col_var"].tolist() == [1.0]
    assert collect(ColumnMeans, *sequences).result()["col_mean"].tolist() == [2.0]


def test_mean_and_variance_keep_their_digits_far_from_zero() -> None:
    x = (normal(500, 3) + 1e4).float()
    mean, var = (collect(kind, *x.split(40)).result() for kind in (ColumnMeans, ColumnVariances))
    torch.testing.assert_close(mean["col_mean"], x.double().mean(0), rtol=1e-12, atol=0)
    expected = x.double().var(0, correction=0)
    torch.testing.assert_close(var["col_var"], expected, rtol=1e-5, atol=0)
