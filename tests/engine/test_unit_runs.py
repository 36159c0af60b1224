"""Whole runs that remove units: forms agree, results are pruned again, killed runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune import api
from llmprune.base.errors import CheckpointError
from llmprune.delivery.masks import MaskFiles
from llmprune.engine.records import Records
from llmprune.report.run import Report
from llmprune.walk import rewriting
from tests.conftest import pico_tokenizer
from tests.reference.shrinking import cached_tokens, load, logits, strengthen

Prune = Callable[..., Report]
DEEP = 4
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 64, "num_hidden_layers": DEEP, "pad_token_id": 0,
    "tie_word_embeddings": True, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a random model of four blocks."""
    home = tmp_path_factory.mktemp("deep")

    def folder_of(model_type: str = "llama") -> Path:
        folder = home / model_type
        if not folder.exists():
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **SIZES)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            strengthen(model).save_pretrained(folder)
            pico_tokenizer().save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture
def prune(tmp_path: Path, tokens: Tensor) -> Prune:
    def run(folder: Path, out: str = "out", **wishes: Any) -> Report:
        wishes = {"sparsity": 0.25, "device": "cpu", "dtype": "float32", "quiet": True, **wishes}
        return api.prune(str(folder), out=tmp_path / out, calib=tokens, **wishes)

    return run


