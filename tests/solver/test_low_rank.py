"""Low-rank forms: the best for the inputs that were seen, and what they cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.solver.errors import row_errors
from llmprune.solver.low_rank import dropped_error, low_rank_dense, low_rank_factors, rank_for
from tests.reference.low_rank import whitened_truncation

WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.5]])
GRAM = torch.tensor([[4.0, 0.0], [0.0, 1.0]])


def random_case(rows: int, columns: int, seed: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, columns + 1)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x.T @ x


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    return float(row_errors(weight - other, gram).sum())


def test_the_inputs_decide_which_direction_stays() -> None:
    """The plain SVD keeps 1.5, at an error of 4; whitened the 1 that sees four times the energy."""
    dense = low_rank_dense(WEIGHT, GRAM, 1)
    assert dense.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert output_error(WEIGHT, dense, GRAM) == pytest.approx(2.25)
    assert output_error(WEIGHT, torch.tensor([[0.0, 0.0], [0.0, 1.5]]), GRAM) == pytest.approx(4.0)
    assert dropped_error(WEIGHT, GRAM, 1) == pytest.approx(2.25 / 6.25)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_factors_are_the_paper_s(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight, gram = random_case(rows, columns, seed)
    left, right, lost = whitened_truncation(weight.numpy(), gram.numpy(), rank)
    found = low_rank_factors(weight, gram, rank)
    assert found.left_OR.shape == (rows, rank) and found.right_RI.shape == (rank, columns)
    scale = float(weight.abs().max())
    expected = torch.from_numpy(left @ right)
    torch.testing.assert_close(found.left_OR @ found.right_RI, expected, rtol=0, atol=1e-6 * scale)
    norms = torch.from_numpy(left).norm(dim=0)  # the singular values are shared alike
    torch.testing.assert_close(found.left_OR.norm(dim=0), norms, rtol=1e-5, atol=0)
    whole = output_error(weight, torch.zeros_like(weight), gram)
    missed = output_error(weight, found.left_OR @ found.right_RI, gram)
    assert missed == pytest.approx(lost, rel=1e-6, abs=1e-9 * whole)
    assert dropped_error(weight, gram, rank) == pytest.approx(lost / whole, rel=1e-6, abs=1e-9)


def test_no_other_matrix_of_the_rank_is_better() -> None:
    weight, gram = random_case(6, 8, 1)
    best = output_error(weight, low_rank_dense(weight, gram, 3), gram)
    generator = torch.Generator().manual_seed(2)
    left, right = low_rank_factors(weight, gram, 3)
    for _ in range(50):
        noise = torch.randn(left.shape, generator=generator).double()
        assert output_error(weight, (left + 0.01 * noise) @ right, gram) >= best
    u, s, vh = torch.linalg.svd(weight)
    assert best < output_error(weight, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], gram)


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (4, 6)])
def test_a_full_rank_is_the_weight_itself(rows: int, columns: int) -> None:
    weight, gram = random_case(rows, columns, 3)
    torch.testing.assert_close(low_rank_dense(weight, gram, 4), weight, rtol=0, atol=1e-9)


def test_fewer_tokens_than_inputs_need_no_damping() -> None:
    weight, gram = random_case(5, 12, 4, tokens=3)
    dense = low_rank_dense(weight, gram, 3)  # three directions carry all that was seen
    whole = output_error(weight, torch.zeros_like(weight), gram)
    assert output_error(weight, dense, gram) <= 1e-12 * whole
    left, right = low_rank_factors(weight, gram, 5)
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
    assert float(left.abs().max()) < 1e3 and float(right.abs().max()) < 1e3


def test_large_damping_is_the_plain_svd() -> None:
    weight, gram = random_case(5, 7, 5)
    u, s, vh = torch.linalg.svd(weight)
    plain = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    found = low_rank_dense(weight, gram, 2, damping=1e8)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    assert not torch.allclose(low_rank_dense(weight, gram, 2), plain, atol=1e-2)


def test_dtype_and_arguments_stay() -> None:
    weight, gram = random_case(6, 6, 6)
    half, before = weight.bfloat16(), gram.clone()
    left, right = low_rank_factors(half, gram, 2, damping=0.1)
    assert left.dtype == right.dtype == low_rank_dense(half, gram, 2).dtype == torch.bfloat16
    assert torch.equal(gram, before) and torch.equal(half, weight.bfloat16())
    again = low_rank_factors(half, gram, 2, damping=0.1)
    assert torch.equal(left, again.left_OR) and torch.equal(right, again.right_RI)


def test_factors_of_a_share_are_smaller_by_it() -> None:
    for shape, sparsity in (((4096, 1024), 0.2), ((11, 7), 0.5), ((64, 64), 0.0)):
        rank = rank_for(shape, sparsity)
        allowed = (1 - sparsity) * shape[0] * shape[1]
        assert rank * sum(shape) <= allowed < (rank + 1) * sum(shape)
    assert rank_for((2, 2), 0.9) == 1


def test_wrong_ranks_and_broken_statistics_are_refused() -> None:
    for rank in (0, 3):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            low_rank_factors(WEIGHT, GRAM, rank)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        low_rank_factors(WEIGHT, torch.full((2, 2), float("nan")), 1)
