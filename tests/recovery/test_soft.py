"""Soft masks: worked examples, what gradients they give, and what they are in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import parametrize

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.mask.pattern import NofM, Unstructured
from llmprune.recovery.soft import (
    SOFT_MASKS,
    Goal,
    exponential_decay,
    exponential_fade,
    goal_at,
    harden,
    linear_decay,
    linear_fade,
    pdp,
    pdp_gate,
    pulled,
    soft_shrinkage,
    sr_ste,
    typical_square,
)

WEIGHT = torch.tensor([[0.4, -0.1, 0.3, 0.05]])
GRAD = torch.tensor([[0.01, 0.02, -0.03, 0.04]])
GOAL = goal_at(0.5, (1, 4), NofM(n=2, m=4))
KEEP = torch.tensor([[True, False, True, False]])


def slope(out: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """Return what a gradient of the effective weights becomes for the trained ones."""
    (found,) = torch.autograd.grad(out, weight, grad)
    return found


def random_weight(seed: int, rows: int = 4, inputs: int = 8, **kind: Any) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed), **kind)


@st.composite
def goals(draw: st.DrawFn) -> Goal:
    """Draw a goal for a weight of 4 x 8."""
    if draw(st.booleans()):
        return goal_at(0, (4, 8), NofM(n=draw(st.integers(1, 3)), m=4))
    group: Any = draw(st.sampled_from(["matrix", "row", "mass"]))
    return Goal(pattern=Unstructured(), num_pruned=draw(st.integers(0, 32)), group=group)


def test_sr_ste_computes_with_the_kept_and_pulls_the_pruned() -> None:
    weight = WEIGHT.clone().requires_grad_()
    out = sr_ste(weight, GOAL, 0.3)
    assert torch.equal(out, torch.tensor([[0.4, 0, 0.3, 0]]))
    expected = torch.tensor([[0.01, 0.01998, -0.03, 0.04001]])
    torch.testing.assert_close(slope(out, weight, GRAD), expected, rtol=0, atol=1e-8)


def test_the_pull_may_be_added_once_a_step_instead() -> None:
    weight = WEIGHT.clone().requires_grad_()
    whole = slope(sr_ste(weight, GOAL, 0.3, pull=0.5), weight, GRAD)
    bare = slope(sr_ste(weight, GOAL, 0.3, pull=0), weight, GRAD)
    assert torch.equal(bare, GRAD)
    assert torch.equal(whole, bare + pulled(weight, KEEP, 0.5))


def test_sr_ste_lets_a_pruned_weight_come_back() -> None:
    weight = WEIGHT.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for _ in range(8):
        optimizer.zero_grad()
        sr_ste(weight, GOAL, 0.0).backward(torch.tensor([[0.0, 0.05, 0.0, 0.0]]))
        optimizer.step()
    assert harden(weight, GOAL).tolist() == [[True, True, False, False]]  # -0.1 - 8 * 0.05


def test_the_two_ways_to_fade() -> None:
    # The authors' decay is 2e-4 a step.
    assert exponential_fade(2e-4 * 1000) == pytest.approx(0.81873, abs=5e-6)
    assert exponential_fade(2e-4 * 5000) == pytest.approx(0.36788, abs=5e-6)
    assert linear_fade(2e-4 * 1000) == pytest.approx(0.8)
    assert linear_fade(2e-4 * 5000) == 0
    assert linear_fade(1.5) == 0


@pytest.mark.parametrize(
    ("progress", "left"), [(0.0, 1.0), (0.2, 1.0), (0.35, 0.75), (0.5, 0.5), (0.8, 0.0), (1.0, 0.0)]
)
def test_pruned_weights_fade_between_the_dense_and_the_hard_phase(
    progress: float, left: float
) -> None:
    out = linear_decay(WEIGHT, GOAL, progress, dense=0.2, hard=0.8)
    expected = torch.where(KEEP, WEIGHT, left * WEIGHT)
    torch.testing.assert_close(out, expected)


def test_the_exponential_fade_is_cut_off_when_masks_become_hard() -> None:
    before = exponential_decay(WEIGHT, GOAL, 0.8 - 1e-9, rate=5, hard=0.8)
    torch.testing.assert_close(before, torch.where(KEEP, WEIGHT, math.exp(-5) * WEIGHT))
    assert torch.equal(exponential_decay(WEIGHT, GOAL, 0.8, rate=5, hard=0.8), WEIGHT * KEEP)
    half = exponential_decay(WEIGHT, GOAL, 0.4, rate=5, hard=0.8)
    torch.testing.assert_close(half, torch.where(KEEP, WEIGHT, math.exp(-2.5) * WEIGHT))


def test_gradients_pass_a_fading_mask_straight_and_a_hard_one_not() -> None:
    for fn in (linear_decay, exponential_decay):
        weight = WEIGHT.clone().requires_grad_()
        assert torch.equal(slope(fn(weight, GOAL, 0.4), weight, GRAD), GRAD)
        assert torch.equal(slope(fn(weight, GOAL, 0.9), weight, GRAD), GRAD * KEEP)


def test_the_gate_of_pdp() -> None:
    def gate(size: float, tau: float) -> float:
        square = torch.tensor(size, dtype=torch.float64).square()
        return float(pdp_gate(square, torch.tensor(0.05**2, dtype=torch.float64), tau))

    found = [gate(size, 1e-3) for size in (0.0, 0.03, 0.05, 0.07, 0.1)]
    assert found == pytest.approx([0.07586, 0.16798, 0.5, 0.91683, 0.99945], abs=5e-6)
    assert [gate(0.04, 1e-4), gate(0.06, 1e-4)] == pytest.approx([0.00012, 0.99998], abs=5e-6)


def test_pdp_cuts_halfway_between_the_neighbours_of_the_cut() -> None:
    weight = torch.tensor([[0.03, -0.07, 0.02, 0.1]], dtype=torch.float64)
    goal = Goal(pattern=Unstructured(), num_pruned=2)  # the neighbours are 0.03 and 0.07
    out = pdp(weight, goal, 0.0, tau=1e-3, scale=1.0)
    gate = torch.tensor([[0.16798, 0.91683, 1 / (1 + math.exp(2.1)), 0.99945]]).double()
    torch.testing.assert_close(out, weight * gate, rtol=0, atol=1e-6)


def test_pdp_counts_tau_in_the_median_square() -> None:
    weight = random_weight(1, dtype=torch.float64)
    goal = Goal(pattern=Unstructured(), num_pruned=9)
    median = float(weight.flatten().square().sort().values[15])
    assert typical_square(weight) == pytest.approx(median)
    out = pdp(weight, goal, 0.0, tau=0.2)
    assert torch.equal(out, pdp(weight, goal, 0.0, tau=1.0, scale=0.2 * typical_square(weight)))
    torch.testing.assert_close(pdp(1e-3 * weight, goal, 0.0, tau=0.2), 1e-3 * out)
    assert typical_square(torch.zeros(2, 2)) == 1.0
    assert not bool(pdp(torch.zeros(2, 8), replace(goal, num_pruned=3), 0.0).isnan().any())


@pytest.mark.parametrize("group", ["matrix", "row", "2:4"])
def test_the_gradient_of_pdp_is_that_of_its_formula(group: Any) -> None:
    weight = random_weight(2, dtype=torch.float64)
    goal = goal_at(0.5, (4, 8), NofM(n=2, m=4) if group == "2:4" else None, "matrix")
    goal = goal if group == "2:4" else replace(goal, group=group)
    tau, width = 0.3, {"matrix": 32, "row": 8, "2:4": 4}[group]
    expected_out, expected = torch.zeros(32).double(), torch.zeros(32).double()
    flat = weight.flatten()
    for start in range(0, 32, width):
        size = flat[start : start + width].abs().sort().values
        cut = float(size[width // 2 - 1] + size[width // 2]) / 2
        for place in range(start, start + width):
            w = float(flat[place])
            m = 1 / (1 + math.exp((cut**2 - w**2) / tau))
            expected_out[place] = w * m
            expected[place] = m + 2 * w**2 * m * (1 - m) / tau
    weight.requires_grad_()
    out = pdp(weight, goal, 0.0, tau=tau, scale=1.0)
    torch.testing.assert_close(out.flatten(), expected_out)
    torch.testing.assert_close(slope(out, weight, torch.ones_like(out)).flatten(), expected)


def test_the_gate_of_pdp_has_the_slope_of_differences() -> None:
    square = random_weight(3, dtype=torch.float64).square().requires_grad_()
    cut = torch.tensor(0.6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: pdp_gate(value, cut, 0.3), (square,))


def test_gradients_reach_what_a_weight_was_made_of() -> None:
    base, a_RI = random_weight(4), random_weight(5, 2, 8)
    for row in SOFT_MASKS.values():
        b_OR = random_weight(6, 4, 2).requires_grad_()
        row.fn(base + b_OR @ a_RI, goal_at(0.5, (4, 8)), 0.3).square().sum().backward()
        assert b_OR.grad is not None and bool(b_OR.grad.abs().gt(0).all())


def test_five_picks_of_soft_shrinkage_are_one_of_five_steps() -> None:
    weight, goal = torch.tensor([[1.0, 3.0]]), Goal(pattern=Unstructured(), num_pruned=1)
    shrunk = weight
    for _ in range(5):
        shrunk = soft_shrinkage(shrunk, goal, 0.1, ratio=0.95)
    torch.testing.assert_close(shrunk, torch.tensor([[0.773781, 3.0]]))
    torch.testing.assert_close(soft_shrinkage(weight, goal, 0.1, ratio=0.95, every=5), shrunk)
    assert torch.equal(soft_shrinkage(weight, goal, 0.1, ratio=0.0), torch.tensor([[0.0, 3.0]]))


@pytest.mark.parametrize("name", [*SOFT_MASKS])
@given(seed=st.integers(0, 10**6), goal=goals())
def test_at_the_end_every_soft_mask_is_the_hard_one(name: str, seed: int, goal: Goal) -> None:
    weight, row = random_weight(seed), SOFT_MASKS[name]
    keep = harden(weight, goal)
    for progress in (1.0, row.options["hard"]):
        out = row.fn(weight, goal, progress, **row.options)
        assert torch.equal(out, torch.where(keep, weight, 0))
    before = row.fn(weight, goal, 0.37, **row.options)
    assert bool((before.abs() <= weight.abs()).all())


@given(seed=st.integers(0, 10**6), goal=goals())
def test_a_hardened_mask_has_the_exact_count_and_the_largest_weights(seed: int, goal: Goal) -> None:
    weight = random_weight(seed)
    keep = harden(weight, goal)
    assert int((~keep).sum()) == goal.num_pruned
    if isinstance(goal.pattern, NofM):
        assert bool((keep.view(-1, 4).sum(1) == goal.pattern.n).all())
    kept, pruned = goal.grouped(weight.abs()), goal.grouped(weight.abs())
    floor = kept.masked_fill(~goal.grouped(keep), math.inf).amin(1)
    assert bool((pruned.masked_fill(goal.grouped(keep), -1).amax(1) <= floor).all())


@given(seed=st.integers(0, 10**6), goal=goals())
def test_a_sharp_gate_is_the_hard_mask(seed: int, goal: Goal) -> None:
    weight = random_weight(seed, dtype=torch.float64)
    out = pdp(weight, goal, 0.0, tau=1e-30)
    assert torch.equal(out, torch.where(harden(weight, goal), weight, 0))


def test_a_sparsity_becomes_an_exact_count() -> None:
    assert goal_at(0.29, (10, 10)).num_pruned == 29
    assert goal_at(0.9, (2, 8), NofM(n=1, m=4)).num_pruned == 12
    assert Fraction(goal_at(0.5, (3, 3)).num_pruned) == 5
    with pytest.raises(RecipeError, match="between 0 and 1"):
        goal_at(1.5, (2, 2))
    with pytest.raises(ValueError, match="NaN"):
        harden(WEIGHT * torch.nan, GOAL)


def test_what_was_removed_before_stays_removed_and_gets_no_gradient() -> None:
    before = torch.tensor([[True, True, False, True, False, True, True, True]])
    weight = torch.tensor([[1.0, 0.0, 9.0, 2.0, 9.0, 3.0, 4.0, 5.0]])
    goal = Goal(pattern=Unstructured(), num_pruned=3, before_OI=before)
    keep = torch.tensor([[True, False, False, True, False, True, True, True]])
    assert torch.equal(harden(weight, goal), keep)
    for row in SOFT_MASKS.values():
        for progress in (0.3, 1.0):
            trained = weight.clone().requires_grad_()
            out = row.fn(trained, goal, progress)
            assert not bool(out[~before].any())
            grad = slope(out, trained, torch.ones_like(out))
            assert not bool(grad[~before].any()) and bool(grad[keep].all())
    assert torch.equal(harden(weight, replace(goal, num_pruned=1)), before)  # a goal already passed
    gone = torch.tensor([[False, False, False, True, True, True, True, True]])
    kept = harden(weight, replace(goal, pattern=NofM(n=2, m=4), num_pruned=4, before_OI=gone))
    assert kept.view(2, 4).sum(1).tolist() == [1, 2]
    small = replace(goal, pattern=NofM(n=3, m=4), num_pruned=2)
    assert torch.equal(harden(weight, small), before)


def test_a_given_mask_fades_as_it_is_and_has_no_cut_for_pdp() -> None:
    weight, keep = torch.tensor([[4.0, 1.0]]), torch.tensor([[False, True]])
    assert linear_decay(weight, keep, 0.4, hard=0.8).tolist() == [[2.0, 1.0]]
    assert sr_ste(weight, keep, 0.4).tolist() == [[0.0, 1.0]]
    assert soft_shrinkage(weight, keep, 0.4, ratio=0.5).tolist() == [[2.0, 1.0]]
    with pytest.raises(ValueError, match="pass goal_at"):
        pdp(weight, keep, 0.4)


def test_low_precision_stays_finite_and_of_its_dtype() -> None:
    weight = (random_weight(8) * 0.02).bfloat16()
    for row in SOFT_MASKS.values():
        for goal in (goal_at(0.5, (4, 8)), goal_at(0.3, (4, 8), group="mass")):
            out = row.fn(weight, goal, 0.5)
            assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


class _Soft(torch.nn.Module):
    """Puts a soft mask in the way of a parameter."""

    def __init__(self, name: str, goal: Goal) -> None:
        super().__init__()
        self.row, self.goal, self.progress = SOFT_MASKS[name], goal, 0.0

    def forward(self, weight: Tensor) -> Tensor:
        return self.row.fn(weight, self.goal, self.progress)


@pytest.mark.parametrize("name", [name for name, row in SOFT_MASKS.items() if row.at == "forward"])
def test_training_through_a_soft_mask_ends_with_an_exact_mask_and_a_lower_loss(name: str) -> None:
    x_TI = random_weight(9, 64, 8)
    soft = _Soft(name, goal_at(0.5, (4, 8), NofM(n=2, m=4)))
    teacher = random_weight(10)
    teacher *= harden(teacher, soft.goal)
    linear = torch.nn.Linear(8, 4, bias=False)
    linear.weight.data.copy_(teacher + 0.5 * random_weight(11))
    y_TO = x_TI @ teacher.T

    start = linear.weight.detach().clone()
    one_shot = float((x_TI @ (start * harden(start, soft.goal)).T - y_TO).square().mean())
    parametrize.register_parametrization(linear, "weight", soft)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    for step in range(50):
        soft.progress = step / 50
        optimizer.zero_grad()
        (linear(x_TI) - y_TO).square().mean().backward()
        optimizer.step()
    soft.progress = 1.0
    parametrize.remove_parametrizations(linear, "weight")  # leaves the effective weights
    assert bool(((linear.weight != 0).view(-1, 4).sum(1) == 2).all())
    after = float((linear(x_TI) - y_TO).detach().square().mean())
    assert after < one_shot / 2


def test_names_of_soft_masks_teach() -> None:
    with pytest.raises(UnknownName, match=r"recover\.soft: 'sr_ste'.*'sr-ste'"):
        SOFT_MASKS["sr_ste"]
