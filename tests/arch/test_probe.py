"""The probe: it finds what the table says, serves families without a row, or says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmprune.arch.anatomy import Anatomy, anatomy_of, is_router, left_out
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.probe import family_of_model, find_family, probe_family
from llmprune.arch.table import FAMILIES, row_of
from llmprune.arch.types import Family
from llmprune.base.errors import UnsupportedModel
from llmprune.calibration.replay import check_replay

IN_TABLE = sorted(name for row in FAMILIES for name in row.model_types)
WITHOUT_ROW = ("exaone4", "granitemoe", "minimax", "phi", "qwen3_next", "rwkv", "gpt_bigcode")
FINER = ("falcon", "stablelm")  # variants differ in who shares an input: taps of their own


def eager(model: Any) -> Any:
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def anatomies(family: Family, model: Any) -> list[Anatomy]:
    return [
        anatomy_of(family, {name: tuple(p.shape) for name, p in block.named_parameters()})
        for block in model.get_submodule(family.blocks)
    ]


def params_by_tap(anatomy: Anatomy) -> set[frozenset[tuple[str, int | None]]]:
    """Return, for every tap, the parameters (and expert) that its readers lie in."""
    return {
        frozenset((anatomy.linears[n].param, anatomy.linears[n].expert) for n in tap.readers)
        for tap in anatomy.taps
    }


@pytest.mark.parametrize("model_type", IN_TABLE)
def test_a_row_of_the_table_is_what_the_probe_finds(model_type: str) -> None:
    model = eager(miniature_model(AutoConfig.for_model(model_type)))
    row, found = row_of(model_type), family_of_model(model)
    assert row is not None
    assert (row.blocks, row.returns) == (found.blocks, found.returns)
    for ours, theirs in zip(anatomies(row, model), anatomies(found, model), strict=True):
        here, there = params_by_tap(ours), params_by_tap(theirs)
        assert set().union(*here) == set().union(*there)  # the same parameters are eligible
        assert all(any(tap <= other for other in there) for tap in here)  # no tap joins two
        assert here == there or model_type in FINER
        for name in theirs.linears.keys() & ours.linears.keys():
            assert ours.linears[name] == theirs.linears[name]  # lying in the parameter alike


@pytest.mark.parametrize("model_type", IN_TABLE)
def test_families_of_the_table_can_be_walked(model_type: str) -> None:
    model = eager(miniature_model(AutoConfig.for_model(model_type)))
    row = row_of(model_type)
    assert row is not None
    check_replay(model, model.get_submodule(row.blocks), SEQ_LEN, returns=row.returns)


@pytest.mark.parametrize("model_type", WITHOUT_ROW)
def test_families_without_a_row_are_probed_and_can_be_walked(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    family = find_family(config)
    assert family.seen and family.model_types == (model_type,)
    model = eager(miniature_model(config))
    check_replay(model, model.get_submodule(family.blocks), SEQ_LEN, returns=family.returns)
    for block, anatomy in zip(
        model.get_submodule(family.blocks), anatomies(family, model), strict=True
    ):
        shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
        rest = left_out(anatomy, shapes)
        linears = {
            f"{name}.weight" for name, m in block.named_modules() if isinstance(m, nn.Linear)
        }
        assert {name for name in linears & rest.keys() if rest[name] != "router"} == set()


def test_the_probe_runs_once_per_config(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    config = AutoConfig.for_model("phi", hidden_size=96, num_attention_heads=4)

    def count(config: Any, **options: Any) -> Family:
        calls.append(config.hidden_size)
        return probe_family(config, **options)

    monkeypatch.setattr("llmprune.arch.probe.probe_family", count)
    assert find_family(config) == find_family(config)
    assert calls == [96]


def test_interleaved_transposed_experts_come_apart() -> None:
    model = eager(miniature_model(AutoConfig.for_model("gpt_oss")))
    (anatomy, *_) = anatomies(probe_family(AutoConfig.for_model("gpt_oss")), model)
    experts = model.model.layers[0].mlp.experts
    gate = anatomy.linears["mlp.experts.2.gate_proj"].view(experts.gate_up_proj.data)
    up = anatomy.linears["mlp.experts.2.up_proj"].view(experts.gate_up_proj.data)
    assert torch.equal(gate, experts.gate_up_proj[2, :, 0::2].T)
    assert torch.equal(up, experts.gate_up_proj[2, :, 1::2].T)


def test_a_weight_that_is_no_right_operand_is_left_out() -> None:
    config = AutoConfig.for_model("mamba")
    model = miniature_model(config)
    shapes = {name: tuple(p.shape) for name, p in model.backbone.layers[0].named_parameters()}
    rest = left_out(anatomies(probe_family(config), model)[0], shapes)
    assert rest["mixer.dt_proj.weight"] == "no product with it is watched"
    assert rest["mixer.conv1d.weight"] == "convolution"
    assert rest["mixer.D"] == rest["norm.weight"] == "norm, bias or scale"


def test_routers_are_left_out() -> None:
    config = AutoConfig.for_model("qwen2_moe")
    model = miniature_model(config)
    shapes = {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters()}
    rest = left_out(anatomies(probe_family(config), model)[0], shapes)
    assert rest["mlp.gate.weight"] == rest["mlp.shared_expert_gate.weight"] == "router"


class Twice(nn.Module):
    """Blocks of which the first runs again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("llama", vocab_size=64)
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in (*self.layers, self.layers[0]):
            hidden = block(hidden)
        return hidden


