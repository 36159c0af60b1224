"""What is seen of experts against every token's experts asked one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.table import expert_taps
from llmprune.arch.types import Family
from llmprune.base.errors import NumericalError, UnsupportedModel
from llmprune.calibration.hidden import HiddenStates
from llmprune.calibration.replay import Arguments, call
from llmprune.stats.routing import ROUTING, RoutingSums
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream, embed
from llmprune.walk.resident import in_memory
from llmprune.walk.routing import observe_routing
from tests.reference import routing as reference

MakeModel = Callable[..., Any]
MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jamba",
)  # fmt: skip


def seen_of(
    model: Any, tokens_NT: Tensor, *, micro_batch: int = 2, index: int = 1
) -> tuple[Stats, list[Tensor]]:
    """Return what is seen of a block's routing, and what its experts' module was called with."""
    given: list[tuple[Tensor, ...]] = []
    with in_memory(model) as blocks, blocks.open(index) as block, torch.no_grad():
        flow = embed(blocks, tokens_NT, micro_batch)
        hidden = [flow.hidden.get(batch, block.device) for batch in range(len(flow))]
        before = [call(block.module, x, flow.arguments[0][index]) for x in hidden]
        stats = observe_routing(block, flow)
        hook = experts_in(block.module).register_forward_pre_hook(
            lambda module, args: given.append(args)
        )
        after = [call(block.module, x, flow.arguments[0][index]) for x in hidden]
        hook.remove()
        for batch, (old, new) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(old, new)
            assert torch.equal(flow.hidden.get(batch, block.device), hidden[batch])
    return stats, [torch.cat(parts) for parts in zip(*given, strict=True)]


def experts_in(module: Any) -> Any:
    half = module.feed_forward if hasattr(module, "feed_forward") else module.mlp
    return half.experts


def answer(experts: Any, expert: int, x: Tensor) -> Tensor:
    """Return what one expert says to one token, by the formula of its family."""
    if hasattr(experts, "gate_up_proj_bias"):
        params = (
            experts.gate_up_proj,
            experts.gate_up_proj_bias,
            experts.down_proj,
            experts.down_proj_bias,
        )
        return reference.clamped_swiglu(*(param[expert].double() for param in params), x)
    return reference.swiglu(
        experts.gate_up_proj[expert].double(), experts.down_proj[expert].double(), x
    )


@pytest.mark.parametrize("model_type", MIXTURES)
@torch.no_grad()
def test_statistics_agree_with_every_token_asked_alone(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    model = make_model(model_type)
    stats, (hidden_TD, expert_TK, gate_TK) = seen_of(model, tokens)
    experts = experts_in(model.get_submodule("model.layers")[1])
    outputs = [
        [answer(experts, int(e), x.double()).tolist() for e in row]
        for x, row in zip(hidden_TD, expert_TK, strict=True)
    ]
    expected = reference.routing(expert_TK.tolist(), gate_TK.tolist(), outputs, 4)
    assert stats.num_tokens == tokens.numel() == len(expert_TK)
    assert set(stats.values) == set(ROUTING) == expected.keys()
    assert stats["route_count"].tolist() == expected["route_count"]
    assert stats["route_gate"].sum() == pytest.approx(tokens.numel())
    for name, values in expected.items():
        assert max(values) > 0
        wanted = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(stats[name], wanted, rtol=1e-5, atol=0)


def test_gates_that_the_model_does_not_bring_to_one_differ_from_those_used(
    make_model: MakeModel, tokens: Tensor
) -> None:
    raw, _ = seen_of(make_model("olmoe"), tokens)
    assert raw["used_gate"].sum() < 0.9 * raw["route_gate"].sum()
    scaled, _ = seen_of(make_model("deepseek_v3"), tokens)
    torch.testing.assert_close(scaled["used_norm"], 2.5 * scaled["route_norm"])


def test_micro_batches_only_regroup_the_sums(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("mixtral")
    one, _ = seen_of(model, tokens, micro_batch=6)
    many, _ = seen_of(model, tokens, micro_batch=1)
    again, _ = seen_of(model, tokens, micro_batch=1)
    for name in ROUTING:
        torch.testing.assert_close(one[name], many[name], rtol=1e-6, atol=0)
        assert torch.equal(many[name], again[name])


def test_merged_sums_are_those_of_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    norm_TK, largest_TK, gate_TK = torch.rand(3, 9, 2, generator=generator).double()
    whole, first, second = RoutingSums(4), RoutingSums(4), RoutingSums(4)
    whole.update(expert_TK, norm_TK, largest_TK, gate_TK)
    for sums, rows in ((first, slice(0, 5)), (second, slice(5, 9))):
        sums.update(expert_TK[rows], norm_TK[rows], largest_TK[rows], gate_TK[rows])
    first.merge(second)
    assert first.num_tokens == 9
    for name in ROUTING:
        torch.testing.assert_close(first.result()[name], whole.result()[name])


def test_numbers_beyond_the_experts_stand_for_none() -> None:
    sums = RoutingSums(2)
    sums.update(
        torch.tensor([[0, 2]]),
        torch.tensor([[3.0, 9.0]]),
        torch.tensor([[1.0, 9.0]]),
        torch.tensor([[0.25, 0.75]]),
    )
    result = sums.result()
    assert result["route_norm"].tolist() == [0.75, 0.0]
    assert result["out_max"].tolist() == [1.0, 0.0]


def test_a_dense_block_is_refused(make_model: MakeModel, tokens: Tensor) -> None:
    with pytest.raises(UnsupportedModel, match="block 0 has no routed experts"):
        seen_of(make_model("jamba"), tokens, index=0)


def test_an_answer_that_is_no_number_is_refused(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("inf")
    with in_memory(model) as blocks, blocks.open(1) as block:
        flow = embed(blocks, tokens, 2)
        with pytest.raises(NumericalError, match="an expert of block 1 answers with NaN"):
            observe_routing(block, flow)


class Expert(nn.Module):
    """A gated expert that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(6, 5, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Listed(nn.Module):
    """A block whose experts are a list of modules; the last one is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        second_BT = x_BTD[..., 0] > 0
        out_BTD = torch.zeros_like(x_BTD)
        out_BTD[~second_BT] = 0.5 * self.experts[0](x_BTD[~second_BT])
        out_BTD[second_BT] = 0.5 * self.experts[1](x_BTD[second_BT])
        return out_BTD


def listed_block() -> tuple[Block, Stream]:
    torch.manual_seed(0)
    module = Listed()
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    family = Family(model_types=("listed",), blocks="blocks", taps=expert_taps("experts"))
    anatomy: Anatomy = anatomy_of(family, shapes)
    hidden = HiddenStates("host", None)
    hidden.append(torch.randn(2, 7, 6))
    device = torch.device("cpu")
    block = Block(index=0, prefix="blocks.0.", module=module, anatomy=anatomy, device=device)
    return block, Stream(hidden=hidden, arguments=([Arguments(args=(), kwargs={})],))


@torch.no_grad()
def test_experts_in_a_list_are_watched_one_by_one() -> None:
    block, flow = listed_block()
    stats = observe_routing(block, flow, ("route_count", "out_norm"))
    hidden_TD = flow.hidden.get(0, block.device).reshape(-1, 6)
    second_T = hidden_TD[:, 0] > 0
    assert stats.num_tokens == 14
    assert stats["route_count"].tolist() == [int((~second_T).sum()), int(second_T.sum()), 0]
    for expert, chosen_T in enumerate((~second_T, second_T)):
        answers = block.module.experts[expert](hidden_TD[chosen_T])
        assert float(stats["out_norm"][expert]) == pytest.approx(float(answers.norm(dim=-1).sum()))
    assert "route_norm" not in stats.values


def test_gates_of_experts_in_a_list_are_refused() -> None:
    block, flow = listed_block()
    with pytest.raises(UnsupportedModel, match="route_norm cannot be learnt"):
        observe_routing(block, flow, ("route_norm",))


def test_experts_that_are_called_otherwise_are_refused(
    make_model: MakeModel, tokens: Tensor
) -> None:
    with in_memory(make_model("mixtral")) as blocks, blocks.open(1) as block:
        flow = embed(blocks, tokens, 2)
        gate = block.module.mlp.gate
        route = gate.forward

        def scores_of_all(hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE, _, chosen_TK = route(hidden_TD)
            return logits_TE, logits_TE, chosen_TK

        gate.forward = scores_of_all
        with pytest.raises(UnsupportedModel, match=r"called with .*\[48, 2\], \[48, 4\]\]"):
            observe_routing(block, flow)
