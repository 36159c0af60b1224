"""A checkpoint with fewer tokens computes for them what it did, loads stock, and says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Tokenizer

from llmprune.base.errors import CheckpointError, UnsupportedModel
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import read_json
from llmprune.delivery.gate import pass_gate
from llmprune.vocabulary.agreement import round_trip
from llmprune.vocabulary.choosing import choose_tokens, count_texts
from llmprune.vocabulary.contents import merges_of, model_tokens
from llmprune.vocabulary.required import required_ids
from llmprune.vocabulary.rewriting import prune_vocabulary

KEPT = [0, 1, 2, 3, *range(10, 20), 31, *range(40, 57)]  # 32 of 64, with those configs name


def changed_copy(folder: Path, out: Path, name: str, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    data = read_json(out / name) if (out / name).exists() else {}
    (out / name).write_text(json.dumps(data | changes))
    return out


@pytest.mark.parametrize(
    ("model_type", "tied", "rows"),
    [
        ("llama", True, {"model.embed_tokens.weight"}),
        ("llama", False, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt2", True, {"transformer.wte.weight"}),
        ("phi", False, {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}),
        ("gemma3_text", True, {"model.embed_tokens.weight"}),
        ("mixtral", False, {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_kept_tokens_have_the_logits_that_they_had(
    pico: Callable[..., Path],
    stock: Callable[[Path], Any],
    tmp_path: Path,
    model_type: str,
    tied: bool,
    rows: set[str],
) -> None:
    folder = pico(model_type, tied=tied)
    found = prune_vocabulary(open_source(str(folder)), tmp_path / "out", KEPT)
    assert (set(found.sliced), found.num_before, found.num_kept) == (rows, 64, 32)
    ids_NT = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    kept_K = torch.tensor(KEPT)
    with torch.no_grad():
        before = stock(folder)(kept_K[ids_NT]).logits[..., kept_K]
        after = stock(tmp_path / "out")(ids_NT).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("sharded", [True, False])
def test_all_other_tensors_are_the_sources_bit_for_bit(
    pico: Callable[..., Path], tmp_path: Path, sharded: bool
) -> None:
    source = open_source(str(pico("llama", tied=False, sharded=sharded)))
    found = prune_vocabulary(source, tmp_path, KEPT)
    written = open_source(str(tmp_path))
    assert written.entries.keys() == source.entries.keys()
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    for name, entry in source.entries.items():
        assert written.entries[name].file == entry.file
        before, after = source.get([name])[name], written.get([name])[name]
        assert torch.equal(before[KEPT] if name in found.sliced else before, after), name


@pytest.mark.usefixtures("quick_gate")
def test_the_result_passes_the_gate(pico: Callable[..., Path], tmp_path: Path) -> None:
    prune_vocabulary(open_source(str(pico("llama"))), tmp_path, KEPT)
    assert pass_gate(tmp_path, device=torch.device("cpu"), dtype=torch.float32).agreement.passed


def test_configs_and_added_tokens_are_renumbered(pico: Callable[..., Path], tmp_path: Path) -> None:
    asked = {"eos_token_id": [1, 31], "suppress_tokens": [10, 56], "max_new_tokens": 31}
    name = "generation_config.json"
    source = changed_copy(pico("llama"), tmp_path / "source", name, **asked)
    (source / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "</s>": 1}))
    for stale in ("tokenizer.model", "vocab.json", "merges.txt"):
        (source / stale).write_text("stale")
    (source / "LICENSE").write_text("free")
    out = tmp_path / "out"
    found = prune_vocabulary(open_source(str(source)), out, KEPT)
    changed = read_json(out / name)
    assert (changed["eos_token_id"], changed["suppress_tokens"]) == ([1, 14], [4, 31])
    assert changed["max_new_tokens"] == 31
    assert read_json(out / "config.json")["vocab_size"] == 32
    assert read_json(out / "added_tokens.json") == {"<unk>": 0, "</s>": 1}
    assert found.removed == ("merges.txt", "tokenizer.model", "vocab.json")
    assert not any((out / name).exists() for name in found.removed)
    assert (out / "LICENSE").read_text() == "free"
    assert set(found.renumbered) == {
        "added_tokens.json", "config.json", name, "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = pico("llama"), tmp_path / "out"
    source = open_source(str(folder))
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        prune_vocabulary(source, folder, KEPT)
    with pytest.raises(UnsupportedModel, match=r"token 64 cannot be kept: .* has 64 ids"):
        prune_vocabulary(source, out, [*KEPT, 64])
    with pytest.raises(UnsupportedModel, match=r"config.json: bos_token_id names token 1"):
        prune_vocabulary(source, out, [0, *KEPT[2:]])
    second = changed_copy(folder, tmp_path / "second", "config.json", x_vocab_size=7)
    with pytest.raises(UnsupportedModel, match="x_vocab_size is 7"):
        prune_vocabulary(open_source(str(second)), out, KEPT)
    bare = changed_copy(folder, tmp_path / "bare", "x.json")
    (bare / "tokenizer.json").rename(bare / "tokenizer.model")
    with pytest.raises(UnsupportedModel, match=r"no tokenizer.json, .*\.save_pretrained"):
        prune_vocabulary(open_source(str(bare)), out, KEPT)
    assert not out.exists()


def test_a_tensor_that_may_be_a_second_head_is_refused(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    source = changed_copy(pico("llama"), tmp_path / "source", "x.json")
    tensors = load_file(source / "model.safetensors")
    tensors["draft.head"] = torch.zeros(64, 8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"draft\.head follows the vocabulary"):
        prune_vocabulary(open_source(str(source)), tmp_path / "out", KEPT)


def test_weights_of_another_model_are_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    source = changed_copy(pico("llama"), tmp_path / "source", "config.json", vocab_size=65)
    with pytest.raises(CheckpointError, match=r"shape \[64, 32\], but config.json makes it"):
        prune_vocabulary(open_source(str(source)), tmp_path / "out", KEPT)


def test_the_demo_model_reads_its_calibration_text_with_half_the_tokens(
    stock: Callable[[Path], Any], tmp_path: Path
) -> None:
    source = open_source("demo")
    text = (source.folder.parent / "calibration.txt").read_text(encoding="utf-8")[:60_000]
    old = AutoTokenizer.from_pretrained(source.folder)
    counts_V = count_texts([text], old, num_ids=4096)
    data = read_json(source.folder / "tokenizer.json")
    kept = choose_tokens(data, counts_V, num_kept=2048, required=required_ids(source.folder, old))
    prune_vocabulary(source, tmp_path, kept)
    new = AutoTokenizer.from_pretrained(tmp_path)
    assert len(kept) == len(new) == 2048
    found = round_trip(old, new, [text, "日本 £ \t 0123456789 <|eos|> x"])
    assert found.tokens_before < found.tokens_after < 1.25 * found.tokens_before
    ids = new(text)["input_ids"]
    assert new.decode(ids) == "<|bos|>" + text and max(ids) < 2048
    keeps = set(new.get_vocab())
    words = [word for word in sorted(set(text.split())) if set(old.tokenize(word)) <= keeps]
    assert len(words) > 100
    assert all(new.tokenize(word) == old.tokenize(word) for word in words)
    model = stock(tmp_path)
    assert model.get_input_embeddings().weight.shape == (2048, 256)
    assert model.config.eos_token_id == new.eos_token_id == 1


def test_a_tokenizer_class_that_has_files_of_its_own_reads_the_result(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    data = read_json(open_source("demo").folder / "tokenizer.json")
    vocab = {token: index for token, index in model_tokens(data).items() if index < 300}
    merges = [pair for pair in merges_of(data) if "".join(pair) in vocab]
    vocab["<|endoftext|>"] = 300
    source = changed_copy(pico("gpt2"), tmp_path / "source", "config.json", vocab_size=301)
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.randn(301, 32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    old = GPT2Tokenizer(vocab=vocab, merges=merges)
    old.save_pretrained(source)
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    text = "the hat and the heat <|endoftext|> then"
    counts_V = count_texts([text], old, num_ids=301)
    data = read_json(source / "tokenizer.json")
    kept = choose_tokens(
        data, counts_V, num_kept=280, multiple=1, required=required_ids(source, old)
    )
    prune_vocabulary(open_source(str(source)), tmp_path / "out", kept)
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(new) is type(AutoTokenizer.from_pretrained(source)) is GPT2Tokenizer
    assert len(new) == 280 and new.eos_token_id == kept.index(300)
    assert round_trip(old, new, [text]).num_changed == 0
