"""Writing: whole or absent, the same bytes for the same values, and errors that name the cause."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmprune.base.errors import CheckpointError, TooLarge
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import (
    append_line,
    copy_side_files,
    hash_file,
    shard_name,
    write_index,
    write_json,
    write_tensors,
)

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


def raising(error: Exception) -> object:
    def save(*args: object, **kwargs: object) -> None:
        raise error

    return save


def fail_half_way(tensors: object, file: str, metadata: object = None) -> None:
    Path(file).write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new" / "x.safetensors", TENSORS)
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.safetensors"]


def test_bytes_follow_from_names_and_values_alone(tmp_path: Path) -> None:
    write_tensors(tmp_path / "one", TENSORS)
    transposed = {"a": TENSORS["a"].clone(), "b": TENSORS["b"].T.contiguous().T}
    write_tensors(tmp_path / "two", transposed)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    write_tensors(tmp_path / "three", TENSORS | {"a": TENSORS["a"] + 1})
    assert hash_file(tmp_path / "one") != hash_file(tmp_path / "three")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    path = tmp_path / "x.safetensors"
    if existing:
        write_tensors(path, TENSORS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("safetensors.torch.save_file", fail_half_way)
    with pytest.raises(TooLarge, match=r"disk is full.*resume"):
        write_tensors(path, {"a": torch.zeros(1)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        write_json(tmp_path / "x.json", {"old": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", raising(OSError(5, "input/output error")))
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_json(tmp_path / "x.json", {"new": 2})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_full_disk_is_too_large_for_json_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    with pytest.raises(TooLarge, match="disk is full"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_lines_are_added_and_a_full_disk_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for line in ("one", "two"):
        append_line(log, line)
    assert log.read_text() == "one\ntwo\n"
    with pytest.raises(CheckpointError, match="cannot be written"):
        append_line(tmp_path / "none" / "log", "one")
    if Path("/dev/full").exists():
        with pytest.raises(TooLarge, match="disk is full"):
            append_line(Path("/dev/full"), "one")


def test_the_writer_s_own_word_for_a_full_disk_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    error = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("safetensors.torch.save_file", raising(error))
    with pytest.raises(TooLarge, match="disk is full"):
        write_tensors(tmp_path / "x.safetensors", TENSORS)


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, {}), lambda path: write_tensors(path, TENSORS)]
)
def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "file" / "x")


def test_the_index_is_sorted_and_complete(tmp_path: Path) -> None:
    write_index(tmp_path, {"b": "2", "a": "1", "c": "1"}, num_params=7, num_bytes=28)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    data = json.loads(text)
    assert list(data["weight_map"].items()) == [("a", "1"), ("b", "2"), ("c", "1")]
    assert data["metadata"] == {"total_parameters": 7, "total_size": 28}


def test_the_trunk_is_the_last_shard() -> None:
    names = [shard_name(index, 2) for index in (0, 1, -1)]
    assert names == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def test_small_files_travel_and_weights_and_code_of_others_do_not(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "llmprune").mkdir(parents=True)
    out.mkdir()
    kept = ["LICENSE", "chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".hidden",
            "pytorch_model.bin.index.json", "x.gguf", "x.pkl", "flax_model.msgpack"]  # fmt: skip
    for name in kept + left:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    copy_side_files(source, out)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == sorted(kept)


def test_a_link_out_of_a_checkpoint_is_refused(pico: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(pico("llama"), tmp_path / "model")
    (tmp_path / "secret").write_text("mine", encoding="utf-8")
    (tmp_path / "model" / "added_tokens.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is a link that leads out"):
        open_source(str(tmp_path / "model"))


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs(
    pico: Callable[..., Path], tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--me--x" / "snapshots" / "abc"
    shutil.copytree(pico("llama"), snapshot)
    blob = tmp_path / "models--me--x" / "blobs" / "123"
    blob.parent.mkdir()
    (snapshot / "tokenizer.json").rename(blob)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    assert open_source(str(snapshot)).folder == snapshot