def out_of(report: Report) -> Path:
    assert report.out is not None
    return report.out


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Return what a resumed run must give again: weights, index, config, masks."""
    files = [
        *folder.glob("*.safetensors*"),
        folder / "config.json",
        *folder.glob("llmprune/masks*"),
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def masks_of(folder: Path) -> dict[str, Tensor]:
    return MaskFiles(folder).of_block("")


FORMS: dict[str, dict[str, Any]] = {
    "both widths": {"method": "wanda-struct", "pattern": "ffn-channels+heads"},
    "query heads": {"method": "wanda-struct", "pattern": "query-heads", "sparsity": 0.1},
    "updates": {"method": "obspa", "pattern": "ffn-channels+heads"},
    "biases": {"method": "flap", "settings": ["prune.allocation=uniform"]},
    "filled up": {"method": "flap", "settings": ["prune.tier=E1", "prune.multiple=1"]},
    "blocks": {"method": "shortgpt"},
    "halves": {"method": "laptop"},
}


@pytest.mark.parametrize("name", FORMS)
def test_masked_and_shrunk_results_compute_the_same(
    source: Callable[..., Path], prune: Prune, tokens: Tensor, name: str
) -> None:
    wishes = dict(FORMS[name])
    others = wishes.pop("settings", [])
    small = prune(source(), "small", settings=others, **wishes)
    same = prune(source(), "same", settings=[*others, "prune.form=masked"], **wishes)
    assert small.data["gate"]["masked"]["passed"] and "same with a cache" in str(small.data["gate"])
    models = [load(out_of(report), trust_remote_code=name == "halves") for report in (small, same)]
    sizes = [sum(value.numel() for value in model.parameters()) for model in models]
    assert sizes[0] < sizes[1] or name == "filled up"
    one, two = (logits(model, tokens) for model in models)
    assert (one - two).abs().max() <= 1e-5 * two.abs().max()
    assert (two - logits(load(source()), tokens)).abs().max() > 1e-2 * two.abs().max()


def test_a_result_saved_by_hand_is_the_same_again(
    source: Callable[..., Path], prune: Prune, tmp_path: Path
) -> None:
    out = out_of(prune(source(), method="wanda-struct", pattern="ffn-channels+heads"))
    load(out, torch.float32).save_pretrained(tmp_path / "again")
    load(tmp_path / "again", torch.float32).save_pretrained(tmp_path / "third")
    first, again, third = (
        {name: value for file in sorted(folder.glob("*.safetensors"))
         for name, value in load_file(file).items()}
        for folder in (out, tmp_path / "again", tmp_path / "third")
    )  # fmt: skip
    assert first.keys() == again.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert config_of(tmp_path / "again")["intermediate_size"] == config_of(out)["intermediate_size"]


# A result is pruned again.


def test_channels_after_single_weights_leave_their_masks_in_place(
    source: Callable[..., Path], prune: Prune
) -> None:
    first = out_of(prune(source(), "first", method="wanda", sparsity=0.5))
    second = out_of(prune(first, "second", method="magnitude-struct", pattern="ffn-channels"))
    masks, before = masks_of(second), masks_of(first)
    model = load(second, torch.float32)
    assert masks.keys() == before.keys()
    for name, keep in masks.items():
        weight = model.get_submodule(name).weight
        assert keep.shape == weight.shape and not bool(weight[~keep].any())
        if "self_attn" in name:
            assert torch.equal(keep, before[name])
    kept = load_file(next((second / "llmprune").glob("masks-00001*")))
    units = kept["model.layers.0.ffn-channels"].long()
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(masks[name], before[name][:, units])
    assert torch.equal(
        masks["model.layers.0.mlp.up_proj"], before[name.replace("down", "up")][units]
    )


def test_heads_after_channels(source: Callable[..., Path], prune: Prune) -> None:
    first = out_of(prune(source(), "first", method="magnitude-struct", pattern="ffn-channels"))
    wishes: dict[str, Any] = {"method": "magnitude-struct", "pattern": "heads", "sparsity": 0.1}
    second = prune(first, "second", **wishes)
    config = config_of(out_of(second))
    assert config["intermediate_size"] == config_of(first)["intermediate_size"] < 64
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    load(out_of(second))


def test_channels_after_blocks(source: Callable[..., Path], prune: Prune) -> None:
    single = out_of(prune(source(), "single", method="magnitude", sparsity=0.3))
    first = out_of(prune(single, "first", method="shortgpt"))
    (gone,) = set(range(DEEP)) - set(MaskFiles(first).blocks or [])
    masks, before = masks_of(first), masks_of(single)
    stays = [index for index in range(DEEP) if index != gone]
    for place, index in enumerate(stays):
        name = "model.layers.{}.mlp.up_proj"
        assert torch.equal(masks[name.format(place)], before[name.format(index)])
    assert not any(name.startswith(f"model.layers.{DEEP - 1}.") for name in masks)
    wishes: dict[str, Any] = {"method": "magnitude-struct", "pattern": "ffn-channels"}
    second = out_of(prune(first, "second", **wishes))
    assert masks_of(second).keys() == masks.keys()
    assert len(load(second).model.layers) == DEEP - 1


# Results without some blocks.


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_result_says_which_blocks_went_and_touches_no_other(
    source: Callable[..., Path], prune: Prune, tokens: Tensor, model_type: str
) -> None:
    report = prune(source(model_type), method="shortgpt", sparsity=0.5)
    out = out_of(report)
    files = MaskFiles(out)
    assert files.blocks is not None and len(files.blocks) == DEEP // 2
    gone = sorted(set(range(DEEP)) - set(files.blocks))
    assert {name.split(".")[2] for name in files.lost} == {str(index) for index in gone}
    assert files.touched == set() and files.index == {}
    whole = load_file(source(model_type) / "model.safetensors")
    assert report.data["gate"]["untouched_equal"] == len(whole) - len(files.lost)
    model = load(out)
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    origins = files.origins(names)
    assert set(origins.values()) == set(whole) - set(files.lost)
    with_cache, without = (cached_tokens(model, tokens, 8, cached=c) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_a_kept_block_that_was_changed_does_not_pass_the_gate(
    source: Callable[..., Path], prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = rewriting.write_tensors

    def wrong(path: Path, tensors: dict[str, Tensor], **options: Any) -> None:
        write(path, {n: v * 2 if "q_proj" in n else v for n, v in tensors.items()}, **options)

    monkeypatch.setattr(rewriting, "write_tensors", wrong)
    with pytest.raises(CheckpointError, match="differs from the source although nothing was to"):
        prune(source(), method="shortgpt")


# Killed between blocks.


class Killed(BaseException):
    """Stands for a process that ends at once: nothing of ours catches it, nothing is tidied."""


def killed_at(nth: int, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until just before the n-th block is recorded."""
    write, calls = Records.write, 0

    def dying(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Killed
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "write", dying)
        with pytest.raises(Killed):
            run()


KILLED = [
    *("both widths", "filled up", "blocks"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("updates", "halves")),
]


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_ends_with_the_same_bytes(
    source: Callable[..., Path],
    prune: Prune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    whole = out_of(prune(source(), "whole", **FORMS[name]))
    killed_at(3, lambda: prune(source(), "killed", **FORMS[name]), monkeypatch)
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.partial").exists()
    resumed = prune(source(), "killed", **FORMS[name])
    assert resumed.data["resumed_after"] == 1
    assert bytes_of(out_of(resumed)) == bytes_of(whole)
