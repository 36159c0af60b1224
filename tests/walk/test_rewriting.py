"""A committed block: untouched tensors bit for bit, touched ones in their stored dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import INDEX, SINGLE
from llmprune.walk.rewriting import Rewriting, open_rewriting
from llmprune.walk.streamed import Streamed

Pico = Callable[..., Path]
Open = Callable[..., Streamed]


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def rewrite(blocks: Streamed, out: Path) -> Rewriting:
    return open_rewriting(blocks, blocks.skeleton, out)


@pytest.mark.parametrize(("tied", "sharded"), [(True, False), (False, True)])
def test_commit_without_touching_is_a_copy(
    pico: Pico, streamed: Open, tmp_path: Path, model_type: str, tied: bool, sharded: bool
) -> None:
    folder = pico(model_type, tied=tied, sharded=sharded)
    blocks = rewrite(streamed(folder), tmp_path)
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            blocks.commit(block, set())
    blocks.commit_trunk()
    blocks.write_index()
    source = open_source(str(folder))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"].keys() == source.entries.keys()
    assert index["metadata"]["total_size"] == source.num_bytes
    assert len(list(tmp_path.glob("*.safetensors"))) == len(blocks) + 1
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as handle:
            assert same_bits(handle.get_tensor(name), source.get([name])[name]), name


@pytest.fixture
def mixed(make_model: Callable[..., Any], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint in bfloat16 whose norms are in float32."""

    def write(model_type: str) -> Path:
        folder = tmp_path / "mixed"
        make_model(model_type).save_pretrained(folder)
        tensors = {
            name: value if "norm" in name or "ln_" in name else value.bfloat16()
            for name, value in load_file(folder / SINGLE).items()
        }
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return folder

    return write


def test_stored_dtypes_survive_a_walk_in_float32(
    mixed: Callable[[str], Path], streamed: Open, tmp_path: Path, model_type: str
) -> None:
    folder = mixed(model_type)
    original = load_file(folder / SINGLE)
    blocks = rewrite(streamed(folder), tmp_path / "out")
    with blocks.open(0) as block:
        linear = next(iter(block.anatomy.linears.values()))
        assert block.weight(linear.name).dtype == torch.float32
        block.weight(linear.name)[0].zero_()
        shard = load_file(blocks.commit(block, {linear.param}))
    changed = {name for name, value in shard.items() if not same_bits(value, original[name])}
    assert changed == blocks.source.naming.disk_names_of([block.prefix + linear.param])
    for name, value in shard.items():
        assert value.dtype == original[name].dtype, name


def test_touched_experts_keep_what_was_not_edited(
    pico: Pico, streamed: Open, tmp_path: Path
) -> None:
    folder = pico("mixtral")
    original = load_file(folder / SINGLE)
    blocks = rewrite(streamed(folder), tmp_path)
    with blocks.open(1) as block:
        block.weight("mlp.experts.2.up_proj")[:, 0] = 0
        shard = load_file(blocks.commit(block, {"mlp.experts.gate_up_proj"}))
    changed = [name for name, value in shard.items() if not same_bits(value, original[name])]
    assert changed == ["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    expected = original[changed[0]].clone()
    expected[:, 0] = 0
    assert torch.equal(shard[changed[0]], expected)


def test_what_is_stored_is_what_was_committed(pico: Pico, streamed: Open, tmp_path: Path) -> None:
    for model_type, name in (("llama", "mlp.up_proj"), ("gpt2", "attn.c_attn.k")):
        blocks = rewrite(streamed(pico(model_type)), tmp_path / model_type)
        with blocks.open(0) as block:
            block.weight(name)[0] = 7.0
            committed = block.weight(name).clone()
            blocks.commit(block, block.params_of({name}))
        with blocks.stored(0) as stored:
            assert torch.equal(stored.weight(name), committed)
        with blocks.open(0) as source:
            assert not torch.equal(source.weight(name), committed)
