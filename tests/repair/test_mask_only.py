"""Masks that scores choose anew: exact counts, dense values, swaps by hand and by a slow loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llmprune
from llmprune.base.errors import RecipeError
from llmprune.delivery.masks import MaskFiles
from llmprune.repair import REPAIRS
from llmprune.repair.mask_only import (
    Bilevel,
    Scores,
    agreeing,
    hyper_gradient,
    saliency,
    swapped_masks,
)
from llmprune.repair.types import Work
from llmprune.walk.block import Block
from llmprune.walk.forward import embed
from llmprune.walk.resident import in_memory

MakeModel = Callable[..., Any]
Pico = Callable[..., Path]


def cut(block: Block, scale: float = 1.0) -> dict[str, Tensor]:
    """Zero the half of every row that is smaller, and scale the rest as a solver might."""
    keep = {}
    for name in block.anatomy.linears:
        weight_OI = block.weight(name)
        order = weight_OI.abs().float().argsort(dim=1).argsort(dim=1)
        keep[name] = order >= weight_OI.shape[1] // 2
        block.replace(name, weight_OI * keep[name] * scale)
    return keep


class Repaired:
    """One block that was cut and repaired: weights before and after, masks first and last."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        name: str,
        within: int | None = None,
        scale: float = 1.0,
        **options: float,
    ) -> None:
        row = REPAIRS[name]
        given = {**row.options, **options}
        with in_memory(model) as blocks, blocks.open(0) as block:
            stream = embed(blocks, tokens, 1)
            self.dense = {n: block.weight(n).clone() for n in block.anatomy.linears}
            seen = row.watch(block, stream, given, 1)
            self.first = cut(block, scale)
            self.cut = {n: block.weight(n).clone() for n in self.first}
            self.last = dict(self.first)
            work = Work(
                block=block,
                stream=stream,
                seen=seen,
                keep={n: keep_OI.clone() for n, keep_OI in self.first.items()},
                decide=lambda: self.first,
                seed=1,
                options=given,
                within=within,
                remask=self.last.update,
            )
            self.facts: dict[str, Any] = dict(row.fn(work))
            self.weights = {n: block.weight(n).clone() for n in self.first}

    @property
    def moved(self) -> set[str]:
        return {n for n in self.first if not torch.equal(self.first[n], self.last[n])}


def slow_swaps(score: list[list[float]], keep: list[list[bool]], share: float) -> list[list[bool]]:
    """Pair the best pruned weight of a row with its worst kept one, and so on; take the best."""
    pairs = []
    for row, (values, kept) in enumerate(zip(score, keep, strict=True)):
        into = sorted((i for i, k in enumerate(kept) if not k), key=lambda i: (-values[i], i))
        out = sorted((i for i, k in enumerate(kept) if k), key=lambda i: (values[i], i))
        for place, (i, o) in enumerate(zip(into, out, strict=False)):
            if values[i] > values[o]:
                pairs.append((o, i, row, place, values[i] - values[o]))
    pairs.sort(key=lambda pair: (-pair[4], pair[2], pair[3]))
    found = [list(row) for row in keep]
    for o, i, row, _, _ in pairs[: math.ceil(share * len(pairs))]:
        found[row][o], found[row][i] = False, True
    return found


def test_the_best_that_wants_in_takes_the_place_of_the_worst() -> None:
    """Scores 1, 1, .99, .99 that became .98, 1, .995, .99: place 0 goes, place 2 comes."""
    score = torch.tensor([[0.98, 1.0, 0.995, 0.99]])
    keep = torch.tensor([[True, True, False, False]])
    found = swapped_masks(score, keep, 1.0, None)
    assert found.tolist() == [[False, True, True, False]]
    assert keep.tolist() == [[True, True, False, False]]


def test_a_share_takes_the_swaps_that_gain_most_and_equal_scores_stay() -> None:
    score = torch.tensor([[0.0, 0.5], [0.0, 2.0], [1.0, 1.0], [0.0, 1.0]])
    keep = torch.tensor([[True, False]]).expand(4, 2)
    third = swapped_masks(score, keep, 1 / 3, None)
    assert third[:, 1].tolist() == [False, True, False, False]
    most = swapped_masks(score, keep, 2 / 3, None)
    assert most[:, 1].tolist() == [False, True, False, True]
    every = swapped_masks(score, keep, 1.0, None)
    assert every[:, 1].tolist() == [True, True, False, True]


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    st.sampled_from([None, 2, 4]),
)
def test_swaps_equal_a_slow_loop_and_keep_every_count(
    rows: list[list[tuple[int, bool]]], share: float, within: int | None
) -> None:
    score = torch.tensor([[float(value) for value, _ in row] for row in rows])
    keep = torch.tensor([[kept for _, kept in row] for row in rows])
    found = swapped_masks(score, keep, share, within)
    width = within or 4
    slow = slow_swaps(score.view(-1, width).tolist(), keep.view(-1, width).tolist(), share)
    assert found.view(-1, width).tolist() == slow
    assert torch.equal(found.view(-1, width).sum(1), keep.view(-1, width).sum(1))
    if share == 1.0:  # a row has the highest scores at last
        for values, kept in zip(score.view(-1, width), found.view(-1, width), strict=True):
            assert not kept.any() or kept.all() or values[kept].min() >= values[~kept].max()


