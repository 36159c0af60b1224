"""Models without weights: parameters on meta, buffers as in a model that was built normally."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError, UnsupportedModel
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton, empty, fill, read_config, tie

Pico = Callable[..., Path]
SkeletonOf = Callable[[Path], Skeleton]


def write_config(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def test_parameters_are_on_meta_and_buffers_are_real(
    pico: Pico, skeleton_of: SkeletonOf, stock: Callable[[Path], Any], model_type: str
) -> None:
    folder = pico(model_type)
    skeleton, normal = skeleton_of(folder), stock(folder)
    assert all(value.is_meta for value in skeleton.model.parameters())
    expected = dict(normal.named_buffers())
    found = dict(skeleton.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not skeleton.model.training


def test_rotary_frequencies_stay_in_float32(pico: Pico) -> None:
    skeleton = build_skeleton(read_config(pico("llama")), dtype=torch.bfloat16)
    buffers = {name: v for name, v in skeleton.model.named_buffers() if name.endswith("inv_freq")}
    assert buffers and all(value.dtype == torch.float32 for value in buffers.values())
    assert {value.dtype for value in skeleton.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embeddings_are_one_where_the_config_ties_them(
    pico: Pico, skeleton_of: SkeletonOf, model_type: str, tied: bool
) -> None:
    model = skeleton_of(pico(model_type, tied=tied)).model
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == tied
    entrance = model.get_input_embeddings()
    entrance.weight = torch.nn.Parameter(torch.ones(64, 32), requires_grad=False)
    tie(model)
    assert (model.get_output_embeddings().weight is entrance.weight) == tied


def test_blocks_and_trunk_are_all_there_is(
    pico: Pico, skeleton_of: SkeletonOf, model_type: str
) -> None:
    skeleton = skeleton_of(pico(model_type, tied=False))
    inside = [
        skeleton.prefix(index) + name
        for index in range(len(skeleton.blocks))
        for name in skeleton.shapes(index)
    ]
    everything = [name for name, _ in skeleton.model.named_parameters()]
    assert sorted(inside + skeleton.trunk_params()) == sorted(everything)


def test_what_was_filled_can_be_emptied(pico: Pico, skeleton_of: SkeletonOf) -> None:
    block = skeleton_of(pico("llama")).blocks[0]
    weight = torch.ones(64, 32)
    fill(block, {"mlp.gate_proj.weight": weight})
    assert block.mlp.gate_proj.weight.data_ptr() == weight.data_ptr()
    assert not block.mlp.gate_proj.weight.requires_grad
    empty(block)
    assert all(value.is_meta for value in block.parameters())
    assert tuple(block.mlp.gate_proj.weight.shape) == (64, 32)


def test_experts_are_multiplied_one_by_one(pico: Pico, skeleton_of: SkeletonOf) -> None:
    assert skeleton_of(pico("mixtral")).config._experts_implementation == "eager"


@pytest.mark.parametrize("tower", ["vision_config", "audio_config"])
def test_a_wrapper_with_towers_is_refused(tmp_path: Path, tower: str) -> None:
    write_config(tmp_path, {"model_type": "gemma3", "text_config": {}, tower: {"hidden_size": 8}})
    with pytest.raises(UnsupportedModel, match=rf"{tower.split('_')[0]} tower"):
        read_config(tmp_path)


def test_remote_code_is_not_run_unasked(pico: Pico, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    write_config(folder, config)
    with pytest.raises(UnsupportedModel, match="--trust-remote-code"):
        read_config(folder)
    assert not (tmp_path / "ran").exists()


def test_a_family_without_a_row_is_probed() -> None:
    config = AutoConfig.for_model("phi", num_hidden_layers=3, vocab_size=64)
    found = build_skeleton(config, dtype=torch.float32)
    assert found.family.blocks == "model.layers" and len(found.blocks) == 3
    assert found.family.seen is not None


def test_a_block_with_a_parameter_that_the_probe_has_not_seen_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def less(config: Any, **options: Any) -> Family:
        family = find_family(config, **options)
        assert family.seen is not None
        return replace(family, seen=family.seen - {"mlp.fc2.weight"})

    monkeypatch.setattr("llmprune.checkpoint.skeleton.find_family", less)
    config = AutoConfig.for_model("phi", num_hidden_layers=2, vocab_size=64)
    with pytest.raises(
        UnsupportedModel, match=r"block 0 of Phi.*'mlp.fc2.weight'.*miniature lacks"
    ):
        build_skeleton(config, dtype=torch.float32)


def test_blocks_that_share_a_parameter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3, vocab_size=64, hidden_size=32)

    def tie_blocks(model: Any) -> None:
        first, *_, last = model.model.layers
        last.mlp = first.mlp

    monkeypatch.setattr("llmprune.checkpoint.skeleton.tie", tie_blocks)
    with pytest.raises(UnsupportedModel, match=r"blocks 0 and 2 .* share 'mlp.gate_proj.weight'"):
        build_skeleton(config, dtype=torch.float32)


@pytest.mark.parametrize(
    "data", [{}, {"model_type": "nonesuch"}, {"model_type": "llama", "hidden_size": "wide"}]
)
def test_a_config_that_means_nothing_is_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises((CheckpointError, UnsupportedModel), match=r"config\.json|model type"):
        read_config(write_config(tmp_path, data))


def test_an_attention_that_does_not_exist_is_refused(pico: Pico) -> None:
    config = read_config(pico("llama"))
    with pytest.raises(UnsupportedModel, match="cannot build llama"):
        build_skeleton(config, dtype=torch.float32, attention="flash_attention_2")


def test_a_family_of_transformers_needs_none_of_the_code_that_a_repository_brings(
    pico: Pico, tmp_path: Path
) -> None:
    """Repositories older than their family's place in transformers keep their first code."""
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_old", "modeling_old"):
        (folder / f"{name}.py").write_text(code)
    config["auto_map"] = {
        "AutoConfig": "configuration_old.Config",
        "AutoModelForCausalLM": "modeling_old.Model",
    }
    write_config(folder, config)
    found = build_skeleton(read_config(folder), dtype=torch.float32)
    assert type(found.model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()
