"""Reconstruction of halves and blocks on pico models: nearer to the target, pruned weights zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.calibration.replay import call
from llmprune.repair import REPAIRS, fitting
from llmprune.repair.fitting import Goal, Pace, error_of, fit, output_of, split
from llmprune.repair.halves import halves_of
from llmprune.repair.types import Work
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream, advance, embed
from llmprune.walk.resident import in_memory

MakeModel = Callable[..., Any]
OPTIONS = {"epochs": 6.0, "learning_rate": 0.05, "sequences": 2.0}


def cut(block: Block, share: float = 0.5) -> dict[str, Tensor]:
    """Zero the smallest weights of every linear; return the masks."""
    keep = {}
    for name in block.anatomy.linears:
        weight_OI = block.weight(name)
        least = weight_OI.abs().float().flatten().kthvalue(int(share * weight_OI.numel())).values
        keep[name] = weight_OI.abs().float() > least
        block.replace(name, weight_OI * keep[name])
    return keep


def work_of(
    block: Block,
    stream: Stream,
    keep: Mapping[str, Tensor],
    seen: Any = None,
    dense: Any = None,
    **options: float,
) -> Work:
    return Work(
        block=block,
        stream=stream,
        seen=seen,
        keep=keep,
        decide=lambda: keep,
        seed=1,
        options={**OPTIONS, **options},
        dense=dense,
    )


def outputs_of(block: Block, stream: Stream) -> Any:
    """Return what a block gives of every micro-batch."""
    found = stream.hidden.beside("outputs")
    with torch.no_grad():
        for batch, arguments in enumerate(stream.arguments):
            hidden = stream.hidden.get(batch, block.device)
            found.append(call(block.module, hidden, arguments[block.index]).clone())
    return found


def weights_of(block: Block) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in block.module.named_parameters()}


def repaired(
    model: Any, tokens: Tensor, name: str, index: int = 0, **options: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Cut and repair one block; return its weights before and after, the masks and the facts."""
    row = REPAIRS[name]
    with in_memory(model) as blocks:
        stream = embed(blocks, tokens, 1)
        for earlier in range(index):
            with blocks.open(earlier) as block:
                advance(block, stream)
        given = [stream.hidden.get(i, blocks.device).clone() for i in range(len(stream))]
        with blocks.open(index) as block:
            seen = row.watch(block, stream, {**OPTIONS, **options}, 1)
            dense = outputs_of(block, stream)
            keep = cut(block)
            before = weights_of(block)
            facts = dict(row.fn(work_of(block, stream, keep, seen, dense, **options)))
            after = weights_of(block)
            for param in block.module.parameters():
                assert param.grad is None
            for linear, keep_OI in keep.items():
                assert not block.weight(linear)[~keep_OI].count_nonzero()
        assert all(
            torch.equal(given[i], stream.hidden.get(i, blocks.device)) for i in range(len(given))
        )
    return before, after, keep, facts


@pytest.mark.parametrize("name", ["halves", "block"])
def test_every_family_comes_nearer_with_pruned_weights_at_zero(
    make_model: MakeModel, tokens: Tensor, model_type: str, name: str
) -> None:
    before, after, _, facts = repaired(make_model(model_type), tokens, name)
    errors = [key for key in facts if key.endswith("error_after")]
    assert len(errors) == (2 if name == "halves" else 1)
    for key in errors:
        assert facts[key.replace("after", "before")] > facts[key] > 0
    trained = {key for key in before if not torch.equal(before[key], after[key])}
    assert trained and not any("norm" in key or key.endswith("bias") for key in trained)


@pytest.mark.parametrize("name", ["halves", "block"])
def test_the_same_seed_gives_the_same_bits(
    make_model: MakeModel, tokens: Tensor, name: str
) -> None:
    first = repaired(make_model("llama"), tokens, name, epochs=2)
    second = repaired(make_model("llama"), tokens, name, epochs=2)
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    assert first[3] == second[3]


@pytest.mark.parametrize("name", ["halves", "block"])
def test_what_does_not_help_is_taken_back_bit_for_bit(
    make_model: MakeModel, tokens: Tensor, name: str
) -> None:
    before, after, _, facts = repaired(make_model("llama"), tokens, name, learning_rate=300.0)
    assert all(torch.equal(before[key], after[key]) for key in before)
    for key, value in facts.items():
        if key.endswith("accepted"):
            assert value is False
            part = key.removesuffix("accepted")
            assert facts[part + "error_after"] == facts[part + "error_before"]


