"""Learned gates: their gradient is autograd's, and what does nothing is let go of first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llmprune
from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.engine.gates import Gated, _drawn, _last_hidden, _moved, _slopes, chance, learn_gates
from llmprune.engine.sites import Group, groups_of
from llmprune.mask.pattern import Units
from llmprune.walk.resident import Resident, in_memory

UNITS = Units(kinds=("ffn-channels", "heads"))


def groups(blocks: Resident) -> list[tuple[Group, ...]]:
    return [
        groups_of(UNITS, blocks.anatomy(i), block=i, prefix=f"b{i}.", skip=())
        for i in range(len(blocks))
    ]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_gradient_of_gates_is_that_of_autograd(
    make_model: Callable[..., Any], tokens: torch.Tensor, model_type: str
) -> None:
    """Against one graph through the whole model, inputs of the readers multiplied by the gates."""
    model = make_model(model_type).double()
    draw = torch.Generator().manual_seed(1)
    tokens = tokens[:2]
    with in_memory(model) as blocks:
        here = groups(blocks)
        gates = {
            group.sites[0].name: torch.rand(group.sites[0].num_units, generator=draw).double()
            for each in here
            for group in each
        }
        dense = _last_hidden(blocks, tokens)
        kl, slopes = _slopes(Gated(blocks=blocks, groups=here, gates=gates), tokens, dense)
        theirs, expected = by_autograd(model, blocks, here, gates, tokens)
    assert kl == pytest.approx(theirs, rel=1e-5)
    for name, slope_U in slopes.items():
        torch.testing.assert_close(slope_U, expected[name], rtol=1e-4, atol=1e-7)


def by_autograd(
    model: Any,
    blocks: Resident,
    here: list[tuple[Group, ...]],
    gates: dict[str, torch.Tensor],
    tokens: torch.Tensor,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return KL and gradients of a stock forward whose readers' inputs are gated by hooks."""
    own = {name: gate.clone().requires_grad_() for name, gate in gates.items()}
    with torch.no_grad():
        log_p = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    hooks = []
    for index, each in enumerate(here):
        for group in each:
            assert group.coupling is not None
            width = group.coupling.spans[-1].width
            gate_I = own[group.sites[0].name].repeat_interleave(width)
            module = blocks.modules[index].get_submodule(str(group.coupling.reader))
            hooks.append(module.register_forward_pre_hook(lambda m, a, g=gate_I: (a[0] * g,)))
    log_q = model(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)
    loss = (log_p.exp() * (log_p - log_q)).sum() / tokens.numel()
    loss.backward()
    for hook in hooks:
        hook.remove()
    return float(loss.detach()), {
        name: gate.grad for name, gate in own.items() if gate.grad is not None
    }


def test_a_step_by_hand() -> None:
    """Slopes 1 and -1 of equal cost have size 1; what is left is the shift that meets the goal."""
    logit = torch.zeros(2, dtype=torch.float64)
    direction = torch.tensor([1.0, -1.0], dtype=torch.float64)
    cost = torch.ones(2, dtype=torch.float64)
    moved = _moved(logit, direction, cost, rate=0.5, kept=0.5)
    assert float(moved[1] - moved[0]) == pytest.approx(1.0)
    offset = 2 / 3 * math.log(0.1 / 1.1)
    assert moved.tolist() == pytest.approx([offset - 0.5, offset + 0.5])


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 64)), min_size=2, max_size=12),
    st.floats(0.1, 0.9),
)
def test_after_every_step_what_is_expected_to_stay_is_the_goal(
    units: list[tuple[float, int]], kept: float
) -> None:
    slope, cost = (torch.tensor(part, dtype=torch.float64) for part in zip(*units, strict=True))
    moved = _moved(torch.full_like(slope, 2.5), slope, cost, rate=0.3, kept=kept)
    assert float((cost * chance(moved)).sum() / cost.sum()) == pytest.approx(kept, abs=0.01)
    for one, other in itertools.pairwise(slope.argsort().tolist()):
        assert moved[one] >= moved[other]


def test_draws_are_on_and_off_as_often_as_published() -> None:
    """Of many draws, the share above 0 is the chance, and by symmetry that of 1 at the negative."""
    logit = torch.full((200_000,), -0.4, dtype=torch.float64)
    drawn = _drawn(logit, torch.Generator().manual_seed(3))
    assert float((drawn > 0).double().mean()) == pytest.approx(float(chance(logit[0])), abs=0.01)
    assert float((drawn < 1).double().mean()) == pytest.approx(float(chance(-logit[0])), abs=0.01)


