"""The columnwise sweep: published numbers, exact counts, and errors spread as they should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.mask.pattern import NofM, Pattern, Tiles, Unstructured, choose_keep
from llmprune.score import SCORES
from llmprune.solver import SOLVERS
from llmprune.solver.columnwise import sweep_columns
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.types import Stats
from tests.reference import second_order

T1_WEIGHT = torch.tensor([[4.0, -1.0, 2.0, -3.0], [1.0, 5.0, -2.0, 0.5]])
T1_GRAM = torch.tensor([[6.0, 1, 2, 2], [1, 11, 4, -1], [2, 4, 6, 2], [2, -1, 2, 3]])
T1_KEEP = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]]).bool()
T1_SWEPT = torch.tensor([[4.0, 0, 0, -1.368679], [0, 5.157202, -2.007656, 0]])
TWO_OF_FOUR = NofM(n=2, m=4)


def stats(gram: torch.Tensor) -> Stats:
    return Stats(num_tokens=5, values={"gram": gram})


def obs(pattern: Pattern, columns: int, share: float = 0.5) -> Choose:
    """Ask the score OBS, as the engine does, and prune a share of the columns asked for."""
    assert isinstance(pattern, Unstructured | NofM | Tiles)

    def fn(weight: torch.Tensor, cols: slice, curvature: torch.Tensor | None) -> torch.Tensor:
        assert curvature is not None and curvature.shape == weight.shape[1:]
        found = Stats(num_tokens=0, values={"curvature": curvature})
        score = SCORES["obs"].fn(weight, found)
        count = round(score.numel() * share)
        if isinstance(pattern, Tiles):
            count //= pattern.size
        return choose_keep(pattern, score, count, "matrix")

    return Choose(fn=fn, adaptive=True, columns=columns)


def given_mask(keep: torch.Tensor) -> Choose:
    return Choose(fn=lambda weight, cols, curvature: keep[:, cols])


def sweep(
    weight: torch.Tensor, gram: torch.Tensor, choose: Choose, settings: Settings | None = None
) -> Solved:
    return sweep_columns({"q": weight}, stats(gram), {"q": choose}, settings or Settings())["q"]


def problem(
    rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and a Gram matrix of inputs that correlate."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (x.T @ x).to(dtype)


@pytest.mark.parametrize("choose", [obs(Unstructured(), 128), obs(TWO_OF_FOUR, 4)])
def test_the_fixture(choose: Choose) -> None:
    solved = sweep(T1_WEIGHT, T1_GRAM, choose)
    assert torch.equal(solved.keep_OI, T1_KEEP)
    torch.testing.assert_close(solved.weight_OI, T1_SWEPT, rtol=0, atol=1e-5)
    change = T1_WEIGHT - solved.weight_OI
    assert second_order.distortion(change, T1_GRAM) == pytest.approx(19.571710, abs=1e-4)
    damped = second_order.damped(T1_GRAM, 0.01)
    assert second_order.distortion(change, damped) == pytest.approx(2 * 10.0762744, abs=1e-4)
    assert solved.facts == {"damping": 0.01}


def test_a_tie_does_not_prune_more() -> None:
    """Both weights of column 2 score 19.040; pruning up to a threshold would take five of eight."""
    assert int((~sweep(T1_WEIGHT, T1_GRAM, obs(Unstructured(), 4)).keep_OI).sum()) == 4


def test_the_mask_differs_from_that_of_weights_and_norms() -> None:
    """Inputs 0 and 1 are nearly the same: what goes with the first, the second makes up for."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    weight, gram = torch.tensor([[3.0, 3.0, 1.0, 1.0]]), x.T @ x
    wanda = choose_keep(TWO_OF_FOUR, weight * gram.diagonal().sqrt(), 2, "row")
    assert wanda.tolist() == [[True, True, False, False]]
    solved = sweep(weight, gram, obs(TWO_OF_FOUR, 4))
    assert solved.keep_OI[0, :2].tolist() == [False, True]
    assert solved.weight_OI[0, 1] > 5


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_a_given_mask_as_the_formula_reads(seed: int, share: float) -> None:
    weight, gram = problem(3, 7, seed)
    keep = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) >= share
    solved = sweep(weight, gram, given_mask(keep))
    expected = second_order.surgeon(weight, keep, second_order.damped(gram, 0.01))
    torch.testing.assert_close(solved.weight_OI, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(solved.keep_OI, keep)


@pytest.mark.parametrize(
    ("pattern", "columns"),
    [(Unstructured(), 12), (Unstructured(), 6), (TWO_OF_FOUR, 4), (Tiles(height=2, width=3), 3)],
)
def test_masks_are_chosen_on_the_weights_as_they_are_then(pattern: Pattern, columns: int) -> None:
    weight, gram = problem(4, 12)
    choose = obs(pattern, columns)
    solved = sweep(weight, gram, choose)

    def kept(score: torch.Tensor) -> torch.Tensor:
        units = score.numel() // (2 * (pattern.size if isinstance(pattern, Tiles) else 1))
        assert isinstance(pattern, Unstructured | NofM | Tiles)
        return choose_keep(pattern, score, units, "matrix")

    hessian = second_order.damped(gram, 0.01)
    expected, keep = second_order.surgeon_in_groups(weight, hessian, columns, kept)
    assert torch.equal(solved.keep_OI, keep)
    torch.testing.assert_close(solved.weight_OI, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("pattern", "columns"), [(TWO_OF_FOUR, 4), (Unstructured(), 24), (Unstructured(), 5)]
)
def test_updates_may_wait(pattern: Pattern, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(6, 60)
    whole = sweep(weight, gram, obs(pattern, columns))
    for block, *strips in ((8, 8), (8, 4), (24, 8), (24, 5), (48, 1), (24, 12, 5), (48, 9, 7, 2)):
        monkeypatch.setattr("llmprune.solver.columnwise._BLOCK", block)
        monkeypatch.setattr("llmprune.solver.columnwise._STRIPS", tuple(strips))
        solved = sweep(weight, gram, obs(pattern, columns))
        assert torch.equal(solved.keep_OI, whole.keep_OI)
        torch.testing.assert_close(solved.weight_OI, whole.weight_OI, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 3, 4, 16, 48, 100, 128, 256])
def test_masks_are_asked_for_from_left_to_right_a_number_of_columns_at_a_time(columns: int) -> None:
    weight, gram = problem(2, 300, dtype=torch.float32)
    asked: list[slice] = []

    def fn(weight: torch.Tensor, cols: slice, curvature: torch.Tensor | None) -> torch.Tensor:
        asked.append(cols)
        return torch.arange(300)[cols].remainder(2).bool().expand(2, -1)

    choose = Choose(fn=fn, adaptive=True, columns=columns)
    solved = sweep(weight, gram, choose)
    starts = range(0, 300, columns)
    assert [(cols.start, cols.stop) for cols in asked] == [
        (start, min(start + columns, 300)) for start in starts
    ]
    fixed = sweep(weight, gram, given_mask(solved.keep_OI))
    torch.testing.assert_close(solved.weight_OI, fixed.weight_OI, rtol=1e-3, atol=1e-3)


def test_linears_of_a_tap_are_solved_as_if_alone() -> None:
    weight, gram = problem(10, 16)
    weights = {"q": weight[:3], "k": weight[3:4], "v": weight[4:]}
    masked = torch.arange(16).remainder(3).bool().expand(6, -1)
    chooses = {"q": obs(TWO_OF_FOUR, 4), "k": obs(TWO_OF_FOUR, 4), "v": given_mask(masked)}
    solved = sweep_columns(weights, stats(gram), chooses, Settings())
    assert list(solved) == ["q", "k", "v"]
    for name, each in solved.items():
        alone = sweep(weights[name], gram, chooses[name])
        assert torch.equal(each.keep_OI, alone.keep_OI)
        torch.testing.assert_close(each.weight_OI, alone.weight_OI, rtol=1e-10, atol=1e-10)


def test_masks_of_one_tap_are_of_one_pattern() -> None:
    chooses = {"q": obs(TWO_OF_FOUR, 4), "k": obs(NofM(n=1, m=2), 2)}
    with pytest.raises(ValueError, match=r"\[2, 4\] columns"):
        sweep_columns({"q": T1_WEIGHT, "k": T1_WEIGHT}, stats(T1_GRAM), chooses, Settings())


def test_a_second_sweep_over_its_own_result_changes_nothing() -> None:
    weight, gram = problem(6, 40, dtype=torch.float32)
    first = sweep(weight, gram, obs(Unstructured(), 8))
    second = sweep(first.weight_OI, gram, given_mask(first.keep_OI))
    assert torch.equal(first.weight_OI, second.weight_OI)
    again = sweep(first.weight_OI, gram, obs(Unstructured(), 8))
    assert torch.equal(first.keep_OI, again.keep_OI)


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_and_everything(share: float, factor: float) -> None:
    weight, gram = problem(4, 20, dtype=torch.float32)
    solved = sweep(weight, gram, obs(Unstructured(), 128, share))
    assert torch.equal(solved.weight_OI, factor * weight)


def test_the_scale_of_the_matrix_does_not_matter() -> None:
    weight, gram = problem(6, 24)
    one, other = (sweep(weight, scale * gram, obs(TWO_OF_FOUR, 4)) for scale in (1, 7.3))
    assert torch.equal(one.keep_OI, other.keep_OI)
    torch.testing.assert_close(one.weight_OI, other.weight_OI, rtol=1e-9, atol=1e-9)


def test_weights_of_dead_inputs_go_first_and_stay_as_they_were_where_they_are_kept() -> None:
    weight, gram = problem(3, 8, dtype=torch.float32)
    weight[:, [0, 1, 5]] = 99
    gram[[0, 1, 5]] = 0
    gram[:, [0, 1, 5]] = 0
    solved = sweep(weight, gram, obs(Unstructured(), 8, 3 / 8))
    assert (~solved.keep_OI).nonzero().tolist() == [[r, c] for r in range(3) for c in (0, 1, 5)]
    alive = [2, 3, 4, 6, 7]
    assert torch.equal(solved.weight_OI[:, alive], weight[:, alive])
    keep = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1]] * 3).bool()
    solved = sweep(weight, gram, given_mask(keep))
    assert solved.weight_OI[:, [0, 1, 5]].tolist() == [[99, 0, 0]] * 3
    alone = sweep(weight[:, alive], gram[alive][:, alive], given_mask(keep[:, alive]))
    torch.testing.assert_close(solved.weight_OI[:, alive], alone.weight_OI, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_solved_in_float32_and_stays_as_it_is(dtype: torch.dtype) -> None:
    weight, gram = problem(4, 12, dtype=torch.float32)
    narrow = weight.to(dtype)
    before, gram_before = narrow.clone(), gram.clone()
    solved = sweep(narrow, gram, obs(TWO_OF_FOUR, 4))
    assert solved.weight_OI.dtype == torch.float32 and solved.weight_OI.is_contiguous()
    assert torch.equal(narrow, before) and torch.equal(gram, gram_before)
    wide = sweep(narrow.float(), gram, obs(TWO_OF_FOUR, 4))
    assert torch.equal(solved.weight_OI, wide.weight_OI)


@pytest.mark.parametrize("name", ["columnwise", "least-squares"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_without_a_factor_the_mask_is_that_of_weights_and_norms(name: str, adaptive: bool) -> None:
    weight, _ = problem(4, 8, dtype=torch.float32)
    gram = torch.full((8, 8), 50.0)
    gram.diagonal().copy_(torch.tensor([1.0, 9.0, 0.0, 4.0, 25.0, 1.0, 16.0, 2.0]))
    wanda = choose_keep(TWO_OF_FOUR, weight.abs() * gram.diagonal().sqrt(), 16, "row")
    choose = obs(TWO_OF_FOUR, 4) if adaptive else given_mask(wanda)
    solved = SOLVERS[name].fn({"q": weight}, stats(gram), {"q": choose}, Settings())["q"]
    assert torch.equal(solved.keep_OI, wanda)
    assert torch.equal(solved.weight_OI, weight * wanda)
    assert solved.facts == {"degraded": True}