def test_a_diverging_part_with_nan_is_taken_back(make_model: MakeModel, tokens: Tensor) -> None:
    before, after, _, facts = repaired(make_model("gpt2"), tokens, "block", learning_rate=1e38)
    assert facts["block.accepted"] is False
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_halves_follow_the_forward_and_the_last_one_answers_for_the_block(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    with in_memory(make_model(model_type)) as blocks:
        stream = embed(blocks, tokens, 2)
        with blocks.open(0) as block:
            keep = dict.fromkeys(reversed(block.anatomy.linears), torch.ones(1))
            first, last = halves_of(block, stream, keep)
            assert "attn" in first.name and first.module == first.name
            assert last.module is None
            assert {*first.linears, *last.linears} == set(keep)
            only = halves_of(block, stream, dict.fromkeys(first.linears, torch.ones(1)))
            assert [half.module for half in only] == [None]


def test_linears_that_are_children_of_the_block_train_for_its_output(
    make_model: MakeModel, tokens: Tensor
) -> None:
    _, _, keep, facts = repaired(make_model("opt"), tokens, "halves", epochs=2)
    assert {"fc1", "fc2"} < keep.keys()
    assert {key.split(".")[0] for key in facts} == {"self_attn", "rest"}


def test_halves_and_block_differ_in_what_they_aim_at(make_model: MakeModel, tokens: Tensor) -> None:
    """Attention alone is nearer to its dense self where it was trained for nothing else."""
    errors = {}
    for name in ("halves", "block"):
        model = make_model("llama")
        with in_memory(model) as blocks, blocks.open(0) as block:
            stream = embed(blocks, tokens, 1)
            row = REPAIRS[name]
            seen = row.watch(block, stream, OPTIONS, 1)
            dense = outputs_of(block, stream)
            own = stream.hidden.beside("own")
            with torch.no_grad():
                for i, arguments in enumerate(stream.arguments):
                    hidden = stream.hidden.get(i, block.device)
                    own.append(output_of(block, hidden, arguments[0], "self_attn").clone())
            keep = cut(block)
            row.fn(work_of(block, stream, keep, seen, dense))
            goal = Goal(stream=stream, target=own, part="self_attn")
            errors[name] = error_of(block, goal, range(len(stream)))
    assert errors["halves"] < errors["block"]


def test_the_target_of_block_may_lie_elsewhere_than_what_the_dense_block_gives(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        dense = outputs_of(block, stream)
        keep = cut(block)
        for i in range(len(dense)):
            dense.set(i, dense.get(i, block.device) * 1.5)
        facts = REPAIRS["block"].fn(work_of(block, stream, keep, None, dense))
        found = error_of(block, Goal(stream=stream, target=dense), split(len(stream))[1])
        assert facts["block.error_after"] == pytest.approx(found)
        assert found < facts["block.error_before"]


def test_the_error_weighs_tokens_relative_to_their_own_targets(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 2)
        target = outputs_of(block, stream)
        cut(block)
        found = outputs_of(block, stream)
        total, count = 0.0, 0
        for i in range(len(target)):
            want, got = target.get(i, block.device), found.get(i, block.device)
            energies = want.double().square().mean(-1)
            least = fitting.QUIET * float(want.square().mean(-1).median())
            for b in range(want.shape[0]):
                for t in range(want.shape[1]):
                    off = float((want[b, t] - got[b, t]).double().square().mean())
                    total += off / max(float(energies[b, t]), least)
                    count += 1
        goal = Goal(stream=stream, target=target)
        assert error_of(block, goal, range(len(stream))) == pytest.approx((total / count) ** 0.5)


def test_half_precision_trains_more_than_its_own_steps_could(
    make_model: MakeModel, tokens: Tensor
) -> None:
    """Steps below the resolution of bfloat16 add up in float32."""
    before, after, keep, facts = repaired(
        make_model("llama").to(torch.bfloat16),
        tokens,
        "block",
        learning_rate=5e-4,
        epochs=24,
        sequences=4,
    )
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    moved = sum(int((before[key] != after[key]).sum()) for key in before)
    kept = sum(int(keep_OI.sum()) for keep_OI in keep.values())
    assert facts["block.accepted"] and moved > kept / 4


def test_float16_comes_as_near_as_float32(make_model: MakeModel, tokens: Tensor) -> None:
    """Its gradients are held where they do not vanish."""
    wide, half = (
        repaired(make_model("llama").to(dtype), tokens, "block", epochs=2)[3]
        for dtype in (torch.float32, torch.float16)
    )
    assert half["block.error_after"] == pytest.approx(wide["block.error_after"], rel=2e-3)


def test_one_micro_batch_is_both_trained_and_judged_with(
    make_model: MakeModel, tokens: Tensor
) -> None:
    assert split(1) == (range(1), range(1))
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 6)
        dense = outputs_of(block, stream)
        keep = cut(block)
        pace = Pace(epochs=20, rate=0.05, sequences=4, seed=0)
        assert fit(block, keep, Goal(stream=stream, target=dense), pace).accepted


def test_held_out_micro_batches_are_never_trained_with(
    make_model: MakeModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[int] = set()
    gradients = fitting._gradients

    def noted(
        block: Any, masters: Any, kept: Any, goal: Any, batches: list[int], scale: float
    ) -> Any:
        used.update(batches)
        return gradients(block, masters, kept, goal, batches, scale)

    monkeypatch.setattr(fitting, "_gradients", noted)
    repaired(make_model("llama"), tokens, "block", epochs=3)
    assert used == {0, 1, 2, 3, 4}


def test_a_block_without_error_is_left_alone(make_model: MakeModel, tokens: Tensor) -> None:
    with in_memory(make_model("llama")) as blocks, blocks.open(0) as block:
        stream = embed(blocks, tokens, 1)
        dense = outputs_of(block, stream)
        before = weights_of(block)
        keep = {
            name: torch.ones(linear.shape).bool() for name, linear in block.anatomy.linears.items()
        }
        facts = REPAIRS["block"].fn(work_of(block, stream, keep, None, dense))
        assert facts["block.accepted"] is False and facts["block.error_before"] == 0
        assert all(torch.equal(before[key], value) for key, value in weights_of(block).items())


def test_steps_are_those_of_the_library_optimiser() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, generator=generator)
    other = weight.clone().requires_grad_()
    steps = torch.optim.Adam([other], lr=0.1, betas=fitting.BETAS, eps=fitting.EPS)
    moments = (torch.zeros(4, 5), torch.zeros(4, 5))
    for step in range(1, 6):
        gradient = torch.randn(4, 5, generator=generator)
        gradient[0] = 0
        other.grad = gradient.clone()
        steps.step()
        fitting._adam(weight, gradient, moments, 0.1, step)
    torch.testing.assert_close(weight, other.detach())