def test_gates_that_only_scale_are_told_from_gates_that_choose(
    make_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    """Chances end apart, not all beside the share that is to stay."""
    model = make_model("llama")
    with in_memory(model) as blocks:
        here = groups(blocks)
        learnt = learn_gates(blocks, here, tokens, target=0.5, steps=40, progress=Progress("quiet"))
        every = torch.cat([learnt(i)["mlp.down_proj"]["gate"] for i in range(len(blocks))])
    assert float((every - 0.5).abs().mean()) > 0.2


def test_units_that_do_nothing_are_let_go_of(
    make_model: Callable[..., Any], tokens: torch.Tensor
) -> None:
    model = make_model("llama")
    dead = [1, 4, 7, 9]
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, dead] = 0
    with in_memory(model) as blocks:
        here = groups(blocks)
        learnt = learn_gates(blocks, here, tokens, target=0.3, steps=12, progress=Progress("quiet"))
        gate_U = learnt(0)["mlp.down_proj"]["gate"]
    alive = torch.ones(len(gate_U), dtype=torch.bool)
    alive[dead] = False
    assert float(gate_U[dead].max()) < float(gate_U[alive].mean())


def test_a_run_by_learned_gates_is_uniform_where_the_tier_is(
    pico: Callable[..., Path], tokens: torch.Tensor, tmp_path: Path, quick_gate: None
) -> None:
    settings = ["prune.options.steps=3", "prune.tier=E0", "evaluate.perplexity=false"]
    plan = llmprune.plan(
        str(pico("llama")),
        out=str(tmp_path / "out"),
        method="learned-gates",
        sparsity=0.3,
        num_samples=6,
        seq_len=24,
        settings=settings,
    )
    report = llmprune.run(plan, tokens=tokens, quiet=True)
    assert report.data["tier"] == "E0"
    assert report.sparsity == pytest.approx(0.3, abs=0.02)


def test_a_plan_counts_what_training_gates_costs(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Each step walks forward and back; the dense model is walked once for every four sequences."""

    def plan_of(method: str, num_samples: int = 6, *settings: str) -> Any:
        return llmprune.plan(
            str(pico("llama")),
            out=str(tmp_path / "out"),
            method=method,
            sparsity=0.3,
            num_samples=num_samples,
            seq_len=24,
            settings=settings,
        )

    plan, plain = plan_of("learned-gates"), plan_of("flap")
    assert plan.estimate.num_reads - plain.estimate.num_reads == 48 * 2 + 2
    many = plan_of("learned-gates", 6, "prune.options.steps=60")
    assert many.estimate.num_reads > many.prune.max_reads  # which is for searches
    few = plan_of("learned-gates", 6, "prune.options.steps=2")
    assert few.estimate.gate_reads == 2 * 2 + 2
    assert few.estimate.survey_seconds < plan.estimate.survey_seconds
    assert "learnt in 2 steps of 4 sequences" in repr(few) and "gates" not in repr(plain)
    assert plan_of("learned-gates", 3, "prune.options.steps=2").estimate.gate_reads == 2 * 2 + 1


@pytest.mark.parametrize("steps", ["0", "-3", ".nan", ".inf"])
def test_a_number_of_steps_is_at_least_1(
    steps: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"prune\.options\.steps: .*at least 1;"):
        llmprune.plan(
            str(pico("llama")),
            out=str(tmp_path / "out"),
            method="learned-gates",
            sparsity=0.3,
            settings=[f"prune.options.steps={steps}"],
        )


def test_gates_that_were_learnt_are_read_again(
    make_model: Callable[..., Any], tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model("llama")
    file = tmp_path / "gates.safetensors"

    def learn(steps: int) -> torch.Tensor:
        with in_memory(model) as blocks:
            quiet = Progress("quiet")
            found = learn_gates(
                *(blocks, groups(blocks), tokens),
                target=0.3,
                steps=steps,
                progress=quiet,
                file=file,
            )
            return found(1)["mlp.down_proj"]["gate"]

    first = learn(2)
    assert torch.equal(learn(5), first)
    file.unlink()
    assert not torch.equal(learn(5), first)
