"""Streaming a checkpoint computes what the stock model computes, one block in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune.base.errors import CheckpointError
from llmprune.checkpoint.skeleton import build_skeleton, read_config
from llmprune.checkpoint.source import SINGLE, open_folder
from llmprune.walk.forward import embed, logits, walk
from llmprune.walk.resident import in_memory
from llmprune.walk.streamed import Streamed, stream

Pico = Callable[..., Path]
Stock = Callable[[Path], Any]
Open = Callable[..., Streamed]


def streamed_logits(
    blocks: Any, tokens_NT: Tensor, micro_batch: int = 4, chunk: int | None = None
) -> Tensor:
    flow = embed(blocks, tokens_NT, micro_batch)
    walk(blocks, flow)
    rows: dict[int, list[Tensor]] = {}
    for batch, start, part in logits(blocks, flow, chunk=chunk):
        assert start == sum(each.shape[1] for each in rows.get(batch, []))
        rows.setdefault(batch, []).append(part)
    return torch.cat([torch.cat(parts, dim=1) for parts in rows.values()])


@torch.no_grad()
def stock_logits(model: Any, tokens_NT: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return found


@pytest.mark.parametrize(("tied", "sharded"), [(True, False), (False, True)])
def test_streamed_logits_are_the_stock_model_s(
    pico: Pico, stock: Stock, streamed: Open, tokens: Tensor, model_type: str,
    tied: bool, sharded: bool,
) -> None:  # fmt: skip
    folder = pico(model_type, tied=tied, sharded=sharded)
    expected = stock_logits(stock(folder), tokens)
    found = streamed_logits(streamed(folder), tokens)
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_chunks_and_micro_batches_change_nothing(
    pico: Pico, streamed: Open, tokens: Tensor, model_type: str
) -> None:
    blocks = streamed(pico(model_type))
    whole = streamed_logits(blocks, tokens, micro_batch=6)
    for micro_batch, chunk in ((1, 7), (4, 1), (6, 23)):
        found = streamed_logits(blocks, tokens, micro_batch, chunk)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_a_walk_leaves_nothing_behind_and_can_be_repeated(
    pico: Pico, streamed: Open, tokens: Tensor, model_type: str
) -> None:
    blocks = streamed(pico(model_type, tied=False))
    first = streamed_logits(blocks, tokens)
    assert all(value.is_meta for value in blocks.model.parameters())
    assert torch.equal(streamed_logits(blocks, tokens), first)


def real(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.is_meta}


def test_one_block_is_real_at_a_time(pico: Pico, streamed: Open, model_type: str) -> None:
    blocks = streamed(pico(model_type))
    assert real(blocks.model) == set()
    for index in range(len(blocks)):
        prefix = blocks.skeleton.prefix(index)
        with blocks.open(index) as block:
            inside = {prefix + name for name, _ in block.module.named_parameters()}
            assert real(blocks.model) == inside
        assert real(blocks.model) == set()


def test_a_block_is_freed_after_an_error(pico: Pico, streamed: Open) -> None:
    blocks = streamed(pico("llama"))
    with pytest.raises(ZeroDivisionError), blocks.open(0):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), blocks.trunk(head=True):
        raise ZeroDivisionError
    assert real(blocks.model) == set()


@pytest.mark.parametrize("tied", [True, False])
def test_entrance_and_head_bring_what_they_need(
    pico: Pico, streamed: Open, model_type: str, tied: bool
) -> None:
    blocks = streamed(pico(model_type, tied=tied))
    model = blocks.model
    for head in (False, True):
        with blocks.trunk(head=head):
            table, exit_ = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            assert (table is exit_) == tied
            assert table.is_meta == (head and not tied)
            assert exit_.is_meta == (not head and not tied)
            inside = blocks.skeleton.family.blocks
            assert not any(name.startswith(inside) for name in real(model))
        assert real(model) == set()


def test_weights_seen_are_those_of_the_file(pico: Pico, stock: Stock, streamed: Open) -> None:
    folder = pico("gpt2")
    c_attn = stock(folder).transformer.h[1].attn.c_attn.weight
    with streamed(folder).open(1) as block:
        assert torch.equal(block.weight("attn.c_attn.k"), c_attn[:, 32:64].T)
        block.weight("attn.c_attn.k").zero_()
        assert block.module.attn.c_attn.weight[:, 32:64].abs().sum() == 0
        assert torch.equal(block.weight("attn.c_attn.v"), c_attn[:, 64:].T)
    with streamed(folder).open(1) as block:  # the file is as it was
        assert torch.equal(block.weight("attn.c_attn.k"), c_attn[:, 32:64].T)


@pytest.fixture
def copied(pico: Pico, tmp_path: Path) -> Callable[[str], Path]:
    def copy(model_type: str) -> Path:
        shutil.copytree(pico(model_type), tmp_path / "model")
        return tmp_path / "model"

    return copy


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
    ],
)
def test_a_missing_tensor_is_named_before_any_is_read(
    copied: Callable[[str], Path], streamed: Open, model_type: str, name: str
) -> None:
    folder = copied(model_type)
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match="holds no tensor for"):
        streamed(folder)


def test_a_missing_expert_is_named_before_any_is_read(
    copied: Callable[[str], Path], streamed: Open
) -> None:
    """The parameter is covered by the others, but it would stack fewer than the config says."""
    folder = copied("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError):
        streamed(folder)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("llama", "model.norm.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    copied: Callable[[str], Path], streamed: Open, model_type: str, name: str
) -> None:
    folder = copied(model_type)
    edit_tensors(folder, lambda t: t.update({name: t[name][: len(t[name]) // 2].clone()}))
    with pytest.raises(CheckpointError, match="shape"):
        streamed(folder)


def test_a_config_of_another_size_is_refused(copied: Callable[[str], Path], streamed: Open) -> None:
    folder = copied("llama")
    config = json.loads((folder / "config.json").read_text())
    for key, value, words in (
        ("intermediate_size", 48, "shape"),
        ("num_hidden_layers", 3, "holds no tensor"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=words):
            streamed(folder)


def test_a_resident_model_is_walked_in_place_and_left_as_it_was(
    make_model: Callable[..., Any], tokens: Tensor, model_type: str
) -> None:
    model = make_model(model_type).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = model.config._experts_implementation
    with in_memory(model) as blocks:
        assert not model.training
        found = streamed_logits(blocks, tokens)
    assert model.training
    assert model.config._experts_implementation == experts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = stock_logits(model.eval(), tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_head_stored_beside_the_embeddings_it_is_tied_to_is_its_own(
    pico: Pico, tmp_path: Path, tokens: Tensor
) -> None:
    source = shutil.copytree(pico("llama", tied=True), tmp_path / "model")
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * 2 + 0.1
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(source)(input_ids=tokens).logits
    config = read_config(source)
    blocks = stream(
        open_folder(source),
        build_skeleton(config, dtype=torch.float32),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    flow = embed(blocks, tokens, len(tokens))
    walk(blocks, flow)
    found = torch.cat([part for _, _, part in logits(blocks, flow)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_logits_that_are_not_read_to_the_end_leave_gradients_as_they_are(
    pico: Pico, make_model: Callable[[str], Any]
) -> None:
    """Two models side by side: the first ends, the second is left where it is."""
    tokens_NT = torch.arange(16).view(2, 8)
    with in_memory(make_model("llama")) as blocks, in_memory(make_model("llama")) as others:
        flow, other = embed(blocks, tokens_NT, 1), embed(others, tokens_NT, 1)
        first, second = logits(blocks, flow), logits(others, other)
        for _ in zip(first, second, strict=False):
            assert torch.is_grad_enabled()
        second.close()  # type: ignore[attr-defined]
        assert torch.is_grad_enabled()
        assert not next(logits(blocks, flow))[2].requires_grad
    assert torch.is_grad_enabled()
