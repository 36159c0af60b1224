"""Importance from the gradients of adapters: the worked example, autograd, groups of heads."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.arch.types import Coupling, Span
from llmprune.recovery.adapter_gradients import (
    adapter_importance,
    averaged,
    estimated_gradient,
    importance_by_unit,
    units_kept,
)
from llmprune.recovery.schedules import counts_by_step

A, B = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0], [2.0]])
GRAD_A, GRAD_B = torch.tensor([[0.3, 0.4]]), torch.tensor([[0.1], [0.2]])
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
ROWS = Coupling(name="rows", spans=(Span(linear="up", axis="out"),), num_units=2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(num_groups: int, per_group: int, head_dim: int) -> Coupling:
    """Return the key/value heads of a block with their queries."""
    wide = per_group * head_dim
    spans = (
        Span(linear="q", axis="out", width=wide),
        Span(linear="k", axis="out", width=head_dim),
        Span(linear="v", axis="out", width=head_dim),
        Span(linear="o", axis="in", width=wide),
    )
    return Coupling(name="heads", spans=spans, num_units=num_groups)


def test_the_worked_example_of_two_rows() -> None:
    grad = estimated_gradient(A, B, GRAD_A, GRAD_B)
    torch.testing.assert_close(grad, torch.tensor([[0.32, 0.46], [0.64, 0.92]]))
    importance = adapter_importance(WEIGHT, A, B, GRAD_A, GRAD_B, 2.0)
    torch.testing.assert_close(importance.sum(dim=1), torch.tensor([1.56, 6.80]))
    found = importance_by_unit(ROWS, {"up": importance})
    torch.testing.assert_close(found, torch.tensor([0.2236, 0.9747]), atol=5e-5, rtol=0)


@given(st.integers(0, 99), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_gradient_is_what_a_step_on_both_factors_takes_from_their_product(
    seed: int, step: float
) -> None:
    a, grad_a = normal(seed, 2, 5), normal(seed + 200, 2, 5)
    b, grad_b = normal(seed + 100, 3, 2), normal(seed + 300, 3, 2)
    moved = b @ a - (b - step * grad_b) @ (a - step * grad_a)
    torch.testing.assert_close(estimated_gradient(a, b, grad_a, grad_b, step) * step, moved)


def test_without_its_last_term_it_is_the_gradient_projected_on_the_factors() -> None:
    # Of a loss of W + c B A with gradient G: dA = c B^T G and dB = c G A^T.
    weight, a, b, x = normal(0, 4, 6), normal(1, 3, 6), normal(2, 4, 3), normal(3, 7, 6)
    a.requires_grad_(), b.requires_grad_(), weight.requires_grad_()
    loss = ((weight + 2 * b @ a) @ x.T).square().sum()
    grad, grad_a, grad_b = torch.autograd.grad(loss, (weight, a, b))
    found = estimated_gradient(a, b, grad_a, grad_b, step=0.0)
    expected = 2 * (grad @ a.T @ a + b @ b.T @ grad)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


def test_importance_is_element_by_element_and_changes_nothing() -> None:
    weight, a, b = normal(0, 4, 6), normal(1, 3, 6), normal(2, 4, 3)
    grad_a, grad_b = normal(3, 3, 6), normal(4, 4, 3)
    given_ = [each.clone() for each in (weight, a, b, grad_a, grad_b)]
    keep = normal(5, 4, 6) > 0
    found = adapter_importance(weight, a, b, grad_a, grad_b, 0.5, keep)
    for o in range(4):
        for i in range(6):
            grad = sum(
                float(grad_b[o, r] * a[r, i] + b[o, r] * grad_a[r, i] - grad_b[o, r] * grad_a[r, i])
                for r in range(3)
            )
            whole = float(weight[o, i]) + 0.5 * float(b[o] @ a[:, i])
            expected = abs(grad * whole) if keep[o, i] else 0.0
            assert float(found[o, i]) == pytest.approx(expected, abs=1e-12)
    for now, before in zip((weight, a, b, grad_a, grad_b), given_, strict=True):
        assert torch.equal(now, before)


def test_low_precision_is_computed_in_float32() -> None:
    weight, a, b, grad_a, grad_b = (
        each.to(torch.bfloat16) for each in (WEIGHT, A, B, GRAD_A, GRAD_B)
    )
    found = adapter_importance(weight, a, b, grad_a, grad_b, 2.0)
    assert found.dtype == torch.float32
    weight, a, b, grad_a, grad_b = (each.float() for each in (weight, a, b, grad_a, grad_b))
    assert torch.equal(found, adapter_importance(weight, a, b, grad_a, grad_b, 2.0))


def test_rows_of_queries_belong_to_their_group() -> None:
    # Two groups of three query heads of two values: q has 12 rows, k and v have 4.
    coupling = heads(2, 3, 2)
    importances = {
        "q": normal(0, 12, 5).abs(),
        "k": normal(1, 4, 5).abs(),
        "v": normal(2, 4, 5).abs(),
        "o": normal(3, 5, 12).abs(),
    }
    totals = {
        "q": [importances["q"][:6].sum(), importances["q"][6:].sum()],
        "k": [importances["k"][:2].sum(), importances["k"][2:].sum()],
        "v": [importances["v"][:2].sum(), importances["v"][2:].sum()],
        "o": [importances["o"][:, :6].sum(), importances["o"][:, 6:].sum()],
    }
    expected = [0.0, 0.0]
    for first, second in totals.values():
        norm = math.hypot(float(first), float(second))
        expected = [expected[0] + float(first) / norm, expected[1] + float(second) / norm]
    assert importance_by_unit(coupling, importances).tolist() == pytest.approx(expected)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50))
def test_linears_have_an_equal_say_whatever_their_scale(
    num_groups: int, per_group: int, head_dim: int, seed: int
) -> None:
    coupling, wide = heads(num_groups, per_group, head_dim), per_group * head_dim * num_groups
    importances = {
        "q": normal(seed, wide, 3).abs(),
        "k": normal(seed + 1, num_groups * head_dim, 3).abs(),
        "v": normal(seed + 2, num_groups * head_dim, 3).abs(),
        "o": normal(seed + 3, 3, wide).abs(),
    }
    found = importance_by_unit(coupling, importances)
    assert found.shape == (num_groups,)
    assert bool((found >= 0).all() and (found <= 4 + 1e-9).all())
    scaled = {name: value * 10.0**place for place, (name, value) in enumerate(importances.items())}
    torch.testing.assert_close(importance_by_unit(coupling, scaled), found)
    turned = {
        name: value.roll(value.shape[axis] // num_groups, axis)
        for (name, value), axis in zip(importances.items(), (0, 0, 0, 1), strict=True)
    }
    torch.testing.assert_close(importance_by_unit(coupling, turned), found.roll(1))


def test_spans_of_one_fused_linear_are_linears_of_their_own() -> None:
    fused = (
        Span(linear="wide", axis="out"),
        Span(linear="wide", axis="out", offset=2),
        Span(linear="down", axis="in"),
    )
    apart = tuple(Span(linear=each, axis="out") for each in ("gate", "up")) + fused[2:]
    gate, up, down = normal(0, 2, 3).abs(), normal(1, 2, 3).abs(), normal(2, 3, 2).abs()
    found = importance_by_unit(
        Coupling(name="x", spans=fused, num_units=2),
        {"wide": torch.cat([gate, up]), "down": down},
    )
    expected = importance_by_unit(
        Coupling(name="x", spans=apart, num_units=2), {"gate": gate, "up": up, "down": down}
    )
    assert torch.equal(found, expected)


def test_a_linear_without_importance_has_no_say() -> None:
    # The factors B of a new adapter are zeros, and so may be all gradients of one linear.
    spans = (*ROWS.spans, Span(linear="gate", axis="out"))
    coupling = Coupling(name="x", spans=spans, num_units=2)
    importances = {"up": torch.tensor([[3.0], [4.0]]), "gate": torch.zeros(2, 1)}
    torch.testing.assert_close(importance_by_unit(coupling, importances), torch.tensor([0.6, 0.8]))


def test_the_mean_moves_by_a_tenth_and_skips_what_is_not_finite() -> None:
    mean = torch.zeros(2)
    for score in ([1.0, 0.0], [math.nan, 5.0], [math.inf, 5.0], [0.0, 1.0]):
        mean = averaged(mean, torch.tensor(score))
    torch.testing.assert_close(mean, torch.tensor([0.09, 0.1]))
    expected = 0.5 * mean + torch.tensor([1.0, 1.0])
    torch.testing.assert_close(averaged(mean, torch.tensor([2.0, 2.0]), 0.5), expected)


def test_the_lowest_go_and_of_equal_ones_the_first() -> None:
    found = units_kept(torch.tensor([2.0, 1.0, 1.0, 3.0]), 1)
    assert found.tolist() == [True, False, True, True]
    found = units_kept(torch.tensor([1.0, 2.0, 8.0, 9.0]), 2, num_groups=2)
    assert found.tolist() == [False, True, False, True]


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5))
def test_masks_are_nested_whatever_scores_do(seed: int, num_groups: int, size: int) -> None:
    before = torch.ones(num_groups * size, dtype=torch.bool)
    for each in range(size + 1):
        scores = normal(seed + each, num_groups * size).abs()
        keep = units_kept(scores, each * num_groups, num_groups=num_groups, before_U=before)
        assert not bool((keep & ~before).any())
        assert (~keep).reshape(num_groups, size).sum(dim=1).tolist() == [each] * num_groups
        before = keep


def test_a_run_ends_with_exactly_what_was_asked() -> None:
    counts = counts_by_step("cubic", 100, 10, num=11, final=0.5, window=(0.1, 0.9))
    mean, keep = torch.zeros(11), torch.ones(11, dtype=torch.bool)
    for step in range(100):
        mean = averaged(mean, normal(step, 11).abs().float())
        if step in counts:
            keep = units_kept(mean, counts[step], before_U=keep)
    assert int(keep.sum()) == 11 - 6  # 5.5, rounded up; the authors' rule stops short of it


def test_factors_of_another_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"A \(1, 2\) and B \(2, 1\).*shape \(3, 2\).*transposed"):
        adapter_importance(torch.zeros(3, 2), A, B, GRAD_A, GRAD_B, 1.0)


def test_what_cannot_be_compared_is_refused() -> None:
    whole = Coupling(name="ffn", spans=(Span(linear="up", axis="all"),), num_units=1)
    with pytest.raises(ValueError, match=r"units of ffn own up whole.*heads or channels"):
        importance_by_unit(whole, {"up": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="part of up, which is not among down"):
        importance_by_unit(ROWS, {"down": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="2 units of width 1 reach to 2"):
        importance_by_unit(ROWS, {"up": torch.ones(1, 2)})


def test_counts_that_fall_or_cannot_be_shared_are_refused() -> None:
    scores = torch.arange(4.0)
    with pytest.raises(ValueError, match="2 equal groups cannot lose 1 of 4 units"):
        units_kept(scores, 1, num_groups=2)
    with pytest.raises(ValueError, match="cannot lose 5 of 4"):
        units_kept(scores, 5)
    before = torch.tensor([False, False, True, True])
    with pytest.raises(ValueError, match="a group has lost 2 units and is to lose 1"):
        units_kept(scores, 2, num_groups=2, before_U=before)
    with pytest.raises(ValueError, match="NaN"):
        units_kept(torch.tensor([math.nan, 1.0]), 1)
