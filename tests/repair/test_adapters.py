"""Masked LoRA on pico blocks: zeros stay, a merge leaves what was trained, slopes by autograd."""

from __future__ import annotations

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
from llmprune.repair.adapters import (
    SCALE,
    Adapters,
    Factors,
    drawn,
    merged,
    norms_of,
    pulled,
    speed_at,
)
from llmprune.repair.types import Work
from llmprune.walk.block import Block
from llmprune.walk.forward import embed
from llmprune.walk.resident import in_memory

MakeModel = Callable[..., Any]
Pico = Callable[..., Path]
ROW = REPAIRS["masked-lora"]
OPTIONS = {**ROW.options, "learning_rate": 0.01, "rank": 8.0}


def cut(block: Block) -> dict[str, Tensor]:
    """Zero the smaller half of every linear; return the masks."""
    keep = {}
    for name in block.anatomy.linears:
        weight_OI = block.weight(name)
        size = weight_OI.abs().float()
        keep[name] = size > size.flatten().kthvalue(weight_OI.numel() // 2).values
        block.replace(name, weight_OI * keep[name])
    return keep


def weights_of(block: Block) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in block.module.named_parameters()}


class Repaired:
    """One block that was cut and repaired: parameters before and after, masks, what was told."""

    def __init__(self, model: Any, tokens: Tensor, **options: float) -> None:
        self.touched: set[str] = set()
        options = {**OPTIONS, **options}
        with in_memory(model) as blocks, blocks.open(0) as block:
            stream = embed(blocks, tokens, 1)
            seen = ROW.watch(block, stream, options, 1)
            self.keep = cut(block)
            self.masks = {name: keep_OI.clone() for name, keep_OI in self.keep.items()}
            self.before = weights_of(block)
            work = Work(
                block=block,
                stream=stream,
                seen=seen,
                keep=self.keep,
                decide=lambda: self.keep,
                seed=1,
                options=options,
                touch=self.touched.update,
            )
            self.facts: dict[str, Any] = dict(ROW.fn(work))
            self.after = weights_of(block)
            self.norms = set(norms_of(block))
            self.params = block.params_of(set(self.keep))
            self.zero = all(not block.weight(n)[~k].count_nonzero() for n, k in self.keep.items())
            self.idle = all(param.grad is None for param in block.module.parameters())

    @property
    def changed(self) -> set[str]:
        return {n for n, value in self.before.items() if not torch.equal(value, self.after[n])}


def test_the_update_is_cut_by_the_mask() -> None:
    """[[1, 0], [0, 2]] + 2 [1, 2]^T [.5, 1]: plain LoRA gives [[2, 2], [2, 6]], without a zero."""
    weight, keep = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2).bool()
    b, a = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 1.0]])
    assert SCALE == 2
    assert merged(Factors(weight, keep, b, a)).tolist() == [[2, 0], [0, 6]]
    whole = torch.ones(2, 2).bool()
    assert merged(Factors(weight, whole, b, a)).tolist() == [[2, 2], [2, 6]]


