"""Linears and taps of every family, and the views through which fused parameters are edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.table import row_of
from llmprune.base.errors import UnsupportedModel

MakeModel = Callable[..., Any]

ATTENTION = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
}
GATED = ATTENTION | {
    "ffn_in": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn_out": ("mlp.down_proj",),
}
GPT2 = {
    "attn_in": ("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v"),
    "attn.c_proj.in": ("attn.c_proj",),
    "mlp.c_fc.in": ("mlp.c_fc",),
    "mlp.c_proj.in": ("mlp.c_proj",),
}
EXPERTS = ATTENTION | {
    f"experts.{e}.{end}": tuple(f"mlp.experts.{e}.{name}" for name in names)
    for e in range(4)
    for end, names in (("in", ("gate_proj", "up_proj")), ("out", ("down_proj",)))
}
TAPS = {"llama": GATED, "qwen3": GATED, "gemma3_text": GATED, "gpt2": GPT2, "mixtral": EXPERTS}


def first_block(model: Any, model_type: str) -> tuple[Any, Anatomy]:
    family = row_of(model_type)
    block = model.get_submodule(family.blocks)[0]
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    return block, anatomy_of(family, shapes)


def test_every_tap_is_read_by_the_linears_of_its_family(
    make_model: MakeModel, model_type: str
) -> None:
    _, anatomy = first_block(make_model(model_type), model_type)
    assert {tap.name: tap.readers for tap in anatomy.taps} == TAPS[model_type]
    assert anatomy.linears.keys() == {n for names in TAPS[model_type].values() for n in names}


def test_shapes_are_those_of_the_views(make_model: MakeModel, model_type: str) -> None:
    block, anatomy = first_block(make_model(model_type), model_type)
    for linear in anatomy.linears.values():
        view = linear.view(block.get_parameter(linear.param).data)
        assert tuple(view.shape) == linear.shape, linear.name


def test_the_parts_cover_each_parameter_once(make_model: MakeModel, model_type: str) -> None:
    block, anatomy = first_block(make_model(model_type), model_type)
    params = {linear.param for linear in anatomy.linears.values()}
    counts = {param: torch.zeros_like(block.get_parameter(param)) for param in params}
    for linear in anatomy.linears.values():
        linear.view(counts[linear.param]).add_(1)  # reaches the parameter only through a view
    for param, count in counts.items():
        assert torch.equal(count, torch.ones_like(count)), param


def test_gpt2_views_are_output_by_input(make_model: MakeModel) -> None:
    block, anatomy = first_block(make_model("gpt2"), "gpt2")
    assert {name: linear.shape for name, linear in anatomy.linears.items()} == {
        "attn.c_attn.q": (32, 32),
        "attn.c_attn.k": (32, 32),
        "attn.c_attn.v": (32, 32),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (128, 32),
        "mlp.c_proj": (32, 128),
    }
    x_TI = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    fused = block.attn.c_attn
    parts = [anatomy.linears[f"attn.c_attn.{p}"].view(fused.weight.data) for p in "qkv"]
    ours = torch.cat([x_TI @ part.T for part in parts], dim=1) + fused.bias
    torch.testing.assert_close(ours, fused(x_TI))


def expert_output(views: dict[str, Tensor], x_TI: Tensor) -> Tensor:
    gate, up, down = (views[name] for name in ("gate_proj", "up_proj", "down_proj"))
    return (torch.nn.functional.silu(x_TI @ gate.T) * (x_TI @ up.T)) @ down.T


def test_mixtral_views_are_the_experts_of_the_formula(make_model: MakeModel) -> None:
    block, anatomy = first_block(make_model("mixtral"), "mixtral")
    experts = block.mlp.experts
    experts.config._experts_implementation = "eager"
    x_TI = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for e in range(4):
        views = {
            name: anatomy.linears[f"mlp.experts.{e}.{name}"].view(param.data)
            for name, param in (
                ("gate_proj", experts.gate_up_proj),
                ("up_proj", experts.gate_up_proj),
                ("down_proj", experts.down_proj),
            )
        }
        theirs = experts(x_TI, torch.full((3, 1), e), torch.ones(3, 1))
        torch.testing.assert_close(expert_output(views, x_TI), theirs)


def test_a_block_without_any_linear_of_its_row_is_refused() -> None:
    shapes = {"self_attn.qkv.weight": (32, 32), "mlp.wide.weight": (64, 32)}
    with pytest.raises(UnsupportedModel, match=r"none of the linears self_attn\.q_proj.*mlp\.wide"):
        anatomy_of(row_of("llama"), shapes)


def test_blocks_of_another_kind_have_the_taps_whose_readers_they_hold() -> None:
    shapes = {
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.down_proj.weight": (32, 64),
    }
    anatomy = anatomy_of(row_of("llama"), shapes)
    assert [tap.readers for tap in anatomy.taps] == [
        ("self_attn.q_proj",),
        ("self_attn.o_proj",),
        ("mlp.down_proj",),
    ]
    spans = {row.name: [span.linear for span in row.spans] for row in anatomy.couplings}
    assert spans == {  # neither channels nor heads: their other linears are not there
        "attention": ["self_attn.q_proj", "self_attn.o_proj"],
        "ffn": ["mlp.down_proj"],
        "block": ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"],
    }


def test_routers_and_norms_are_no_linears(make_model: MakeModel) -> None:
    block, anatomy = first_block(make_model("mixtral"), "mixtral")
    assert block.get_parameter("mlp.gate.weight").dim() == 2
    assert "mlp.gate" not in anatomy.linears