def test_first_scores_ask_for_no_swap() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(6, 8, generator=generator)
    keep = torch.rand(6, 8, generator=generator) < 0.5
    keep[0], keep[1] = True, False
    for within in (None, 4):
        found = agreeing(score, keep, within)
        assert torch.equal(swapped_masks(found, keep, 1.0, within), keep)
    right = score >= score.sort(dim=1, descending=True).values[:, 2:3]
    assert torch.equal(agreeing(score, right, None)[right], score[right])


def test_saliency_is_the_weight_times_the_root_of_its_rows_and_columns_curvature() -> None:
    row, column = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    weight = torch.tensor([[-1.0, 2.0, 5.0], [4.0, 0.0, 1.0]])
    found = saliency(weight, row * column)
    torch.testing.assert_close(found, weight.abs() * row * column)
    assert not saliency(weight, torch.zeros(2, 3)).count_nonzero()


def test_the_hyper_gradient_by_hand() -> None:
    """Of w = (2, -1), m = (1, 0), g = (.5, .3) and gamma = 10: .5 (2 - .05) and .3 (-1)."""
    weight, keep = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    found = hyper_gradient(weight, keep, torch.tensor([0.5, 0.3]), 0.1)
    torch.testing.assert_close(found, torch.tensor([0.975, -0.3]))


@pytest.mark.parametrize("within", [None, 4])
def test_every_family_keeps_dense_values_at_new_places_of_the_same_counts(
    make_model: MakeModel, tokens: Tensor, model_type: str, within: int | None
) -> None:
    found = Repaired(make_model(model_type), tokens, "jackpots", within)
    assert found.moved
    swapped = 0
    for name, last in found.last.items():
        first, width = found.first[name], within or last.shape[1]
        assert torch.equal(last.reshape(-1, width).sum(1), first.reshape(-1, width).sum(1))
        assert torch.equal(found.weights[name], found.dense[name] * last)
        swapped += int((last & ~first).sum())
    assert found.facts["swapped"] == swapped > 0
    errors = [key for key in found.facts if key.endswith("error_after")]
    assert any(found.facts[k] < found.facts[k.replace("after", "before")] for k in errors)


def test_what_a_solver_made_of_weights_gives_way_to_dense_values(
    make_model: MakeModel, tokens: Tensor
) -> None:
    found = Repaired(make_model("llama"), tokens, "jackpots", scale=0.9, halves=0)
    assert found.facts["block.accepted"]
    for name, last in found.last.items():
        assert torch.equal(found.weights[name], found.dense[name] * last)


@pytest.mark.parametrize("name", ["jackpots", "bilevel"])
def test_what_does_not_help_leaves_weights_and_masks_bit_for_bit(
    make_model: MakeModel, tokens: Tensor, name: str
) -> None:
    rates = {"learning_rate": 1e6, "swaps": 1.0} | (
        {"weight_rate": 1e3} if name == "bilevel" else {}
    )
    found = Repaired(make_model("llama"), tokens, name, None, 1.0, **rates)
    assert not found.moved and found.facts["swapped"] == 0
    assert all(torch.equal(found.weights[n], value) for n, value in found.cut.items())


def test_the_same_seed_gives_the_same_masks_in_half_precision(
    make_model: MakeModel, tokens: Tensor
) -> None:
    one, two = (
        Repaired(make_model("mixtral").to(torch.bfloat16), tokens, "bilevel", 4) for _ in range(2)
    )
    assert one.facts == two.facts and one.moved
    for name, last in one.last.items():
        assert torch.equal(last, two.last[name])
        assert torch.equal(one.weights[name], two.weights[name])
        assert one.weights[name].dtype == torch.bfloat16
        assert not one.weights[name][~last].count_nonzero()


def work_with(block: Block, **options: float) -> Work:
    """Return what scores need of a repair's work."""
    given = {**REPAIRS["bilevel"].options, **options}
    stream: Any = None
    return Work(
        block=block,
        stream=stream,
        seen=None,
        keep={},
        decide=lambda: {},
        seed=0,
        options=given,
    )


