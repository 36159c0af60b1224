"""A checkpoint with a smaller hidden size loads the stock way and computes what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.base.errors import NumericalError, UnsupportedModel
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import hash_file, shard_name
from llmprune.checkpoint.skeleton import build_skeleton, read_config
from llmprune.checkpoint.source import INDEX, SINGLE
from llmprune.delivery.gate import pass_gate
from llmprune.hidden.basis import principal_axes, top_channels
from llmprune.hidden.narrowing import open_narrowing, slice_checkpoint
from llmprune.hidden.proof import masked, prove_narrowing, random_rotation
from llmprune.hidden.residual import survey_residual
from llmprune.walk.forward import embed
from llmprune.walk.streamed import Streamed, stream

CPU = torch.device("cpu")
CHANNELS = torch.arange(32)[torch.arange(32) % 4 != 1]
BASES = {"rotation": random_rotation(32)[:, :24], "channels": CHANNELS}
Write = Callable[..., tuple[Any, Path]]


def opened(folder: Path, dtype: torch.dtype | None = torch.float32) -> Streamed:
    skeleton = build_skeleton(read_config(folder), dtype=torch.float32)
    return stream(open_source(str(folder)), skeleton, device=CPU, dtype=dtype)


@pytest.fixture
def written(traced: Callable[..., Any], tmp_path: Path, tokenizer: Any) -> Write:
    """Return a shaken model with what is known of it, and the folder that holds it."""

    def write(model_type: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        model, family, blueprint = traced(model_type, tied=tied)
        folder = tmp_path / "source"
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return (model.float(), family, blueprint), folder

    return write


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma", "mixtral", "qwen3_moe", "gpt_oss"]
)
def test_the_folder_is_the_large_model_with_zeros(
    written: Write, stock: Any, logits: Any, tokens: Tensor, tmp_path: Path,
    model_type: str, basis: str, tied: bool,
) -> None:  # fmt: skip
    (model, family, blueprint), folder = written(model_type, tied=tied)
    out = tmp_path / "out"
    found = slice_checkpoint(opened(folder), out, blueprint, BASES[basis])
    assert found.unties == (tied and basis == "rotation")
    small = stock(out)
    assert type(small) is type(model) and small.config.hidden_size == 24
    expected = logits(masked(model, family, blueprint, BASES[basis]), tokens)
    assert (logits(small, tokens) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    names = set(json.loads((out / INDEX).read_text())["weight_map"])
    head = {blueprint.head} if found.unties else set()
    assert names == set(open_source(str(folder)).entries) | head
    assert (out / "tokenizer.json").exists()


def test_it_passes_the_gate(written: Write, tmp_path: Path, quick_gate: None) -> None:
    (_, _, blueprint), folder = written("mixtral")
    out = tmp_path / "out"
    slice_checkpoint(opened(folder), out, blueprint, BASES["rotation"])
    assert pass_gate(out, device=CPU, dtype=torch.float32).agreement.passed


def test_a_run_cut_short_goes_on_with_the_same_bytes(
    written: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, _, blueprint), folder = written("qwen3_moe")
    basis = BASES["rotation"]
    first, again = tmp_path / "first", tmp_path / "again"
    slice_checkpoint(opened(folder), first, blueprint, basis)
    narrowing = open_narrowing(opened(folder), again, blueprint, basis)
    done = narrowing.commit(1)
    before = done.stat().st_mtime_ns
    slice_checkpoint(opened(folder, None), again, blueprint, basis, whole=lambda index: index == 1)
    assert done.stat().st_mtime_ns == before
    assert {p.name for p in first.iterdir()} == {p.name for p in again.iterdir()}
    for path in first.glob("*"):
        assert hash_file(path) == hash_file(again / path.name), path.name


def test_stored_dtypes_stay_and_what_is_off_the_stream_keeps_its_bits(
    written: Write, tmp_path: Path
) -> None:
    (_, _, blueprint), folder = written("qwen3", dtype=torch.bfloat16)
    tensors = load_file(folder / SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["rotary.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    out = tmp_path / "out"
    slice_checkpoint(opened(folder), out, blueprint, BASES["rotation"])
    for index in (0, 1, -1):
        for name, value in load_file(out / shard_name(index, 2)).items():
            source = tensors.get(name, tensors["model.embed_tokens.weight"])
            assert value.dtype == source.dtype, name
            if name.endswith(("q_norm.weight", "k_norm.weight", "inv_freq")):
                assert torch.equal(value, source)
    data = json.loads((out / "config.json").read_text())
    before = json.loads((folder / "config.json").read_text())
    changed = {"hidden_size", "rms_norm_eps", "tie_word_embeddings"}
    assert {key for key in data if data[key] != before.get(key)} == changed


@pytest.mark.parametrize("basis", BASES)
def test_a_head_of_its_own_beside_a_config_that_ties_stays_its_own(
    written: Write, stock: Any, logits: Any, tokens: Tensor, tmp_path: Path, basis: str
) -> None:
    (_, family, blueprint), folder = written("llama", tied=True)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    out = tmp_path / "out"
    assert not slice_checkpoint(opened(folder), out, blueprint, BASES[basis]).unties
    expected = logits(masked(stock(folder), family, blueprint, BASES[basis]), tokens)
    assert (logits(stock(out), tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_all_that_is_wrong_is_told_before_anything_is_written(
    written: Write, tmp_path: Path
) -> None:
    (_, _, blueprint), folder = written("llama")
    out = tmp_path / "out"
    with pytest.raises(UnsupportedModel, match="takes no hidden size 30"):
        slice_checkpoint(opened(folder), out, blueprint, torch.arange(30))
    assert not out.exists()
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj"):
        slice_checkpoint(opened(folder), out, blueprint, BASES["rotation"])


@pytest.mark.slow
def test_axes_beat_channels_and_both_beat_chance_on_the_demo(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from llmprune import perplexity
    from llmprune.calibration.selection import demo_file
    from llmprune.calibration.windows import tokenize_windows

    folder = open_source("demo").folder
    blueprint = prove_narrowing(read_config(folder))
    text = demo_file("calibration.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows, _ = tokenize_windows([text], tokenizer, num_samples=16, seq_len=512, seed=0)
    blocks = opened(folder)
    seen = survey_residual(blocks, embed(blocks, windows, 4), blueprint)
    bases = {
        "axes": principal_axes(seen.gram_DD)[0][:, :192],
        "channels": top_channels(seen.activity_D, 192),
        "chance": random_rotation(256)[:, :192],
    }
    found = {}
    for name, basis in bases.items():
        slice_checkpoint(blocks, tmp_path / name, blueprint, basis)
        found[name] = perplexity(str(tmp_path / name), data="demo", num_windows=24).value
    dense = perplexity("demo", num_windows=24).value
    assert dense < found["axes"] < 1.2 * dense < found["channels"] < found["chance"]
