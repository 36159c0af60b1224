"""Writing that cannot be half done: shards, JSON and records, each whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, TooLarge
from llmprune.checkpoint.source import INDEX

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, settled: bool = True) -> None:
    """Write a safetensors file atomically; the bytes depend on names and values alone.

    Unless `settled`, the bytes may not have reached the disk yet: call `settle` before a record
    relies on them.

    Raises:
        TooLarge: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors makes private files
        save_file(contiguous, str(temporary), metadata={"format": "pt"})
        temporary.chmod(mode)
        os.replace(temporary, path)
        if settled:
            settle(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise write_failed(path, error) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically, keys in the given order.

    Raises:
        TooLarge: the disk is full.
        CheckpointError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(
            json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        settle(temporary)
        os.replace(temporary, path)
        settle(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise write_failed(path, error) from error


def append_line(path: Path, text: str) -> None:
    """Add a line to a file. A disk that fills may leave a part of it, without its end.

    Raises:
        TooLarge: the disk is full.
        CheckpointError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise write_failed(path, error) from error


def settle(path: Path) -> None:
    """Wait until a file's bytes and its name, or a folder's names, are on the disk."""
    for target in (path, path.parent) if path.is_file() else (path,):
        if os.name == "nt" and target.is_dir():
            continue  # Windows has no handle on a folder to wait for
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_failed(path: Path, error: Exception) -> TooLarge | CheckpointError:
    """Return the error for a failed write; a full disk is named as such."""
    if is_full(error):
        return TooLarge(
            f"the disk is full: {path} could not be written. What is finished stays in "
            f"{path.parent}; free some space and run the same command again to resume."
        )
    return CheckpointError(
        f"{path} cannot be written: {error}. Choose a writable folder with --out."
    )


def is_full(error: Exception) -> bool:
    """Tell whether an error is that of a full disk, by Python or by safetensors."""
    text = str(error)
    return getattr(error, "errno", None) == 28 or "No space left" in text or "os error 28" in text


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def shard_name(index: int, num_blocks: int) -> str:
    """Return the file of a block; index -1, the trunk, is the last shard.

    >>> shard_name(6, 32), shard_name(-1, 32)
    ('model-00007-of-00033.safetensors', 'model-00033-of-00033.safetensors')
    """
    number = num_blocks + 1 if index == -1 else index + 1
    return f"model-{number:05d}-of-{num_blocks + 1:05d}.safetensors"


def write_index(
    folder: Path, weight_map: Mapping[str, str], *, num_params: int, num_bytes: int
) -> None:
    """Write the index of a sharded checkpoint, tensors in sorted order."""
    data = {
        "metadata": {"total_parameters": num_params, "total_size": num_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(folder / INDEX, data)


HEAVY = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz"),
    *(".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".index.json"),
)
TEMPLATES = "additional_chat_templates"


def copy_side_files(source: Path, out: Path) -> None:
    """Copy tokenizer, templates, licence and other small files; weights and pickles stay behind."""
    for path in side_files(source):
        copy_file(path, out / path.relative_to(source))


def copy_file(path: Path, target: Path) -> None:
    """Copy a small file, and wait until it is on the disk."""
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        settle(target)
    except OSError as error:
        raise write_failed(target, error) from error


def side_files(source: Path) -> list[Path]:
    """Return what belongs to a checkpoint beside its weights, sorted."""
    files = [*source.iterdir(), *(source / TEMPLATES).glob("*")]
    return [
        path
        for path in sorted(files)
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(HEAVY)
    ]


def check_links(source: Path) -> None:
    """Check that no side file is a link out of its checkpoint; the Hub's cache links to its blobs.

    Raises:
        CheckpointError: one is: what it leads to would be copied, and might be published.
    """
    home = source.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for path in side_files(source):
        real = path.resolve()
        if home not in real.parents and cache not in real.parents:
            raise CheckpointError(
                f"{path} is a link that leads out of the checkpoint, to {real}. Put a copy of the "
                "file in its place if it belongs to the model, or remove the link."
            )
