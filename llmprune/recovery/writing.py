"""The recovered checkpoint: the pruned one with trained tensors in place of its own.

Every other tensor keeps its bits; files, index, masks and side files are those of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import CheckpointError
from llmprune.checkpoint.naming import naming_of
from llmprune.checkpoint.sink import (
    copy_file,
    copy_side_files,
    hash_file,
    shard_name,
    write_json,
    write_tensors,
)
from llmprune.checkpoint.source import INDEX, Source, read_json
from llmprune.delivery.masks import OWN, MaskFiles
from llmprune.mask.packed import pack
from llmprune.recovery.bank import Bank
from llmprune.walk.rewriting import DTYPE_NAMES

if TYPE_CHECKING:
    from torch import Tensor

BOOKS = (
    "run.json",
    "report.json",
    "report.html",
    "evaluations.json",
    "events.jsonl",
)  # each result has its own


def write_trained(
    source: Source, model: Any, names: Iterable[str], bank: Bank, folder: Path
) -> dict[str, str]:
    """Write a checkpoint whose parameters `names` are the model's; return hashes of weight files.

    Values are rounded once, to the dtype that the source stores them in, and removed weights are
    zeros after that too.

    Raises:
        CheckpointError: a parameter cannot be stored as the source stores it.
    """
    naming, _ = naming_of(model, source.entries)
    values: dict[str, Tensor] = {}
    for name in sorted(names):
        value, keep = model.get_parameter(name).data, bank.keeps.get(name)
        whole = value if keep is None else value.masked_fill(~keep, 0)
        values |= naming.to_disk({name: whole.detach().cpu().float()})
    if lost := values.keys() - source.entries.keys():
        raise CheckpointError(
            f"{source.name} stores no {sorted(lost)[0]}, which was trained. Load and save it once "
            "with transformers, then recover the copy."
        )
    hashes, changed = {}, set()
    for file in sorted({entry.file for entry in source.entries.values()}):
        inside = sorted(name for name, entry in source.entries.items() if entry.file == file)
        tensors = source.get(inside)
        for name in inside:
            if name in values:
                value = _as_stored(values[name], source, name)
                changed |= set() if torch.equal(value, tensors[name]) else {name}
                tensors[name] = value
        write_tensors(folder / file, tensors)
        hashes[file] = hash_file(folder / file)
    copy_side_files(source.folder, folder)
    if (source.folder / INDEX).exists():
        copy_file(source.folder / INDEX, folder / INDEX)
    _copy_books(source, changed, folder)
    return hashes


def _as_stored(value: Tensor, source: Source, name: str) -> Tensor:
    """Return a value in the dtype that the source stores it in, shaped as there."""
    entry = source.entries[name]
    found = value.to(getattr(torch, DTYPE_NAMES[entry.dtype]))
    if tuple(found.shape) != tuple(entry.shape):
        raise CheckpointError(
            f"{name} was trained with shape {tuple(found.shape)} and is stored with "
            f"{tuple(entry.shape)}. Please report the model's config."
        )
    return found


def _copy_books(source: Source, changed: set[str], folder: Path) -> None:
    """Copy masks and what else llmprune wrote, and add the trained tensors to what is touched."""
    own = source.folder / OWN
    for path in sorted(own.glob("*")) if own.is_dir() else []:
        if path.is_file() and path.name not in BOOKS and path.name != "masks.json":
            copy_file(path, folder / OWN / path.name)
    index = read_json(own / "masks.json") if (own / "masks.json").exists() else {}
    files = MaskFiles(source.folder)
    # numbers of blocks and lost tensors were told against the dense model; this source has neither
    kept: Mapping[str, Any] = {"true_means": "kept", "masks": files.index}
    origin = {key: index[key] for key in ("blocks", "lost") if key in index}
    data = {**kept, "touched": sorted(changed)} | ({"origin": origin} if origin else {})
    write_json(folder / OWN / "masks.json", data)


def write_masks(folder: Path, keeps: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Write masks by block and linear in place of those that the source had."""
    own = folder / OWN
    index: dict[str, Any] = {}
    for path in own.glob("masks-*.safetensors"):
        path.unlink()
    for block, found in keeps.items():
        file = shard_name(block, len(keeps)).replace("model-", "masks-")
        if found:
            write_tensors(own / file, {name: pack(keep_OI) for name, keep_OI in found.items()})
        index |= {name: {"file": file, "shape": list(keep.shape)} for name, keep in found.items()}
    data = read_json(own / "masks.json")
    write_json(own / "masks.json", data | {"masks": index})
