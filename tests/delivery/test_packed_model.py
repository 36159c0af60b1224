"""Packed models: zeros left out, every bit back, and damage told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmprune import cli
from llmprune.api import prune
from llmprune.base.errors import CheckpointError, RecipeError, WontLoad
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import open_folder
from llmprune.delivery import packed_model
from llmprune.delivery.packed_model import (
    BITS,
    KEPT,
    LIST,
    Parts,
    is_packed,
    load_packed,
    pack_model,
    pack_tensor,
    unpack_tensor,
    unpack_tensors,
)

Pico = Callable[..., Path]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def result(pico: Pico, home: Path, quick_gate: None) -> Callable[[str], Path]:
    """A pico result with half its weights removed, made once per family; never write into it."""

    def make(model_type: str) -> Path:
        out = home / model_type
        if not out.exists():
            prune(str(pico(model_type)), sparsity=0.5, method="magnitude", out=out, quiet=True,
                  device="cpu")  # fmt: skip
        return out

    return make


@pytest.fixture
def packed(result: Callable[[str], Path], tmp_path: Path) -> Path:
    """A packed pico llama that may be damaged."""
    pack_model(result("llama"), tmp_path / "packed")
    return tmp_path / "packed"


def bits_of(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


# Single tensors


def test_a_tensor_worked_by_hand() -> None:
    """Stored 3 and -1 of 0 3 0 -1 0: bits 01010, filled up to 01010000, which is 80."""
    parts = pack_tensor(torch.tensor([[0.0, 3.0, 0.0, -1.0, 0.0]]))
    assert parts.kept.tolist() == [3.0, -1.0] and parts.bits.tolist() == [80]
    assert unpack_tensor(parts, (1, 5)).tolist() == [[0.0, 3.0, 0.0, -1.0, 0.0]]


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0, float("inf"), float("nan")]), min_size=1),
    st.sampled_from(DTYPES),
)
def test_every_bit_comes_back(values: list[float], dtype: torch.dtype) -> None:
    value = torch.tensor(values, dtype=dtype)
    parts = pack_tensor(value)
    again = unpack_tensor(parts, tuple(value.shape))
    assert again.dtype == dtype and torch.equal(bits_of(again), bits_of(value))
    plus_zeros = sum(v == 0 and not torch.signbit(torch.tensor(v)) for v in values)
    assert parts.kept.numel() == len(values) - plus_zeros


def test_the_mask_decides_what_is_stored_where_it_fits() -> None:
    value = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    keep = torch.tensor([[True, True], [True, False]])
    assert pack_tensor(value, keep).kept.tolist() == [0.0, 1.0, 2.0], "a kept zero is stored"
    wrong = torch.tensor([[True, False], [True, True]])  # says removed where 1.0 stands
    for other in (wrong, keep[:1]):
        parts = pack_tensor(value, other)
        assert parts.kept.tolist() == [1.0, 2.0]
        assert torch.equal(unpack_tensor(parts, (2, 2)), value)


def test_values_and_bits_of_different_tensors_are_refused() -> None:
    parts = pack_tensor(torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="2 bits for 1 values"):
        unpack_tensor(Parts(parts.kept[:1], parts.bits), (3,))
    with pytest.raises(ValueError, match="takes 2 bytes"):
        unpack_tensor(parts, (9,))


# Whole results


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_result_comes_back_bit_for_bit_and_loads_stock(
    result: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    source = open_folder(result(model_type))
    found = pack_model(source.folder, tmp_path / "packed")
    tensors = unpack_tensors(tmp_path / "packed")
    assert tensors.keys() == source.entries.keys()
    for name, value in tensors.items():
        theirs = source.get([name])[name]
        assert value.dtype == theirs.dtype and value.shape == theirs.shape
        assert torch.equal(bits_of(value), bits_of(theirs)), name
    touched = json.loads((source.folder / "llmprune/masks.json").read_text())["touched"]
    assert found.num_packed == len(touched) > 0
    assert found.packed_after / found.packed_before == pytest.approx(1 / 2 + 1 / 32, abs=0.01)
    loaded = load_packed(tmp_path / "packed", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    assert type(loaded) is type(stock) and not loaded.training
    theirs = stock.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.state_dict().items())
    ids_BT = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, stock(ids_BT).logits)


def test_half_of_bfloat16_takes_nine_sixteenths(tmp_path: Path, quick_gate: None) -> None:
    """16 bits per weight become 8 of half the values and 1 of the mask."""
    prune("demo", sparsity=0.5, method="magnitude", out=tmp_path / "out", quiet=True, device="cpu")
    found = pack_model(tmp_path / "out", tmp_path / "packed")
    assert found.packed_after / found.packed_before == pytest.approx(9 / 16, abs=0.001)
    files = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert files == pytest.approx(found.bytes_after, rel=0.01)
    assert "(56.2%)" in found.text()
    assert found.to_dict()["bytes_before"] == open_source("demo").num_bytes


def test_a_packed_folder_has_the_small_files_and_no_stock_weights(
    packed: Path, result: Callable[[str], Path]
) -> None:
    names = {path.name for path in packed.iterdir()}
    assert {"config.json", "tokenizer.json", LIST, "llmprune"} <= names
    assert not [name for name in names if name.startswith(("model", "."))]
    assert {path.name for path in (packed / "llmprune").iterdir()} == {"report.json", "run.json"}
    assert is_packed(packed) and not is_packed(result("llama"))
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_packed_model_can_be_saved_as_an_ordinary_one(packed: Path, tmp_path: Path) -> None:
    load_packed(packed).save_pretrained(tmp_path / "plain")
    again = load_file(tmp_path / "plain" / "model.safetensors")
    ours = unpack_tensors(packed)
    assert again.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in again.items())


def test_the_dtype_and_the_generation_settings_are_those_of_the_folder(packed: Path) -> None:
    settings = json.loads((packed / "generation_config.json").read_text())
    settings["max_new_tokens"] = 7
    (packed / "generation_config.json").write_text(json.dumps(settings))
    assert load_packed(packed).generation_config.max_new_tokens == 7
    assert load_packed(packed, dtype=torch.bfloat16).dtype == torch.bfloat16


# What is refused


def test_a_model_without_masks_is_refused(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no masks\..*Give a masked result"):
        pack_model(pico("llama"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(
    result: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for out in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(RecipeError, match=r"is not empty\. Choose a new folder"):
            pack_model(result("llama"), out)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_overwriting_replaces_a_packed_folder_and_nothing_else(
    result: Callable[[str], Path], packed: Path, tmp_path: Path
) -> None:
    (packed / "old").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        pack_model(result("llama"), packed)
    pack_model(result("llama"), packed, overwrite=True)
    assert is_packed(packed) and not (packed / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(RecipeError, match="is no packed folder, and only one is replaced"):
        pack_model(result("llama"), tmp_path / "mine", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"packed", "mine"}


def test_the_command_packs_and_refuses_what_has_no_masks(
    result: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as left:
            cli.main(["export", *arguments, "--to", "packed", "--out", str(tmp_path / "out")])
        return int(left.value.code or 0)

    assert run(str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert run(str(result("llama"))) == 0
    assert "unpacks bit for bit" in capsys.readouterr().out and is_packed(tmp_path / "out")


def test_nothing_is_left_where_the_proof_fails(
    result: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(value: torch.Tensor, keep: Any = None) -> Parts:
        parts = pack_tensor(value, keep)
        return Parts(parts.kept.abs(), parts.bits)

    monkeypatch.setattr(packed_model, "pack_tensor", forgetful)
    with pytest.raises(CheckpointError, match="does not come out"):
        pack_model(result("llama"), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = sorted(folder.glob("packed-*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_damage_is_told(packed: Path, tmp_path: Path) -> None:
    def name_of(tensors: dict[str, torch.Tensor], end: str) -> str:
        return next(name for name in tensors if name.endswith(end))

    def damaged(change: Callable[[Path], object]) -> Path:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(packed, copy)
        change(copy)
        return copy

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        name = name_of(tensors, KEPT)
        tensors[name] = tensors[name][1:].clone()

    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda copy: (copy / LIST).unlink(), "is no packed model"),
        (lambda copy: (copy / LIST).write_text('{"format": 2}'), "format 2.*reads 1"),
        (lambda copy: next(copy.glob("packed-*")).unlink(), "packed files of the"),
        (lambda copy: edit(copy, lambda t: t.pop(name_of(t, BITS))), "which packed.json promises"),
        (lambda copy: edit(copy, shorten), "cannot be unpacked"),
        (lambda copy: next(copy.glob("packed-*")).write_bytes(b"12345678"), "truncated or damaged"),
    ]
    for change, words in cases:
        with pytest.raises(CheckpointError, match=words):
            unpack_tensors(damaged(change))


def test_tensors_that_do_not_make_the_model_are_refused(packed: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("layernorm.weight"))
        tensors[name.replace("layernorm", "layernorn")] = tensors.pop(name)

    edit(packed, rename)
    with pytest.raises(WontLoad, match=r"missing keys: .*layernorm.weight"):
        load_packed(packed)
