"""A checkpoint as its difference from a base, on disk: exact, whatever the two are.

A delta folder holds `delta.json`, `delta-*.safetensors`, and the small files of the checkpoint. Of
a tensor NAME that differs from the base these are stored, whichever take fewest bytes:
`NAME.kept`, the checkpoint's own values where it differs, row-major in its dtype, with
`NAME.bits`, one bit per entry as in `mask/packed.py`; the same with `NAME.zeros`, one bit per entry
that is +0 where the base is not; or `NAME.whole`. A tensor that is the base's is not stored.
Values and not differences are stored: nothing is added up again, so nothing is rounded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import CheckpointError, first_line
from llmprune.checkpoint.sink import copy_file, hash_file, side_files, write_index, write_tensors
from llmprune.checkpoint.source import (
    SINGLE,
    Source,
    damaged,
    open_folder,
    read_json,
    safe_name,
)
from llmprune.delivery.masks import OWN
from llmprune.mask.packed import pack, unpack
from llmprune.recovery.deltas import bits_of

if TYPE_CHECKING:
    from torch import Tensor

LIST = "delta.json"
FORMAT = 1
KEPT, BITS, ZEROS, WHOLE = ".kept", ".bits", ".zeros", ".whole"
SHARD = 2_000_000_000  # bytes of a file, which are held at once while it is written
PAGE = 4096
RECORDS = ("masks.json", "run.json")  # of what llmprune wrote beside a checkpoint

Parts = dict[str, "Tensor"]


def encode(value: Tensor, base: Tensor) -> Parts:
    """Return what must be stored of a tensor beside a base of its shape and dtype.

    >>> encode(torch.tensor([1.0, 5.0, 3.0] + [0.0] * 9), torch.tensor([1.0, 2.0, 3.0] + [0.0] * 9))
    {'.bits': tensor([64,  0], dtype=torch.uint8), '.kept': tensor([5.])}
    """
    differs = bits_of(value) != bits_of(base)
    if not bool(differs.any()):
        return {}
    zeros = differs & (bits_of(value) == 0)
    others = differs & ~zeros
    forms: list[Parts] = [
        {BITS: pack(differs), KEPT: value[differs]},
        {BITS: pack(others), KEPT: value[others], ZEROS: pack(zeros)},
        {WHOLE: value},
    ]
    return min(forms, key=_num_bytes)


def decode(parts: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Return the tensor that `encode` was given, bit for bit.

    Raises:
        ValueError: the parts are not of a tensor of the base's shape.
    """
    if not parts:
        return base
    if WHOLE in parts:
        return parts[WHOLE]
    value = base.clone()
    if ZEROS in parts:
        value[unpack(parts[ZEROS], base.shape)] = 0
    stored = unpack(parts[BITS], base.shape)
    if int(stored.sum()) != parts[KEPT].numel():
        raise ValueError(f"{int(stored.sum())} bits for {parts[KEPT].numel()} values")
    value[stored] = parts[KEPT]
    return value


def _num_bytes(parts: Parts) -> int:
    return sum(value.nbytes for value in parts.values())


def content_hash(value: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(_bytes_of(value)).hexdigest()


def _bytes_of(value: Tensor) -> memoryview:
    """Return a tensor's memory, row-major."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def base_fingerprint(source: Source) -> str:
    """Return a hash of all names, dtypes and shapes, and of three pages of each tensor.

    It is the same for a copy elsewhere and for other shards of the same tensors.
    """
    digest = hashlib.sha256()
    for name in sorted(source.entries):
        entry = source.entries[name]
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        flat = _bytes_of(source.get([name])[name])
        for start in (0, max(0, len(flat) - PAGE) // 2, max(0, len(flat) - PAGE)):
            digest.update(flat[start : start + PAGE])
    return digest.hexdigest()


@dataclass(kw_only=True)
class DeltaWriter:
    """Writes parts of tensors into files of limited size, in the order that they come."""

    folder: Path
    files: int = 0
    held: Parts = field(default_factory=dict)

    def add(self, name: str, parts: Parts) -> str | None:
        """Take the parts of a tensor; return the file that they will lie in, if there are any."""
        if not parts:
            return None
        if self.held and _num_bytes(self.held) + _num_bytes(parts) > SHARD:
            self.flush()
        self.held |= {name + end: part for end, part in parts.items()}
        return f"delta-{self.files + 1:05d}.safetensors"

    def flush(self) -> None:
        """Write what is held."""
        if self.held:
            self.files += 1
            write_tensors(self.folder / f"delta-{self.files:05d}.safetensors", self.held)
            self.held = {}


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A delta folder: what `delta.json` says, and the tensors that it makes of a base."""

    folder: Path
    data: Mapping[str, Any]

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """Return by name what each tensor is (dtype, shape, sha256) and the file of its parts."""
        found: Mapping[str, Mapping[str, Any]] = self.data["tensors"]
        return found

    def rebuilt(self, name: str, base: Source) -> Tensor:
        """Return a tensor of the checkpoint.

        Raises:
            CheckpointError: it is not what it was when the delta was made.
        """
        row = self.tensors[name]
        below = base.get([name])[name].to(_dtype(row))
        try:
            value = decode(self._parts(name), below)
        except (ValueError, IndexError, KeyError, RuntimeError) as error:
            raise damaged(self.folder / str(row["file"]), f"{name}: {error}") from error
        same = list(value.shape) == row["shape"] and value.dtype == _dtype(row)
        if not same or content_hash(value) != row["sha256"]:
            raise CheckpointError(
                f"{name} of {base.name} and {self.folder} do not give the tensor that the delta "
                f"was made of. The base was edited or the delta is damaged; fetch both again, and "
                f"name the base with --base ({self.data['base']['name']} it was)."
            )
        return value

    def _parts(self, name: str) -> Parts:
        """Read the parts of a tensor."""
        from safetensors import SafetensorError, safe_open

        file = self.tensors[name]["file"]
        if file is None:
            return {}
        path = self.folder / Path(file).name
        try:
            with safe_open(str(path), "pt") as handle:
                there = set(handle.keys())
                ends = [end for end in (WHOLE, BITS, KEPT, ZEROS) if name + end in there]
                return {end: handle.get_tensor(name + end) for end in ends}
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error)) from error