def test_scores_follow_momentum_in_units_of_the_saliency(make_model: MakeModel) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        name, rate = "mlp.down_proj", 0.5
        dense = block.weight(name).clone()
        keep = dense.abs() >= dense.abs().median(dim=1, keepdim=True).values
        scores = Scores(
            work_with(block, learning_rate=rate, swaps=1.0), {name: keep}, {name: dense}
        )
        generator = torch.Generator().manual_seed(0)
        one, two = (torch.randn(dense.shape, generator=generator) for _ in range(2))
        unit = saliency(dense, one).square().mean().sqrt()
        start = agreeing(saliency(dense, one) / unit, keep, None)
        for step, gradient in enumerate((one, two)):
            scores.step({f"{name}.weight": gradient}, step, 4)
        expected = start - rate * (one * 1.9 + two) * dense / unit
        torch.testing.assert_close(scores.scores[name], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(block.weight(name), dense * scores.keep[name])
        assert not torch.equal(scores.keep[name], keep)


def test_a_linear_that_no_token_reaches_keeps_its_mask_and_zeros_never_come_back(
    make_model: MakeModel,
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        names = ("mlp.up_proj", "mlp.down_proj")
        dense = {name: block.weight(name).clone() for name in names}
        keep = {}
        for name, weight_OI in dense.items():
            weight_OI[:, ::4] = 0  # of an earlier pruning
            keep[name] = torch.zeros(weight_OI.shape).bool()
            keep[name][:, 1::4] = True
        scores = Scores(work_with(block, learning_rate=1.0, swaps=1.0), keep, dense)
        generator = torch.Generator().manual_seed(0)
        shape = dense["mlp.down_proj"].shape
        for step in range(4):
            gradients = {f"{n}.weight": torch.zeros(dense[n].shape) for n in names}
            gradients["mlp.down_proj.weight"] = torch.randn(shape, generator=generator)
            scores.step(gradients, step, 4)
        assert torch.equal(scores.keep["mlp.up_proj"], keep["mlp.up_proj"])
        assert not torch.equal(scores.keep["mlp.down_proj"], keep["mlp.down_proj"])
        assert not scores.keep["mlp.down_proj"][:, ::4].any()


def test_both_levels_take_turns_and_pruned_weights_wait_at_their_dense_values(
    make_model: MakeModel,
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        name = "mlp.down_proj"
        dense = block.weight(name).clone()
        keep = dense.abs() >= dense.abs().median(dim=1, keepdim=True).values
        moves = Bilevel(work_with(block, swaps=1.0), {name: keep}, {name: dense})
        generator = torch.Generator().manual_seed(0)
        ever, before = keep.clone(), dense.clone()
        for step in range(6):
            gradient = torch.randn(dense.shape, generator=generator)
            moves.step({f"{name}.weight": gradient}, step, 6)
            trained = moves.masters[name] != before
            assert bool(trained.any()) == (step % 2 == 0)
            assert not trained[~moves.keep[name]].any()
            ever |= moves.keep[name]
            before = moves.masters[name].clone()
            assert torch.equal(block.weight(name), before * moves.keep[name])
        assert not torch.equal(moves.keep[name], keep)
        assert torch.equal(before[~ever], dense[~ever])


def test_tiles_and_a_share_of_no_swaps_are_refused(pico: Pico, make_model: MakeModel) -> None:
    with pytest.raises(RecipeError, match=r"prune\.repair: jackpots .*4x4 tiles"):
        llmprune.plan(
            str(pico("llama")), sparsity=0.5, pattern="4x4", settings=["prune.repair=jackpots"]
        )
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        row, stream = REPAIRS["jackpots"], None
        with pytest.raises(RecipeError, match=r"prune\.options\.swaps: 0 .*swaps=0\.5"):
            row.watch(block, stream, {**row.options, "swaps": 0.0}, 0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("permute", ["false", "true"])
def test_a_run_writes_the_new_masks_and_the_dense_weights_they_keep(
    pico: Pico, stock: Callable[[Path], Any], tmp_path: Path, permute: str
) -> None:
    """Where channels were put in order, dense values come back in that order."""
    tokens = torch.randint(0, 64, (24, 24), generator=torch.Generator().manual_seed(0))
    masks = {}
    for repair in ("none", "jackpots"):
        out = tmp_path / repair
        llmprune.prune(
            str(pico("llama")),
            method="wanda",
            pattern="2:4",
            calib=tokens,
            out=out,
            quiet=True,
            settings=[f"prune.repair={repair}", f"prune.permute={permute}"],
        )
        masks[repair] = MaskFiles(out).of_block("model.layers.0.")
    dense, sparse = (dict(stock(path).named_parameters()) for path in (pico("llama"), out))
    assert any(
        not torch.equal(masks["none"][n], keep_OI) for n, keep_OI in masks["jackpots"].items()
    )
    for name, keep_OI in masks["jackpots"].items():
        weight_OI = sparse[f"{name}.weight"]
        assert (keep_OI.view(-1, 4).sum(1) == 2).all()
        assert not weight_OI[~keep_OI].count_nonzero()
        assert set(weight_OI[keep_OI].tolist()) <= set(dense[f"{name}.weight"].flatten().tolist())
    if permute == "false":
        return
    up, down = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))
    order = [int((dense[down] == row[row != 0][0]).nonzero()[0, 1]) for row in sparse[down].T]
    assert order != sorted(order) and sorted(order) == list(range(len(order)))
    keep_OI = masks["jackpots"]["model.layers.0.mlp.up_proj"]
    assert torch.equal(sparse[up], dense[up][order] * keep_OI)
