"""Opening checkpoints: what is read, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune.base.errors import CheckpointError, TooLarge, UnsupportedModel
from llmprune.checkpoint import source as source_module
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.skeleton import read_config
from llmprune.checkpoint.source import INDEX, SINGLE, check_free_space

Pico = Callable[..., Path]


@pytest.fixture
def copy_of(pico: Pico, tmp_path: Path) -> Callable[..., Path]:
    """Copy a pico checkpoint, so that a test may damage it."""

    def copy(**options: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(pico("llama", **options), folder)
        return folder

    return copy


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_is_found_and_read(pico: Pico, sharded: bool) -> None:
    folder = pico("llama", sharded=sharded)
    source = open_source(str(folder))
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    expected = {name: value for file in files for name, value in load_file(file).items()}
    assert source.entries.keys() == expected.keys()
    found = source.get(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert source.entries[name].shape == tuple(value.shape)
        assert source.entries[name].dtype == "F32"
    assert source.num_bytes == sum(value.numel() * 4 for value in expected.values())


def test_edits_of_what_was_read_do_not_reach_the_file(pico: Pico) -> None:
    source = open_source(str(pico("llama")))
    name = "model.norm.weight"
    source.get([name])[name].zero_()
    assert source.get([name])[name].abs().sum() > 0


def test_the_single_file_wins_over_an_index(copy_of: Callable[..., Path]) -> None:
    """As in transformers; otherwise we would prune weights that nobody loads."""
    folder = copy_of(sharded=True)
    everything = {n: v for f in folder.glob("*.safetensors") for n, v in load_file(f).items()}
    save_file(
        {name: value + 1 for name, value in everything.items()},
        folder / SINGLE,
        metadata={"format": "pt"},
    )
    source = open_source(str(folder))
    assert {entry.file for entry in source.entries.values()} == {SINGLE}


@pytest.mark.parametrize(
    "target",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "a\\b.safetensors", ""],
)
def test_an_index_that_leaves_its_folder_is_refused(
    copy_of: Callable[..., Path], target: str
) -> None:
    folder = copy_of(sharded=True)
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "x.safetensors")
    edit_index(folder, lambda rows: rows.update({next(iter(rows)): target}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_source(str(folder))


def test_an_index_that_points_to_a_pickle_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(sharded=True)
    edit_index(folder, lambda rows: rows.update({next(iter(rows)): "pytorch_model.bin"}))
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        open_source(str(folder))


def test_a_missing_shard_is_named(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(sharded=True)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing"):
        open_source(str(folder))


def test_a_promise_that_the_shard_does_not_keep_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of(sharded=True)
    first = sorted(folder.glob("*.safetensors"))[0].name
    edit_index(folder, lambda rows: rows.update({"model.layers.9.x.weight": first}))
    with pytest.raises(CheckpointError, match=r"promises tensor model\.layers\.9\.x\.weight"):
        open_source(str(folder))


@pytest.mark.parametrize("index", ['{"metadata": {}}', '{"weight_map": []}', "[1]", "{", "\xff"])
def test_a_broken_index_is_refused(copy_of: Callable[..., Path], index: str) -> None:
    folder = copy_of(sharded=True)
    (folder / INDEX).write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError, match="index"):
        open_source(str(folder))


@pytest.mark.parametrize("size", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_noticed_at_opening(copy_of: Callable[..., Path], size: int) -> None:
    folder = copy_of()
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_source(str(folder))


def test_a_header_longer_than_the_file_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    data = (folder / SINGLE).read_bytes()
    for length in (len(data), 2**40, 2**64 - 1):
        (folder / SINGLE).write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(CheckpointError, match="header of"):
            open_source(str(folder))


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


LIES = pytest.mark.parametrize(
    ("field", "value"),
    [("shape", [31]), ("dtype", "F16"), ("data_offsets", [0, 4]), ("shape", [-32]), ("shape", 32)],
)


@LIES
def test_no_tensor_is_handed_out_from_a_header_that_contradicts_itself(
    copy_of: Callable[..., Path], field: str, value: object
) -> None:
    folder = copy_of()
    rewrite_header(folder / SINGLE, lambda rows: rows["model.norm.weight"].update({field: value}))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_source(str(folder)).get(["model.norm.weight"])


@LIES
def test_a_header_that_contradicts_itself_is_noticed_at_opening(
    copy_of: Callable[..., Path], field: str, value: object
) -> None:
    """Fail before the first shard is read: the plan's sizes come from the headers."""
    folder = copy_of()
    rewrite_header(folder / SINGLE, lambda rows: rows["model.norm.weight"].update({field: value}))
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        open_source(str(folder))


def test_a_header_that_is_no_table_is_refused(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    for text in (b"[]", b"{", b'{"a": 1}'):
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CheckpointError, match="damaged"):
            open_source(str(folder))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", "never read"),
        ("model.gguf", "GGUF"),
        ("adapter_config.json", "PEFT adapter"),
        ("readme.md", "download is incomplete"),
    ],
)
def test_what_a_folder_is_instead(tmp_path: Path, file: str, words: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "words"), [("model.gguf", "GGUF"), ("adapter_config.json", "PEFT")]
)
def test_adapters_and_gguf_are_recognised_without_config(
    tmp_path: Path, file: str, words: str
) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=words):
        open_source(str(tmp_path))


def test_an_adapter_with_weights_is_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="Merge it into its base model"):
        open_source(str(tmp_path))


def test_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        open_source(str(tmp_path))


def test_a_missing_config_is_named(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_config_that_is_no_json_object_is_refused(
    copy_of: Callable[..., Path], text: str
) -> None:
    folder = copy_of()
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_config_names_its_method(copy_of: Callable[..., Path], method: str) -> None:
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=rf"quantised \({method}\)"):
        read_config(folder)


def test_a_file_and_a_missing_folder_are_told_apart(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    with pytest.raises(CheckpointError, match="is a file"):
        open_source(str(folder / SINGLE))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source(str(folder / "absent"))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_source("./absent")


def test_the_fingerprint_follows_config_and_weights(copy_of: Callable[..., Path]) -> None:
    folder = copy_of()
    first = open_source(str(folder)).fingerprint()
    assert open_source(str(folder)).fingerprint() == first
    data = bytearray((folder / SINGLE).read_bytes())
    data[-1] ^= 1
    (folder / SINGLE).write_bytes(data)
    second = open_source(str(folder)).fingerprint()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert len({first, second, open_source(str(folder)).fingerprint()}) == 3


def test_opening_reads_headers_only(
    pico: Pico, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[int] = []
    header = source_module.read_header
    monkeypatch.setattr(source_module, "read_header", lambda path: read.append(1) or header(path))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    open_source(str(pico("llama")))
    assert read


def test_a_disk_without_room_is_too_large(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="result needs 1000 PB"):
        check_free_space(tmp_path / "not" / "there", 10**18, "the result")
    check_free_space(tmp_path, 1, "the result")