def is_delta(folder: Path) -> bool:
    """Tell whether a folder holds a delta."""
    try:
        return "format" in read_json(folder / LIST)
    except CheckpointError:
        return False


def open_delta(folder: Path) -> Delta:
    """Open a delta folder; no tensor is read.

    Raises:
        CheckpointError: it holds none, or one of another format.
    """
    if not (folder / LIST).is_file():
        raise CheckpointError(
            f"{folder} has no {LIST}, so it is no delta. To make one of a fine-tuned model, type "
            f"llmprune delta {folder} --base BASE."
        )
    data = read_json(folder / LIST)
    if data.get("format") != FORMAT or not isinstance(data.get("tensors"), dict):
        raise CheckpointError(
            f"{folder / LIST} is of format {data.get('format')!r}, and this llmprune reads "
            f"{FORMAT}. Install the release that wrote it: pip install --upgrade llmprune."
        )
    _check_list(folder, data)
    return Delta(folder=folder, data=data)


def _check_list(folder: Path, data: Mapping[str, Any]) -> None:
    """Check that a list says all that is read of it, and names no file outside its folder.

    Raises:
        CheckpointError: it does not.
    """
    try:
        told = [data["base"][key] for key in ("name", "folder", "revision", "fingerprint")]
        for name, row in data["tensors"].items():
            told += [row["sha256"], row["file"]]
            if _size(row) < 0 or not isinstance(_dtype(row), torch.dtype):
                raise TypeError(f"{name} is of no shape or dtype")
        for file in data["masks"]:
            safe_name(str(file), folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / LIST} is malformed ({type(error).__name__}: {first_line(error)}). It must "
            "be as it was written; fetch the delta again."
        ) from error


def copy_records(tuned: Path, base: Path, folder: Path) -> dict[str, str]:
    """Copy the masks of a checkpoint that the base has not; return the hashes of all of them."""
    home, hashes = tuned / OWN, {}
    for path in sorted(home.glob("masks-*.safetensors")):
        hashes[path.name] = hash_file(path)
        other = base / OWN / path.name
        if not other.is_file() or hash_file(other) != hashes[path.name]:
            copy_file(path, folder / OWN / path.name)
    for name in RECORDS:
        if hashes and (home / name).is_file():
            copy_file(home / name, folder / OWN / name)
    return hashes


def write_rebuilt(delta: Delta, base: Source, out: Path) -> None:
    """Write the checkpoint that a delta and its base make, and read every tensor back.

    Raises:
        CheckpointError: a tensor or a mask is not what it was when the delta was made.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(delta))
    homes: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
        write_tensors(out / file, {name: delta.rebuilt(name, base) for name in names})
        homes |= dict.fromkeys(names, file)
    if shards[1:]:
        params = sum(math.prod(row["shape"]) for row in delta.tensors.values())
        size = sum(map(_size, delta.tensors.values()))
        write_index(out, homes, num_params=params, num_bytes=size)
    for path in side_files(delta.folder):
        if path.name != LIST:
            copy_file(path, out / path.relative_to(delta.folder))
    _copy_masks(delta, base, out)
    _check_written(delta, out)


def _shards(delta: Delta) -> Iterator[list[str]]:
    """Yield the tensors of each file of the rebuilt checkpoint."""
    held: list[str] = []
    size = 0
    for name in sorted(delta.tensors):
        own = _size(delta.tensors[name])
        if held and size + own > SHARD:
            yield held
            held, size = [], 0
        held.append(name)
        size += own
    yield held


def _size(row: Mapping[str, Any]) -> int:
    """Return the bytes of a tensor of the checkpoint."""
    return int(math.prod(row["shape"])) * _dtype(row).itemsize


def _dtype(row: Mapping[str, Any]) -> torch.dtype:
    found: torch.dtype = getattr(torch, row["dtype"])
    return found


def _copy_masks(delta: Delta, base: Source, out: Path) -> None:
    """Put masks beside the rebuilt checkpoint, from the delta, else from the base."""
    for name, wanted in delta.data["masks"].items():
        places = (delta.folder / OWN / name, base.folder / OWN / name)
        path = next((path for path in places if path.is_file()), None)
        if path is None or hash_file(path) != wanted:
            raise CheckpointError(
                f"{OWN}/{name} is neither in {delta.folder} nor in {base.folder} as it was when "
                "the delta was made. The delta or its base is incomplete; fetch both again."
            )
        copy_file(path, out / OWN / name)
    for name in RECORDS:
        if (delta.folder / OWN / name).is_file():
            copy_file(delta.folder / OWN / name, out / OWN / name)


def _check_written(delta: Delta, out: Path) -> None:
    """Check that what lies on the disk is what was to be written."""
    written = open_folder(out)
    for name, row in delta.tensors.items():
        if content_hash(written.get([name])[name]) != row["sha256"]:
            raise CheckpointError(
                f"{name} does not come off the disk as it went to {out}. Nothing was published; "
                "check the disk, and try again."
            )