def test_blocks_that_run_twice_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"Twice has no list of blocks.*its lists: layers"):
        family_of_model(Twice())


def test_a_model_that_wants_other_inputs_is_refused() -> None:
    class Pictures(Twice):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    with pytest.raises(UnsupportedModel, match=r"does not run on token ids alone: TypeError"):
        family_of_model(Pictures())


def test_a_config_that_cannot_be_shrunk_is_refused_with_its_reason() -> None:
    with pytest.raises(UnsupportedModel, match=r"no miniature of 'reformer'.*is_decoder"):
        find_family(AutoConfig.for_model("reformer"))


class Lists(nn.Module):
    """Blocks in as many lists as there are widths, one list after the other."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.config = AutoConfig.for_model("llama", vocab_size=64)
        self.embed = nn.Embedding(64, 8)
        for index, width in enumerate(widths):
            pairs = (nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8)) for _ in range(2))
            self.add_module(f"part{index}", nn.ModuleList(pairs))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden: torch.Tensor = self.embed(input_ids)
        for part in list(self.children())[1:]:
            assert isinstance(part, nn.ModuleList)
            for block in part:
                hidden = block(hidden)
        return hidden


def test_blocks_in_two_lists_are_refused() -> None:
    assert family_of_model(Lists(32)).blocks == "part0"
    with pytest.raises(UnsupportedModel, match=r"more than one list: part1 and part0\."):
        family_of_model(Lists(16, 32))


class Gated(nn.Module):
    """A block with a gate in its attention and, if asked for, a router beside experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "gate_proj")})
        self.mlp = nn.ModuleDict({"gate": nn.Linear(8, num_experts)})
        if num_experts:
            self.mlp["experts"] = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn["gate_proj"](hidden) * self.attn["gate"](hidden).sigmoid()
        shares = self.mlp["gate"](hidden).softmax(-1)
        for index, expert in enumerate(self.mlp["experts"]):
            hidden = hidden + shares[..., index, None] * expert(hidden)
        return hidden


def test_a_gate_is_a_router_beside_experts_alone() -> None:
    model = Lists(8)
    model.part0 = nn.ModuleList(Gated(num_experts=3) for _ in range(2))
    family = family_of_model(model)
    readers = {tap.readers for tap in family.taps}
    assert ("attn.gate_proj", "attn.gate") in readers
    assert ("mlp.experts.{expert}",) in readers and len(readers) == 2
    shapes = {name: tuple(value.shape) for name, value in model.part0[0].named_parameters()}
    rest = left_out(anatomy_of(family, shapes), shapes)
    assert {name for name, why in rest.items() if why == "router"} == {"mlp.gate.weight"}


@pytest.mark.parametrize("name", ["mlp.router.layer.weight", "altup.modality_router.weight"])
def test_a_router_is_known_by_its_name(name: str) -> None:
    assert is_router(name, {name: (4, 32)})
