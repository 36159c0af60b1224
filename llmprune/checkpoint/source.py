"""A checkpoint as a table of lazy tensors, and how a local folder becomes one.

Only headers are read before the first `get`. Names of files in an index are untrusted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, TooLarge
from llmprune.base.progress import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
MAX_HEADER = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies: file name, dtype (safetensors' name) and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_params(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_params * DTYPE_BYTES.get(self.dtype, 4)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint: its folder of small files, its tensors, and how a shard becomes local."""

    name: str
    folder: Path
    entries: Mapping[str, Entry]
    revision: str | None = None
    fetch: Callable[[str], Path] | None = field(default=None, repr=False)

    def path(self, file: str) -> Path:
        """Return the local path of a shard, fetching it first where the source is remote."""
        return self.fetch(file) if self.fetch else self.folder / file

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors as lazily mapped, copy-on-write CPU tensors.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            path = self.path(file)
            try:
                with safe_open(str(path), "pt") as handle:
                    found.update({name: handle.get_tensor(name) for name in wanted})
            except (SafetensorError, OSError) as error:
                raise damaged(path, str(error)) from error
        return found

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())

    def config(self) -> dict[str, Any]:
        """Return config.json as plain data."""
        return read_json(self.folder / "config.json")

    def fingerprint(self) -> str:
        """Return a hash of config, headers, and 64 pages and the size of every local shard.

        A copy elsewhere has the same one. Hub sources are identified by commit, which fixes their
        bytes.

        Raises:
            CheckpointError: a shard is gone, or cannot be read.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name in sorted(self.entries):
            entry = self.entries[name]
            digest.update(f"{name} {entry.file} {entry.dtype} {entry.shape}".encode())
        if self.revision:
            digest.update(f"{self.name}@{self.revision}".encode())
            return digest.hexdigest()
        for path in self._shards():
            for page in _pages(path):
                digest.update(page)
        return digest.hexdigest()

    def last_change(self) -> int | None:
        """Return when a local shard last changed, in nanoseconds: what a resumed run relies on.

        None for Hub sources, whose commit says it.
        """
        return None if self.revision else max(path.stat().st_mtime_ns for path in self._shards())

    def _shards(self) -> list[Path]:
        return [self.folder / file for file in sorted({e.file for e in self.entries.values()})]


def _pages(path: Path) -> Iterator[bytes]:
    """Yield the size of a shard, then 64 of its pages, from the first to the last."""
    try:
        size = path.stat().st_size
        yield f"{size}".encode()
        with path.open("rb") as handle:
            for page in range(64):
                handle.seek(max(0, size - 4096) * page // 63)
                yield handle.read(4096)
    except OSError as error:
        raise damaged(path, str(error)) from error


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a shard that cannot be read."""
    if not path.exists():
        return CheckpointError(
            f"shard {path.name} is missing from {path.parent}. The index names it, so the copy or "
            "download is incomplete; fetch the file again."
        )
    return CheckpointError(
        f"{path} is not a readable safetensors file ({reason}). It is truncated or damaged; "
        "fetch it again."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Check its disk and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or nested too deeply
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, expected a JSON object.")
    return data


def open_folder(folder: Path, *, name: str | None = None) -> Source:
    """Open a local folder; single or sharded safetensors.

    Raises:
        CheckpointError: the folder is empty, damaged, hostile or without safetensors.
    """
    if not (folder / "config.json").is_file():
        raise _no_config(folder)
    read_json(folder / "config.json")
    shards = shard_names(folder)
    entries: dict[str, Entry] = {}
    for file in shards:
        entries.update(read_header(folder / file))
    check_index(folder, entries)
    return Source(name=name or str(folder), folder=folder, entries=entries)


def shard_names(folder: Path) -> list[str]:
    """Return the safetensors files of a checkpoint; the single file wins, as in transformers."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX} has no weight_map; fetch it again.")
        return sorted({safe_name(str(file), folder) for file in weight_map.values()})
    raise no_weights(folder.name, [path.name for path in folder.iterdir()], str(folder))


def safe_name(file: str, folder: Path | str) -> str:
    """Return a shard's file name if it stays inside its folder.

    Raises:
        CheckpointError: the index points elsewhere.
    """
    if file != Path(file).name or file in ("", ".", "..") or "\\" in file or "\0" in file:
        raise CheckpointError(
            f"the index of {folder} names {file!r}, which lies outside the folder. Shards must be "
            "plain file names beside the index; this checkpoint is malformed or hostile and is not "
            "read."
        )
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"the index of {folder} names {file!r}; only .safetensors files are read."
        )
    return file


def check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Check that every tensor which the index promises is in the shard it names."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return
    for name, file in read_json(folder / INDEX)["weight_map"].items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError(
                f"the index of {folder} promises tensor {name} in {file}, which does not hold it; "
                "fetch the checkpoint again."
            )


def read_header(path: Path) -> dict[str, Entry]:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        end = max((int(row["data_offsets"][1]) for row in header.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes promised, {size} found")
        entries = {}
        for name, row in header.items():
            entry = Entry(file=path.name, dtype=row["dtype"], shape=tuple(row["shape"]))
            first, last = row["data_offsets"]
            known = entry.dtype in DTYPE_BYTES
            if min(entry.shape, default=0) < 0 or (known and entry.num_bytes != last - first):
                raise ValueError(f"{name} of shape {row['shape']} in {last - first} bytes")
            entries[name] = entry
        return entries
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise damaged(path, str(error)) from error
    except (struct.error, RecursionError) as error:
        raise damaged(path, str(error)) from error


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Check that a disk has room.

    Raises:
        TooLarge: it has not.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLarge(
            f"{what} needs {human_bytes(needed)} in {folder}, where {human_bytes(free)} are free. "
            "Free some space, or choose another disk with --out (result) or HF_HOME (downloads)."
        )


def no_weights(name: str, present: list[str], where: str) -> CheckpointError:
    """Return the error for a checkpoint without model safetensors, saying what it is instead."""
    if "adapter_config.json" in present:
        reason = (
            "holds a PEFT adapter, not a model. Merge it into its base model first "
            "(peft: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()"
            ".save_pretrained(...))."
        )
    elif any(file.endswith(".gguf") for file in present):
        reason = (
            "holds GGUF files, which are quantised for llama.cpp. "
            "Use the original safetensors repository."
        )
    elif pickles := [f for f in present if f.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        reason = (
            f"holds {pickles[0]} and no safetensors. Pickled checkpoints can run code when opened "
            "and are never read; convert once with model.save_pretrained(...) in a place you trust."
        )
    else:
        reason = (
            f"has neither {SINGLE} nor {INDEX}; the download is incomplete or this is not a model."
        )
    return CheckpointError(f"{where} {reason}")


def _no_config(folder: Path) -> CheckpointError:
    """Return the error for a folder without config.json, or that is none."""
    if not folder.is_dir():
        return CheckpointError(f"{folder} is no folder. Give the folder of a model.")
    present = sorted(path.name for path in folder.iterdir())
    if not present:
        return CheckpointError(
            f"{folder} is empty. Give a folder with config.json and safetensors."
        )
    if "adapter_config.json" in present or any(file.endswith(".gguf") for file in present):
        return no_weights(folder.name, present, str(folder))
    return CheckpointError(
        f"{folder} has no config.json (it holds {', '.join(present[:5])}). "
        "Give the folder that save_pretrained wrote."
    )
