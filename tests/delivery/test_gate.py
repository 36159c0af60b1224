"""The gate: sound folders pass it in a fresh process, and every kind of damage is found."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune.api import prune
from llmprune.base.errors import CheckpointError, WontLoad
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import INDEX
from llmprune.delivery import stock as stock_script
from llmprune.delivery.gate import Verdict, clean_scratch, gate_tokens, pass_gate

Pico = Callable[..., Path]
CPU = torch.device("cpu")


def gate(folder: Path, source: Path | None = None) -> Verdict:
    return pass_gate(
        folder,
        device=CPU,
        dtype=torch.float32,
        source=open_source(str(source)) if source else None,
    )


@pytest.fixture
def copied(pico: Pico, tmp_path: Path) -> Path:
    """A sharded pico llama that may be damaged."""
    shutil.copytree(pico("llama", sharded=True), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pruned(pico: Pico, tmp_path: Path, quick_gate: None) -> tuple[Path, Path]:
    """A finished result and its source."""
    source = pico("llama")
    prune(str(source), sparsity=0.5, method="magnitude", out=tmp_path / "out", quiet=True,
          device="cpu")  # fmt: skip
    return tmp_path / "out", source


def edit_shard_of(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("llama", "qwen3", "gpt2", "gemma3_text")
        ),
    ],
)
def test_an_untouched_model_passes_in_a_fresh_process(pico: Pico, model_type: str) -> None:
    folder = pico(model_type, sharded=True)
    before = sorted(path.name for path in folder.iterdir())
    verdict = gate(folder)
    assert verdict.agreement.passed and verdict.agreement.exact
    assert verdict.num_tensors == len(open_source(str(folder)).entries)
    assert verdict.masked_linears == 0 and verdict.untouched_equal is None
    assert sorted(path.name for path in folder.iterdir()) == before


def test_every_family_passes(pico: Pico, model_type: str, quick_gate: None) -> None:
    for tied in (True, False):
        assert gate(pico(model_type, tied=tied)).agreement.passed


def test_a_fresh_process_that_fails_is_told(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'KeyError: lm_head' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(WontLoad, match="does not load with from_pretrained: KeyError: lm_head"):
        gate(pico("llama"))
    assert not list(pico("llama").glob(".gate-*"))


def test_the_fresh_process_copies_code_to_a_place_that_goes(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$HF_MODULES_CACHE" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    home = pico("llama")
    with pytest.raises(WontLoad, match=rf"from_pretrained: {home.resolve()}/\.gate-\w+/modules"):
        gate(home)
    assert not list(home.glob(".gate-*"))


def test_a_removed_tensor_is_found(copied: Path, quick_gate: None) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_shard_of(copied, name, lambda tensors: tensors.pop(name))
    edit_json(copied / INDEX, lambda index: index["weight_map"].pop(name))
    with pytest.raises((WontLoad, CheckpointError), match=name):
        gate(copied)


def test_an_extra_tensor_is_found(pico: Pico, copied: Path, quick_gate: None) -> None:
    first, extra = "model.norm.weight", "model.layers.1.mlp.extra.weight"
    edit_shard_of(copied, first, lambda tensors: tensors.update({extra: torch.ones(2)}))
    edit_json(copied / INDEX, lambda i: i["weight_map"].update({extra: i["weight_map"][first]}))
    with pytest.raises((WontLoad, CheckpointError), match="extra"):
        gate(copied, pico("llama", sharded=True))


def test_an_extra_tensor_is_found_without_a_source(copied: Path, quick_gate: None) -> None:
    """Shrunk results are proven without their source; what is surplus must be found there too."""
    first, extra = "model.norm.weight", "model.layers.1.mlp.extra.weight"
    edit_shard_of(copied, first, lambda tensors: tensors.update({extra: torch.ones(2)}))
    edit_json(copied / INDEX, lambda i: i["weight_map"].update({extra: i["weight_map"][first]}))
    with pytest.raises(WontLoad, match="unexpected keys"):
        gate(copied)


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 48), ("num_hidden_layers", 3)])
def test_a_config_of_another_size_is_found(
    copied: Path, quick_gate: None, key: str, value: int
) -> None:
    edit_json(copied / "config.json", lambda config: config.update({key: value}))
    with pytest.raises((WontLoad, CheckpointError), match=r"config\.json"):
        gate(copied)


def test_a_model_that_computes_something_else_is_found(
    copied: Path, monkeypatch: pytest.MonkeyPatch, quick_gate: None
) -> None:
    """As if our walk ran the blocks differently from the stock forward."""
    monkeypatch.setattr("llmprune.delivery.gate.walk", lambda blocks, flow: None)
    with pytest.raises(WontLoad, match=r"logits differ.*largest logit"):
        gate(copied)


def test_a_finished_result_passes(pruned: tuple[Path, Path]) -> None:
    out, source = pruned
    verdict = gate(out, source)
    assert verdict.masked_linears == 14 and verdict.natural_zeros == 0
    assert verdict.untouched_equal == 6  # two norms in each block, the last norm, the embeddings


def test_a_removed_weight_that_came_back_is_found(pruned: tuple[Path, Path]) -> None:
    out, source = pruned
    name = "model.layers.1.mlp.down_proj.weight"

    def revive(tensors: dict[str, Tensor]) -> None:
        row, column = (tensors[name] == 0).nonzero()[0].tolist()
        tensors[name][row, column] = 1e-8

    edit_shard_of(out, name, revive)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj has weights where"):
        gate(out, source)


def test_a_kept_weight_that_became_zero_is_counted(pruned: tuple[Path, Path]) -> None:
    out, source = pruned
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = 0

    def erase(tensors: dict[str, Tensor]) -> None:
        nonlocal zeros
        zeros = int((tensors[name][0] != 0).sum())
        tensors[name][0] = 0

    edit_shard_of(out, name, erase)
    assert gate(out, source).natural_zeros == zeros > 0


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_an_untouched_tensor_that_changed_is_found(pruned: tuple[Path, Path], name: str) -> None:
    out, source = pruned

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int32)[0] += 1  # by one bit

    edit_shard_of(out, name, nudge)
    with pytest.raises(CheckpointError, match=f"{name} differs from the source"):
        gate(out, source)


def test_the_sign_of_a_zero_counts_as_a_change(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    """Equality of floats would miss it; the promise is bit for bit."""
    out, source = pruned
    name = "model.norm.weight"
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name][0] = 0.0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    edit_shard_of(out, name, lambda stored: stored[name].__setitem__(0, -0.0))
    with pytest.raises(CheckpointError, match=f"{name} differs from the source"):
        gate(out, copy)


def test_gate_tokens_are_fixed_and_fit_the_model(
    pico: Pico, make_model: Callable[..., Any], model_type: str
) -> None:
    config = make_model(model_type).config
    tokens = gate_tokens(config)
    assert tokens.shape == (2, 64) and tokens.min() >= 0 and tokens.max() < 64
    assert torch.equal(tokens, gate_tokens(config))


def test_scratch_of_a_killed_gate_is_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".gate-abc").mkdir()
    (tmp_path / ".gate-abc" / "ours.safetensors").write_text("x")
    (tmp_path / "config.json").write_text("{}")
    clean_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_logits_that_are_no_numbers_prove_nothing(copied: Path, quick_gate: None) -> None:
    edit_shard_of(copied, "model.norm.weight", lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(WontLoad, match="its logits are NaN or infinite, so nothing is proven"):
        gate(copied)


def answers(monkeypatch: pytest.MonkeyPatch, *faults: str | None) -> list[bool]:
    """Let the stock script meet these faults, one per start; return how it was told to load."""
    told: list[bool] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        told.append(json.loads(Path(command[2]).read_text())["on_disk"])
        fault = faults[len(told) - 1]
        if fault == "fails":
            return subprocess.CompletedProcess(command, 1, "", "NotImplementedError: meta")
        stock_script.main(command[2])
        if fault == "differs":
            path = Path(command[2]).parent / "stock.safetensors"
            save_file({"logits": load_file(path)["logits"] + 1.0}, path)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("llmprune.delivery.gate.subprocess.run", run)
    return told


@pytest.mark.parametrize("fault", ["fails", "differs"])
def test_a_model_that_cannot_leave_its_weights_on_disk_is_loaded_whole(
    fault: str, pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answers(monkeypatch, fault, None)
    assert gate(pico("llama")).agreement.passed
    assert told == [True, False]


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        (("fails", "fails"), "does not load with from_pretrained: NotImplementedError: meta"),
        (("differs", "differs"), "its logits differ"),
        (("differs", "fails"), "its logits differ"),
    ],
)
def test_what_is_wrong_in_both_ways_is_refused(
    faults: tuple[str, str], words: str, pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answers(monkeypatch, *faults)
    with pytest.raises(WontLoad, match=words):
        gate(pico("llama"))
    assert told == [True, False]


def test_a_model_larger_than_memory_is_not_loaded_whole(
    pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answers(monkeypatch, "fails")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(WontLoad, match="does not load"):
        gate(pico("llama"))
    assert told == [True]
