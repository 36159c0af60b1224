"""Weights that are dropped and weights that grow: worked examples, slow versions, exact counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.base.errors import UnknownName
from llmprune.mask.rank import keep_highest_flat, keep_n_of_m
from llmprune.recovery.regrowth import (
    REGROWTHS,
    changed,
    granet_fraction,
    granet_step,
    hyper_gradient,
    jackpot_scores,
    regrown,
    rigl_fraction,
    rigl_step,
    set_step,
    swapped,
    through,
)

WEIGHT = torch.tensor([[0.5, -0.1, 0.0, 0.0, 0.3, 0.0]])
KEEP = torch.tensor([[True, True, False, False, True, False]])
GRAD = torch.tensor([[0.0, 0.0, 0.9, -0.2, 0.0, 0.4]])
FEW = [-1.0, -0.5, 0.0, 0.5, 1.0]  # full of ties


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slowly_moved(
    weight: list[float], keep: list[bool], grow: list[float], num: int, within: int
) -> list[bool]:
    """Drop the smallest, one at a time, then let weights of the same group grow, one at a time."""
    keep, due = list(keep), [0] * (len(keep) // within)
    for _ in range(num):
        gone = min((i for i in range(len(keep)) if keep[i]), key=lambda i: abs(weight[i]))
        keep[gone] = False
        due[gone // within] += 1
    for group, count in enumerate(due):
        places = range(group * within, (group + 1) * within)
        for _ in range(count):
            keep[max((i for i in places if not keep[i]), key=lambda i: abs(grow[i]))] = True
    return keep


def test_rigl_moves_less_on_half_a_cosine_and_stops_before_the_end() -> None:
    found = [rigl_fraction(p) for p in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
    assert found == pytest.approx([0.3, 0.225, 0.075, 0, 0, 0])
    assert rigl_fraction(0.5, share=0.1, end=1.0) == pytest.approx(0.05)
    assert rigl_fraction(-0.1) == 0.3


def test_granet_moves_half_at_first_and_almost_nothing_at_the_end() -> None:
    found = [granet_fraction(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([0.5, 0.42751, 0.2525, 0.07749, 0.005], abs=5e-6)
    assert granet_fraction(2.0) == pytest.approx(0.005)


def test_the_worked_example_drops_the_smallest_and_grows_the_steepest() -> None:
    after = rigl_step(WEIGHT, KEEP, GRAD, 0.34)
    assert after.tolist() == [[True, False, True, False, True, False]]
    assert changed(KEEP, after).tolist() == [[False, True, True, False, False, False]]
    assert torch.equal(regrown(WEIGHT, KEEP, after), torch.tensor([[0.5, 0, 0, 0, 0.3, 0]]))


def test_what_grows_returns_to_its_value_before_pruning_where_that_is_known() -> None:
    after = rigl_step(WEIGHT, KEEP, GRAD, 0.34)
    dense = torch.tensor([[9.0, 9.0, 0.02, 9.0, 9.0, 9.0]])
    found = regrown(WEIGHT, KEEP, after, dense)
    assert torch.equal(found, torch.tensor([[0.5, 0, 0.02, 0, 0.3, 0]]))
    stale = torch.where(KEEP, WEIGHT, 7.0)  # what a removed weight holds is nothing to go by
    assert torch.equal(regrown(stale, KEEP, after), torch.tensor([[0.5, 0, 0, 0, 0.3, 0]]))
    assert torch.equal(regrown(stale, KEEP, after, dense), found)


def test_rigl_rounds_down_and_granet_up() -> None:
    # 0.4 of 3 kept weights is 1.2: one of them moves, or two.
    assert int(changed(KEEP, rigl_step(WEIGHT, KEEP, GRAD, 0.4)).sum()) == 2
    assert granet_step(WEIGHT, KEEP, GRAD, 0.4).tolist() == [
        [True, False, True, False, False, True]
    ]


def test_counts_do_not_suffer_from_binary_fractions() -> None:
    weight, keep = torch.arange(1.0, 201.0)[None], torch.arange(200)[None] < 100
    grad = (~keep).float()
    for step in (rigl_step, granet_step):  # 0.29 * 100 is 28.999..., 0.07 * 100 is 7.000...01
        for fraction, count in ((0.29, 29), (0.07, 7)):
            moved = changed(keep, step(weight, keep, grad, fraction))
            assert int(moved.sum()) == 2 * count


def test_a_weight_just_dropped_may_return() -> None:
    grad = torch.tensor([[0.0, 2.0, 0.9, 0.0, 0.0, 0.0]])
    after = rigl_step(WEIGHT, KEEP, grad, 0.34)
    assert torch.equal(after, KEEP)
    assert torch.equal(regrown(WEIGHT, KEEP, after), WEIGHT)  # and it keeps its value


def test_a_group_gets_back_what_it_lost() -> None:
    # The smallest kept weight lies in the first three columns; the steepest removed one does not.
    grad = torch.tensor([[0.0, 0.0, 0.1, -0.2, 0.0, 0.4]])
    assert rigl_step(WEIGHT, KEEP, grad, 0.34).tolist()[0] == [
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    found = rigl_step(WEIGHT, KEEP, grad, 0.34, within=3)
    assert found.tolist()[0] == [True, False, True, False, True, False]


@settings(max_examples=60)
@given(
    data=st.data(),
    name=st.sampled_from(["rigl", "granet", "set"]),
    rows=st.integers(1, 3),
    within=st.sampled_from([None, 1, 2, 4, 8]),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.99, 1.0]),
)
def test_masks_agree_with_moves_one_by_one(
    data: st.DataObject, name: str, rows: int, within: int | None, fraction: float
) -> None:
    size = 8 * rows
    weight, grad = (
        data.draw(st.lists(st.sampled_from(FEW), min_size=size, max_size=size)) for _ in range(2)
    )
    keep = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    weight_OI, grad_OI, keep_OI = (torch.tensor(v).view(rows, 8) for v in (weight, grad, keep))
    before = keep_OI.clone()
    found_OI = REGROWTHS[name].fn(weight_OI, keep_OI, grad_OI, fraction, seeded(), within)
    grow = grad
    if name == "set":
        grow = torch.rand((rows, 8), generator=seeded(), dtype=torch.float64).flatten().tolist()
    round_ = math.ceil if name == "granet" else math.floor
    num = round_(round(fraction * sum(keep), 6))
    expected = slowly_moved(weight, keep, grow, num, within or size)
    assert found_OI.flatten().tolist() == expected
    assert torch.equal(keep_OI, before)
    groups = (-1, within or size)
    assert torch.equal(found_OI.view(groups).sum(1), keep_OI.view(groups).sum(1))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 3), name=st.sampled_from([*REGROWTHS]))
def test_n_of_m_stays_n_of_m(seed: int, n: int, name: str) -> None:
    weight, grad = torch.randn(2, 6, 16, generator=seeded(seed))
    keep = keep_n_of_m(weight.abs(), n, 4)
    found = REGROWTHS[name].fn(weight * keep, keep, grad, 0.3, seeded(seed), within=4)
    assert set(found.view(-1, 4).sum(1).tolist()) == {n}


def test_2_of_4_moves_although_a_fraction_of_two_weights_is_none() -> None:
    weight = torch.tensor([[4.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 2.0]])
    keep, grad = weight != 0, torch.tensor([[0.0, 0.0, 1.0, 2.0, 9.0, 0.0, 8.0, 0.0]])
    found = rigl_step(weight, keep, grad, 0.3, within=4)
    assert found.tolist() == [[True, False, False, True, False, True, False, True]]


def test_set_draws_by_seed_and_reaches_every_removed_weight() -> None:
    weight, keep = torch.ones(1, 12), torch.arange(12)[None] < 4
    masks = [set_step(weight, keep, None, 0.5, seeded(seed)) for seed in range(40)]
    assert torch.equal(masks[3], set_step(weight, keep, None, 0.5, seeded(3)))
    assert bool((torch.stack(masks).any(0) | keep).all())
    # Of equal weights the first two are dropped, so the other two are kept by every draw.
    assert bool(torch.stack(masks)[..., 2:4].all())


def test_whoever_lacks_what_a_rule_reads_is_told() -> None:
    with pytest.raises(ValueError, match=r"pass torch\.Generator"):
        set_step(WEIGHT, KEEP, GRAD, 0.3, None)
    for name, row in REGROWTHS.items():
        if row.needs_gradient:
            with pytest.raises(ValueError, match="gradient"):
                row.fn(WEIGHT, KEEP, None, 0.3, seeded())
        else:
            assert row.fn(WEIGHT, KEEP, None, 0.3, seeded()).sum() == 3, name
    with pytest.raises(ValueError, match="from 0 to 1"):
        rigl_step(WEIGHT, KEEP, GRAD, 1.5)
    with pytest.raises(ValueError, match="groups of 4 columns do not fill rows of 6"):
        rigl_step(WEIGHT, KEEP, GRAD, 0.34, within=4)
    with pytest.raises(ValueError, match="NaN"):
        rigl_step(WEIGHT, KEEP, GRAD * torch.nan, 0.34)
    with pytest.raises(UnknownName, match=r"recover\.regrow: 'rigel'.*'rigl'"):
        REGROWTHS["rigel"]


def test_learnt_scores_begin_as_the_mask_and_exchange_the_worst_for_the_best() -> None:
    keep = torch.tensor([[True, True, False, False]])
    assert torch.equal(jackpot_scores(keep), torch.tensor([[1.0, 1.0, 0.99, 0.99]]))
    assert torch.equal(swapped(jackpot_scores(keep), keep, 1.0), keep)
    score = torch.tensor([[0.98, 1.0, 0.995, 0.99]])
    assert swapped(score, keep, 1.0).tolist() == [[False, True, True, False]]
    assert torch.equal(swapped(score, keep, 0.0), keep)


def test_only_the_best_exchanges_are_made_while_they_are_rationed() -> None:
    keep = torch.tensor([[True, True, True, False, False, False]])
    score = torch.tensor([[0.3, 0.1, 0.2, 0.9, 0.5, 0.7]])
    assert swapped(score, keep, 0.3).tolist() == [[True, False, True, True, False, False]]
    assert swapped(score, keep, 0.5).tolist() == [[True, False, False, True, False, True]]
    assert swapped(score, keep, 1.0).tolist() == [[False, False, False, True, True, True]]


def slowly_swapped(score: list[float], keep: list[bool], share: float, within: int) -> list[bool]:
    """Pair within groups, then make the best of all pairs."""
    pairs = []
    for start in range(0, len(keep), within):
        places = range(start, start + within)
        out = sorted((i for i in places if keep[i]), key=lambda i: score[i])
        into = sorted((i for i in places if not keep[i]), key=lambda i: -score[i])
        both = zip(out, into, strict=False)
        pairs += [(a, b) for a, b in both if score[b] > score[a]]
    pairs.sort(key=lambda pair: score[pair[0]] - score[pair[1]])
    found = list(keep)
    for a, b in pairs[: math.ceil(round(share * len(pairs), 6))]:
        found[a], found[b] = False, True
    return found


@settings(max_examples=60)
@given(data=st.data(), within=st.sampled_from([2, 4, 8, 16]), share=st.sampled_from([0.2, 0.5, 1]))
def test_exchanges_agree_with_pairs_in_order(
    data: st.DataObject, within: int, share: float
) -> None:
    score = data.draw(st.lists(st.sampled_from(FEW), min_size=16, max_size=16))
    keep = data.draw(st.lists(st.booleans(), min_size=16, max_size=16))
    score_OI, keep_OI = torch.tensor(score).view(2, 8), torch.tensor(keep).view(2, 8)
    found_OI = swapped(score_OI, keep_OI, share, None if within == 16 else within)
    assert found_OI.flatten().tolist() == slowly_swapped(score, keep, share, within)
    groups = (-1, within)
    assert torch.equal(found_OI.view(groups).sum(1), keep_OI.view(groups).sum(1))


@given(seed=st.integers(0, 10**6), num=st.integers(0, 20))
def test_all_exchanges_keep_the_highest_scores(seed: int, num: int) -> None:
    score = torch.randn(4, 5, generator=seeded(seed))
    keep = keep_highest_flat(torch.randn(20, generator=seeded(seed + 1)), num).view(4, 5)
    expected = keep_highest_flat(score.flatten(), num).view(4, 5)
    assert torch.equal(swapped(score, keep, 1.0), expected)


def test_a_learnt_mask_finds_the_weight_that_pruning_should_have_kept() -> None:
    # Only input 1 matters, and the mask at hand keeps the larger weight of input 0.
    weight, keep = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]])
    score = jackpot_scores(keep).requires_grad_()
    x_TI, y_TO = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0], [1.0]])
    error = (x_TI @ (weight * through(score, keep)).T - y_TO).square().sum()
    (slope,) = torch.autograd.grad(error, score)
    # Residuals are -1 and 1: for input 0 g = 2 * 1, times its weight 4; for input 1 g = 2(-1 + 1).
    assert torch.equal(slope, torch.tensor([[4.0, 0.0]]))
    assert swapped(score - 0.1 * slope, keep, 1.0).tolist() == [[False, True]]


def test_a_mask_seen_through_is_exact_and_hands_its_gradient_on() -> None:
    score = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    found = through(score, torch.tensor([False, True]))
    assert found.tolist() == [0.0, 1.0] and found.dtype == torch.float64
    (found * torch.tensor([5.0, 7.0])).sum().backward()
    assert score.grad is not None and score.grad.tolist() == [5.0, 7.0]


def test_the_hyper_gradient_in_both_forms() -> None:
    weight, keep = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    grad = torch.tensor([0.5, 0.3])
    for form, expected in (("paper", [0.975, -0.3]), ("code", [0.95, -0.3])):
        found = hyper_gradient(weight, keep, grad, 0.1, form)  # type: ignore[arg-type]
        assert found.tolist() == pytest.approx(expected)


def test_the_hyper_gradient_is_the_slope_of_the_loss_at_the_weights_answer() -> None:
    # For a loss c z the weights answer a mask m with -m c / gamma, whatever they were.
    slope, gamma, step = torch.tensor([0.7, -1.3], dtype=torch.float64), 4.0, 1e-5

    def answer(mask: Tensor) -> Tensor:
        return -mask * slope / gamma

    def loss(mask: Tensor) -> float:
        return float((slope * mask * answer(mask)).sum())

    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = hyper_gradient(answer(mask), mask.bool(), slope, 1 / gamma)
    for place in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[place] = step
        expected = (loss(mask + shift) - loss(mask - shift)) / (2 * step)
        assert float(found[place]) == pytest.approx(expected, abs=1e-9)
