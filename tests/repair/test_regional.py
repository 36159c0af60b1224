"""Regional optimisation against a slow loop, and what becomes of a block that it does not help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmprune.calibration.replay import call
from llmprune.repair import REPAIRS
from llmprune.repair.regional import watch_regional
from llmprune.repair.types import Work
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream, embed
from llmprune.walk.resident import in_memory

MakeModel = Callable[..., Any]
ROW = REPAIRS["regional"]
OPTIONS = {"rounds": 2.0, "samples": 3.0, "learning_rate": 1e-4}


class Cut:
    """Cuts a block by magnitude, as often as it is asked."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.times = 0
        self.undone = False
        self.keep = self()

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        self.keep = {}
        for name in self.block.anatomy.linears:
            weight_OI = self.block.weight(name)
            size = weight_OI.abs().float()
            self.keep[name] = size > size.flatten().kthvalue(weight_OI.numel() // 2).values
            self.block.replace(name, weight_OI * self.keep[name])
        return self.keep

    def undo(self) -> None:
        self.undone = True


def work_of(block: Block, stream: Stream, seen: Any, cut: Cut, **options: float) -> Work:
    return Work(
        block=block,
        stream=stream,
        seen=seen,
        keep=cut.keep,
        decide=cut,
        seed=5,
        options={**OPTIONS, **options},
        undo=cut.undo,
    )


def weights_of(block: Block) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in block.module.named_parameters()}


def test_defaults_are_the_papers() -> None:
    assert ROW.options == {"rounds": 5, "samples": 32, "learning_rate": 3e-7}


def test_every_family_ends_with_zeros_where_the_last_cut_prunes(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    with in_memory(make_model(model_type)) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        seen = ROW.watch(block, stream, OPTIONS, 5)
        cut = Cut(block)
        before = weights_of(block)
        facts = ROW.fn(work_of(block, stream, seen, cut))
        assert cut.times == 3 and facts["block.accepted"] and not cut.undone
        assert facts["block.error_after"] < facts["block.error_before"]
        for name, keep_OI in cut.keep.items():
            assert not block.weight(name)[~keep_OI].count_nonzero()
        after = weights_of(block)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and changed <= block.params_of(set(block.anatomy.linears))
        for param in block.module.parameters():
            assert param.grad is None


def test_steps_equal_a_slow_loop_with_the_library_optimiser(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        seen = ROW.watch(block, stream, OPTIONS, 5)
        dense = {i: seen.target(i, block).clone() for i in seen.places}
        cut = Cut(block)
        start = weights_of(block)
        ROW.fn(work_of(block, stream, seen, cut))
        found = weights_of(block)

        with torch.no_grad():
            for name, param in block.module.named_parameters():
                param.copy_(start[name])
        weights = [block.module.get_parameter(row.param) for row in block.anatomy.linears.values()]
        steps = torch.optim.RMSprop(weights, lr=1e-4)
        for batches in seen.rounds:
            for i in batches:
                with torch.enable_grad():
                    for weight in weights:
                        weight.requires_grad_(True)
                    output = call(
                        block.module, stream.hidden.get(i, block.device), stream.arguments[i][0]
                    )
                    ((output - dense[i]) ** 2).sum().backward()
                steps.step()
                steps.zero_grad()
            for weight in weights:
                weight.requires_grad_(False)
            cut()
        for name, value in weights_of(block).items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
            assert name.endswith("norm.weight") or not torch.equal(start[name], value)


def test_what_does_not_help_is_undone_bit_for_bit(make_model: MakeModel, tokens: Tensor) -> None:
    with in_memory(make_model("gpt2")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        seen = ROW.watch(block, stream, OPTIONS, 5)
        cut = Cut(block)
        before = weights_of(block)
        facts = ROW.fn(work_of(block, stream, seen, cut, learning_rate=1.0))
        assert facts["block.accepted"] is False and cut.undone
        assert facts["block.error_after"] == facts["block.error_before"]
        assert all(torch.equal(before[name], value) for name, value in weights_of(block).items())


def test_draws_are_of_the_seed_and_never_of_what_is_held_out(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        first, again, other = (watch_regional(block, stream, OPTIONS, seed) for seed in (5, 5, 6))
        assert first.rounds == again.rounds != other.rounds
        assert first.held == (5,)
        assert all(len(set(each)) == 3 and 5 not in each for each in first.rounds)
        every = watch_regional(block, stream, {**OPTIONS, "samples": 32}, 5)
        assert all(sorted(each) == [0, 1, 2, 3, 4] for each in every.rounds)


def test_pruned_weights_move_between_cuts_and_may_come_back(
    make_model: MakeModel, tokens: Tensor
) -> None:
    """What sets it apart from reconstruction, whose mask is final."""
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        seen = ROW.watch(block, stream, OPTIONS, 5)
        cut = Cut(block)
        moved = []

        def noted() -> dict[str, Tensor]:
            for name, keep_OI in cut.keep.items():
                moved.append(float((block.weight(name)[~keep_OI] != 0).float().mean()))
            return cut()

        ROW.fn(replace(work_of(block, stream, seen, cut), decide=noted))
        assert len(moved) == 2 * len(cut.keep) and min(moved) > 0.9


def test_steps_too_small_for_half_precision_add_up_over_rounds(
    make_model: MakeModel, tokens: Tensor
) -> None:
    """A step rounds away in bfloat16; rounds go on from float32, so many steps do not."""
    moved = {}
    for rounds in (1.0, 24.0):
        model = make_model("llama").to(torch.bfloat16)
        with in_memory(model) as blocks, blocks.open(0) as block:
            stream = embed(blocks, tokens, 1)
            options = {"rounds": rounds, "samples": 1.0, "learning_rate": 1e-5}
            seen = ROW.watch(block, stream, options, 5)
            cut = Cut(block)
            before = {name: block.weight(name).clone() for name in cut.keep}
            work = replace(work_of(block, stream, seen, cut, **options), undo=lambda: None)
            ROW.fn(work)
            kept = {name: keep & (before[name] != 0) for name, keep in cut.keep.items()}
            moved[rounds] = sum(
                int((block.weight(name)[kept[name]] != before[name][kept[name]]).sum())
                for name in kept
            )
    assert moved[24.0] > 2 * moved[1.0], moved