def test_a_kept_zero_may_move_and_the_stored_mask_says_which_those_are() -> None:
    weight, keep = torch.zeros(1, 2), torch.tensor([[True, False]])
    found = merged(Factors(weight, keep, torch.ones(1, 1), torch.ones(1, 2)))
    assert found.tolist() == [[SCALE, 0]]


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_gradients_of_the_factors_are_those_of_autograd(
    height: int, width: int, rank: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(height, width, generator=generator)
    keep = torch.rand(height, width, generator=generator) < 0.5
    factors = drawn(weight * keep, keep, rank, generator)
    assert len(factors.a_RI) == min(rank, height, width)
    assert torch.equal(merged(factors), weight * keep)
    b = torch.randn(factors.b_OR.shape, generator=generator).requires_grad_()
    a = factors.a_RI.clone().requires_grad_()
    upstream = torch.randn(height, width, generator=generator)
    (((weight * keep) + SCALE * (b @ a) * keep) * upstream).sum().backward()
    with torch.no_grad():
        grad_b, grad_a = pulled(upstream * keep, factors._replace(b_OR=b, a_RI=a))
        left = merged(factors._replace(b_OR=b, a_RI=a))
    torch.testing.assert_close(grad_b, b.grad)
    torch.testing.assert_close(grad_a, a.grad)
    assert not left[~keep].count_nonzero()


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero() -> None:
    found = [speed_at(step, 20) for step in range(20)]
    assert found[:3] == [0.5, 1, 1]
    assert found[3:] == pytest.approx([(20 - step) / 18 for step in range(3, 20)])
    assert speed_at(0, 1) == 1


def test_every_family_comes_nearer_with_pruned_weights_at_zero(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    found = Repaired(make_model(model_type), tokens, norms=0)
    errors = [key for key in found.facts if key.endswith("error_after")]
    assert len(errors) == 2 and found.zero and found.idle
    for key in errors:
        assert found.facts[key.replace("after", "before")] > found.facts[key] > 0
    assert found.changed and found.changed <= found.params and not found.touched
    assert all(torch.equal(found.masks[name], keep) for name, keep in found.keep.items())


def test_what_a_linear_gains_has_the_rank_asked_for(make_model: MakeModel, tokens: Tensor) -> None:
    """Within the mask there is an update of rank 1: every 2 x 2 minor of kept weights vanishes."""
    found = Repaired(make_model("gpt2"), tokens, rank=1, norms=0, learning_rate=0.03)
    name = "mlp.c_proj"
    gain_OI = (found.after[name + ".weight"] - found.before[name + ".weight"]).T.double()
    keep_OI = found.keep[name]
    minors = []
    for row in range(8):
        (cols,) = (keep_OI[row] & keep_OI[row + 1]).nonzero(as_tuple=True)
        square = gain_OI[row : row + 2, cols]
        minors.append(float(square[0, 0] * square[1, 1] - square[0, 1] * square[1, 0]))
    assert gain_OI.abs().max() > 1e-3
    assert max(map(abs, minors)) < 1e-5 * float(gain_OI.abs().max()) ** 2


def test_norms_are_trained_and_told_of_unless_left_out(
    make_model: MakeModel, tokens: Tensor
) -> None:
    found = Repaired(make_model("gpt2"), tokens)
    assert found.norms == {f"ln_{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
    assert found.touched == found.norms and found.changed & found.norms
    assert found.changed <= found.params | found.norms


def test_the_whole_block_may_be_one_goal(make_model: MakeModel, tokens: Tensor) -> None:
    found = Repaired(make_model("llama"), tokens, halves=0)
    assert {key.split(".")[0] for key in found.facts} == {"block"}
    assert found.facts["block.accepted"]
    assert {name.split(".")[0] for name in found.changed & found.params} == {"self_attn", "mlp"}


def test_half_precision_holds_the_merged_weights_rounded_once(
    make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model("mixtral").to(torch.bfloat16)
    found = Repaired(model, tokens)
    assert found.zero and found.changed
    assert all(value.dtype == torch.bfloat16 for value in found.after.values())
    with in_memory(make_model("llama").to(torch.bfloat16)) as blocks, blocks.open(0) as block:
        keep = cut(block)
        moves = Adapters(block, keep, rank=2, rate=0.1, seed=0)
        gradients = {n: torch.randn(k.shape) * k for n, k in moves.kept.items()}
        moves.step(gradients, 0, 4)
        for name, factors in moves.factors.items():
            assert factors.b_OR.dtype == torch.float32 and factors.b_OR.count_nonzero()
            assert torch.equal(block.weight(name), merged(factors).bfloat16())


def test_the_first_step_moves_weights_by_the_rate_whatever_the_rank(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        keep = {name: torch.ones(row.shape).bool() for name, row in block.anatomy.linears.items()}
        start = {name: block.weight(name).clone() for name in keep}
        for rank in (1, 8):
            moves = Adapters(block, keep, rank=rank, rate=0.01, seed=0)
            generator = torch.Generator().manual_seed(1)
            gradients = {
                n: torch.randn(k.shape, generator=generator) for n, k in moves.kept.items()
            }
            moves.step(gradients, 0, 1)
            for name, weight_OI in start.items():
                moved = (block.weight(name) - weight_OI).square().mean().sqrt()
                assert 0.005 < float(moved / weight_OI.square().mean().sqrt()) < 0.02
                block.weight(name).copy_(weight_OI)


def test_the_same_seed_gives_the_same_bits_and_harm_is_taken_back(
    make_model: MakeModel, tokens: Tensor
) -> None:
    one, two = (Repaired(make_model("llama"), tokens, epochs=1) for _ in range(2))
    assert one.facts == two.facts
    assert all(torch.equal(value, two.after[name]) for name, value in one.after.items())
    bad = Repaired(make_model("llama"), tokens, learning_rate=1e4)
    assert not bad.changed and not bad.touched
    assert not any(value for key, value in bad.facts.items() if key.endswith("accepted"))


def test_a_rank_of_zero_is_refused_before_anything_is_cut(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with pytest.raises(RecipeError, match=r"prune\.options\.rank: 0 .*rank=16"):
        Repaired(make_model("llama"), tokens, rank=0)


@pytest.mark.usefixtures("quick_gate")
def test_a_run_writes_trained_norms_and_masks_that_hold(
    pico: Pico, stock: Callable[[Path], Any], tokens: Tensor, tmp_path: Path
) -> None:
    """The gate compares with the source every tensor that is not said to have changed."""
    out = tmp_path / "out"
    llmprune.prune(
        str(pico("llama")),
        pattern="2:4",
        calib=tokens,
        out=out,
        quiet=True,
        settings=["prune.repair=masked-lora", "prune.options.rank=4"],
    )
    dense, sparse = (dict(stock(path).named_parameters()) for path in (pico("llama"), out))
    files = MaskFiles(out)
    changed = {name for name, value in dense.items() if not torch.equal(value, sparse[name])}
    assert any("norm" in name for name in changed) and changed <= files.touched
    masks = files.of_block("model.layers.0.")
    assert len(masks) == 7
    for name, keep_OI in masks.items():
        weight_OI = sparse[f"{name}.weight"]
        assert not weight_OI[~keep_OI].count_nonzero()
        assert (keep_OI.view(-1, 4).sum(1) == 2).all()
        assert not torch.equal(weight_OI, dense[f"{name}.weight"] * keep_OI)
