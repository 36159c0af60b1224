"""Masks and weights found together: the global optimum of the fixture, never worse than a sweep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.base.errors import NumericalError
from llmprune.mask.counts import spread
from llmprune.mask.pattern import NofM, Unstructured, choose_keep
from llmprune.mask.rank import keep_highest_flat, keep_n_of_m
from llmprune.solver import SOLVERS
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.types import Stats
from tests.reference.masks import best_support, solved_error

T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
T1_GRAM = torch.tensor(
    [[6.0, 1.0, 2.0, 2.0], [1.0, 11.0, 4.0, -1.0], [2.0, 4.0, 6.0, 2.0], [2.0, -1.0, 2.0, 3.0]]
)


def adaptive(pattern: Unstructured | NofM, shape: torch.Size, num_pruned: int) -> Choose:
    """Return the choice by W^2 / curvature^2: of the columns asked, their part of the count."""
    ends = [0, *spread(num_pruned, shape[1]).cumsum(0).tolist()]

    def fn(weight: torch.Tensor, cols: slice, curvature: torch.Tensor | None) -> torch.Tensor:
        assert curvature is not None
        score = (weight / curvature).square()
        if isinstance(pattern, NofM):
            return keep_n_of_m(score, pattern.n, pattern.m)
        stop = cols.start + weight.shape[1]
        return keep_highest_flat(score.reshape(-1), ends[stop] - ends[cols.start]).view(score.shape)

    return Choose(fn=fn, adaptive=True, columns=4)


def given_mask(keep_OI: torch.Tensor) -> Choose:
    return Choose(fn=lambda weight, cols, curvature: keep_OI[:, cols])


def solve(
    name: str, weight_OI: torch.Tensor, gram_II: torch.Tensor, choose: Choose, damping: float = 0.01
) -> Solved:
    stats = Stats(num_tokens=5, values={"gram": gram_II})
    (solved,) = (
        SOLVERS[name]
        .fn({"q": weight_OI}, stats, {"q": choose}, Settings(damping=damping, iterations=30))
        .values()
    )
    assert not bool(solved.weight_OI[~solved.keep_OI].any())
    return solved


def error(weight_OI: torch.Tensor, solved: Solved, gram_II: torch.Tensor) -> float:
    delta_OI = weight_OI.double() - solved.weight_OI.double()
    return float(((delta_OI @ gram_II.double()) * delta_OI).sum())


def example(seed: int, rows: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    mix_II = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x_TI = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix_II
    return weight_OI, x_TI.T @ x_TI


def test_the_fixture_gets_the_best_of_all_supports_of_four() -> None:
    solved = solve("alps", T1_WEIGHT, T1_GRAM, adaptive(Unstructured(), T1_WEIGHT.shape, 4), 1e-6)
    best_OI, least = best_support(T1_WEIGHT, T1_GRAM, 4)
    assert solved.keep_OI.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert torch.equal(solved.keep_OI, best_OI)
    assert least == pytest.approx(14.847744, abs=1e-6)
    assert error(T1_WEIGHT, solved, T1_GRAM) == pytest.approx(14.847744, abs=1e-4)
    assert solved.facts["kept"] == "alps"


def test_a_sweep_that_is_better_stays() -> None:
    choose = adaptive(NofM(2, 4), T1_WEIGHT.shape, 4)
    solved = solve("alps", T1_WEIGHT, T1_GRAM, choose)
    swept = solve("columnwise", T1_WEIGHT, T1_GRAM, choose)
    assert solved.facts == {**swept.facts, "kept": "columnwise"}
    assert torch.equal(solved.weight_OI, swept.weight_OI)
    assert error(T1_WEIGHT, solved, T1_GRAM) == pytest.approx(19.571710, abs=1e-4)


def test_a_given_mask_gets_the_damped_least_squares() -> None:
    keep = torch.tensor([[True, False, False, True], [False, True, True, False]])
    weight = T1_WEIGHT.clone()
    solved = solve("alps", weight, T1_GRAM, given_mask(keep))
    expected = torch.tensor([[3.944822, 0, 0, -1.332674], [0, 4.824542, -1.389641, 0]])
    assert torch.allclose(solved.weight_OI, expected, atol=1e-4)
    assert torch.equal(solved.keep_OI, keep)
    assert torch.equal(weight, T1_WEIGHT)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), semi=st.booleans(), share=st.sampled_from([0.5, 0.7]))
def test_it_is_never_worse_than_a_sweep_with_as_many_weights(
    seed: int, semi: bool, share: float
) -> None:
    weight_OI, gram_II = example(seed, 6, 16)
    pattern = NofM(2, 4) if semi else Unstructured()
    choose = adaptive(pattern, weight_OI.shape, 48 if semi else round(96 * share))
    solved, swept = (solve(name, weight_OI, gram_II, choose) for name in ("alps", "columnwise"))
    assert int(solved.keep_OI.sum()) == int(swept.keep_OI.sum())
    assert error(weight_OI, solved, gram_II) <= error(weight_OI, swept, gram_II)
    if semi:
        assert bool((solved.keep_OI.view(6, -1, 4).sum(2) == 2).all())


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
def test_its_masks_are_better_than_those_of_a_sweep_whatever_the_update(
    pattern: Unstructured | NofM,
) -> None:
    weight_OI, gram_II = example(1, 24, 32)
    choose = adaptive(pattern, weight_OI.shape, 24 * 16)
    left = []
    for name in ("alps", "columnwise"):
        masks = solve(name, weight_OI, gram_II, choose).keep_OI.tolist()
        left.append(sum(map(solved_error, weight_OI, masks, [gram_II] * 24)))
    assert left[0] < 0.9 * left[1]


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    weight_OI, gram_II = example(2, 8, 16)
    choose = adaptive(Unstructured(), weight_OI.shape, 64)
    once, again = (solve("alps", weight_OI, gram_II * scale, choose) for scale in (1.0, 7.3))
    assert torch.equal(once.keep_OI, again.keep_OI)
    assert torch.allclose(once.weight_OI, again.weight_OI, rtol=1e-6, atol=1e-9)


def test_float32_finds_what_float64_finds() -> None:
    weight_OI, gram_II = example(3, 16, 32)
    choose = adaptive(Unstructured(), weight_OI.shape, 256)
    wide = solve("alps", weight_OI, gram_II, choose)
    narrow = solve("alps", weight_OI.float(), gram_II.float(), choose)
    assert (wide.weight_OI.dtype, narrow.weight_OI.dtype) == (torch.float64, torch.float32)
    assert error(weight_OI, narrow, gram_II) == pytest.approx(
        error(weight_OI, wide, gram_II), rel=0.01
    )


def test_linears_of_a_tap_do_not_notice_each_other() -> None:
    weight_OI, gram_II = example(4, 10, 16)
    stats = Stats(num_tokens=64, values={"gram": gram_II})
    weights = {"q": weight_OI[:6], "k": weight_OI[6:]}
    chooses = {
        name: adaptive(Unstructured(), part.shape, part.numel() // 2)
        for name, part in weights.items()
    }
    together = SOLVERS["alps"].fn(weights, stats, chooses, Settings())
    assert list(together) == ["q", "k"]
    for name, weight in weights.items():
        alone = SOLVERS["alps"].fn({name: weight}, stats, {name: chooses[name]}, Settings())
        assert torch.equal(together[name].keep_OI, alone[name].keep_OI)
        assert torch.allclose(together[name].weight_OI, alone[name].weight_OI)


def test_nothing_pruned_changes_nothing_and_all_pruned_leaves_nothing() -> None:
    weight_OI, gram_II = example(5, 4, 8)
    for num_pruned in (0, 32):
        choose = adaptive(Unstructured(), weight_OI.shape, num_pruned)
        solved = solve("alps", weight_OI, gram_II, choose)
        assert int(solved.keep_OI.sum()) == 32 - num_pruned
        assert torch.allclose(solved.weight_OI, weight_OI if num_pruned == 0 else weight_OI * 0)


@pytest.mark.parametrize("fixed", [False, True])
def test_inputs_that_never_came_go_first_and_keep_their_weights_where_they_stay(
    fixed: bool,
) -> None:
    weight_OI, gram_II = example(6, 6, 16)
    gram_II[3] = gram_II[:, 3] = 0
    if fixed:
        keep_OI = choose_keep(Unstructured(), weight_OI.abs(), 48, "row")
        keep_OI[:, 3] = True
        solved = solve("alps", weight_OI, gram_II, given_mask(keep_OI))
        assert torch.equal(solved.weight_OI[:, 3], weight_OI[:, 3])
    else:
        choose = adaptive(Unstructured(), weight_OI.shape, 48)
        solved = solve("alps", weight_OI, gram_II, choose)
        assert solved.facts["kept"] == "alps"
        assert not bool(solved.keep_OI[:, 3].any())
    assert bool(solved.weight_OI.isfinite().all())


def test_a_gram_matrix_that_is_none_leaves_the_sweep_or_is_refused() -> None:
    choose = given_mask(torch.tensor([[True, False, False, True], [False, True, True, False]]))
    solved = solve("alps", T1_WEIGHT, -T1_GRAM, choose)
    assert solved.facts["kept"] == "columnwise"
    assert solved.facts["degraded"] is True
    with pytest.raises(NumericalError, match="NaN or infinity"):
        solve("alps", T1_WEIGHT, T1_GRAM.where(T1_GRAM != 11, torch.nan), choose)
