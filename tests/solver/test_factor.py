"""Factors of damped Gram matrices: right, or said to be missing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import NumericalError
from llmprune.solver.factor import Factor, factorise
from llmprune.solver.types import Settings
from tests.reference.second_order import curvatures, damped

T1_GRAM = torch.tensor([[6.0, 1, 2, 2], [1, 11, 4, -1], [2, 4, 6, 2], [2, -1, 2, 3]])


def random_gram(size: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 2 * size, size, generator=generator, dtype=torch.float64)
    return x.T @ x


def upper(found: Factor) -> torch.Tensor:
    assert found.upper_II is not None and not found.degraded
    return found.upper_II.double()


def test_the_fixture() -> None:
    found = factorise(T1_GRAM, Settings())
    expected = torch.tensor([0.471118, 0.401895, 0.458352, 0.571195]).double()
    torch.testing.assert_close(upper(found).diagonal(), expected, rtol=0, atol=1e-6)
    assert found.added_I.tolist() == pytest.approx([0.065] * 4)
    assert found.damping == 0.01
    assert not found.dead_I.any()


@given(size=st.integers(1, 9), seed=st.integers(0, 1000))
def test_squares_of_the_diagonal_are_the_inverses_of_what_is_left(size: int, seed: int) -> None:
    gram = random_gram(size, seed)
    found = upper(factorise(gram, Settings()))
    expected = curvatures(damped(gram, 0.01))
    torch.testing.assert_close(found.diagonal().square(), expected, rtol=1e-8, atol=0)
    assert torch.equal(found, found.triu())


@pytest.mark.parametrize("size", [4, 128, 129, 300])
def test_it_is_the_cholesky_factor_of_the_inverse(size: int) -> None:
    gram = random_gram(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 0.01)), upper=True)
    torch.testing.assert_close(upper(factorise(gram, Settings())), expected, rtol=1e-7, atol=1e-9)
    found = upper(factorise(gram.float(), Settings()))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def test_the_matrix_stays_as_it_is_and_its_scale_goes_through() -> None:
    gram = random_gram(20)
    before = gram.clone()
    one, scaled = (factorise(each, Settings()) for each in (gram, 16 * gram))
    assert torch.equal(gram, before)
    torch.testing.assert_close(upper(one), 4 * upper(scaled), rtol=1e-12, atol=0)


def test_damping_by_entry_is_that_of_the_matrix_scaled_to_ones() -> None:
    gram = random_gram(6) * torch.tensor([1e4, 1, 1, 1, 1, 1]).double()[:, None]
    gram = gram * torch.tensor([1e4, 1, 1, 1, 1, 1]).double()
    root = gram.diagonal().sqrt()
    found = upper(factorise(gram, Settings(damp="diag", damping=0.1)))
    unit = upper(factorise(gram / root / root[:, None], Settings(damping=0.1)))
    torch.testing.assert_close(found * root, unit, rtol=1e-8, atol=1e-10)
    assert not torch.allclose(found, upper(factorise(gram, Settings(damping=0.1))))


def test_dead_inputs_do_not_touch_the_others() -> None:
    gram, alive = random_gram(6), [0, 1, 3, 5]
    gram[[2, 4]] = 0
    gram[:, [2, 4]] = 0
    found = factorise(gram, Settings())
    alone = factorise(gram[alive][:, alive], Settings())
    assert found.dead_I.tolist() == [False, False, True, False, True, False]
    torch.testing.assert_close(upper(found)[alive][:, alive], upper(alone), rtol=1e-12, atol=0)
    assert upper(found).diagonal()[[2, 4]].tolist() == [1.0, 1.0]


def test_inputs_that_are_all_dead_have_a_factor() -> None:
    assert torch.equal(upper(factorise(torch.zeros(3, 3), Settings())), torch.eye(3).double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_names_its_columns(value: float) -> None:
    gram = random_gram(5)
    gram[3, 1] = value
    with pytest.raises(NumericalError, match=r"of 5 inputs .* in 1 columns \(1\).*--dtype"):
        factorise(gram, Settings())


def test_a_matrix_too_ill_conditioned_for_float32_is_factored_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    gram = ((vectors * torch.logspace(0, -7.5, 64).double()) @ vectors.T).float()
    gram = (gram + gram.T) / 2
    settings = Settings(damping=1e-6)
    found = factorise(gram, settings)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped(gram, 1e-6)), upper=True)
    assert found.damping == 1e-6
    assert float((upper(found) - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(("below", "needed"), [(0.1, 0.2), (0.15, 1.0)])
def test_damping_grows_tenfold_from_the_matrix_given_until_it_helps(
    below: float, needed: float
) -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -below]))
    found = factorise(gram, Settings(damping=0.002))
    assert found.damping == pytest.approx(needed)
    assert found.added_I.tolist() == pytest.approx([needed * (3 - below) / 4] * 4)
    expected = (gram.diagonal() + found.added_I).rsqrt().double()
    torch.testing.assert_close(upper(found).diagonal(), expected, rtol=1e-5, atol=0)


def test_a_singular_matrix_without_damping_gets_some() -> None:
    found = factorise(torch.ones(3, 3), Settings(damping=0))
    assert 0 < found.damping <= 1e-3
    assert bool(upper(found).isfinite().all())


def test_what_no_damping_mends_is_degraded_and_no_identity() -> None:
    found = factorise(torch.tensor([[1.0, 9.0], [9.0, 1.0]]), Settings())
    assert found.degraded and found.upper_II is None
    assert found.damping == pytest.approx(1.0)
