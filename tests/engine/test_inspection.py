"""Inspection: every parameter of a model has a place in it, stacks stand on one line."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from llmprune import api
from llmprune.arch.anatomy import Anatomy, left_out
from llmprune.arch.types import Linear, Tap
from llmprune.checkpoint.source import Source
from llmprune.engine.inspection import Inspection, Kind

Pico = Callable[..., Path]
MakeModel = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Source, names: object) -> None:
        raise AssertionError(f"{names} were read")

    monkeypatch.setattr(Source, "get", forbidden)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "gpt_oss", "jamba"])
def test_every_parameter_is_eligible_or_left_out(
    model_type: str, pico: Pico, make_model: MakeModel
) -> None:
    found, model = api.inspect(pico(model_type)), make_model(model_type)
    eligible = left = 0
    for kind in found.kinds:
        eligible += len(kind.blocks) * kind.eligible
        rest = left_out(kind.anatomy, kind.shapes)
        left += len(kind.blocks) * sum(prod(kind.shapes[param]) for param in rest)
    inside = sum(value.numel() for value in model.get_submodule(found.blocks).parameters())
    assert eligible == found.eligible and eligible + left == inside
    assert found.num_params == sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "num"), [("llama", 0), ("mixtral", 4), ("granitemoe", 4), ("recurrent_gemma", 0)]
)
def test_experts_are_what_a_router_chooses_from(model_type: str, num: int, pico: Pico) -> None:
    assert {kind.experts for kind in api.inspect(pico(model_type)).kinds} == {num}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_model_in_memory_looks_as_from_disk(
    model_type: str, pico: Pico, make_model: MakeModel
) -> None:
    one = api.inspect(pico(model_type)).to_dict()
    other = api.inspect(make_model(model_type)).to_dict()
    assert one.pop("source") == str(pico(model_type)) and other.pop("source") == "in memory"
    assert one == other


def test_a_stack_stands_on_one_line_with_its_own_indices() -> None:
    """Two FFNs beside three experts."""
    names = ["ffns.0.up", "ffns.1.up", *(f"mlp.experts.{e}.up" for e in range(3))]
    linears = {name: Linear(name=name, param=f"{name}.weight", shape=(8, 4)) for name in names}
    taps = tuple(Tap(name=f"{name}.in", readers=(name,)) for name in names)
    shapes = {f"{name}.weight": (8, 4) for name in names} | {"mlp.gate.weight": (3, 4)}
    anatomy = Anatomy(linears=linears, taps=taps, couplings=())
    kind = Kind(blocks=(0, 1), anatomy=anatomy, shapes=shapes)
    text = repr(Inspection(source="s", family="f", blocks="b", kinds=(kind,), trunk={"e": (2, 3)}))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "blocks 0-1: 160 eligible weights each, 3 experts" in lines
    assert "ffns.{0-1}.up.in ffns.{0-1}.up 8 x 4 64" in lines
    assert "mlp.experts.{0-2}.up.in mlp.experts.{0-2}.up 8 x 4 96" in lines
    assert "mlp.gate.weight 12 router" in lines
    assert "e 6 outside the blocks: stays as it is" in lines
