"""A masked result in fewer bytes: kept values and one bit per weight instead of stored zeros.

A packed folder holds `packed.json`, and for every shard of the result a `packed-*.safetensors`.
There a packed tensor NAME is two: `NAME.kept`, the stored values in row-major order in their own
dtype, and `NAME.bits`, one bit per weight as in `mask/packed.py`, 1 where a value is stored; all
others are +0. Whatever zeros save nothing in lies there under its own name. No stock loader knows
the format, so nothing loads it by mistake: `load_packed` does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.base.errors import (
    CheckpointError,
    LlmpruneError,
    RecipeError,
    TooLarge,
    WontLoad,
)
from llmprune.base.progress import human_bytes
from llmprune.checkpoint.hub import fetch_whole, is_hub_id
from llmprune.checkpoint.sink import (
    check_links,
    copy_file,
    copy_side_files,
    settle,
    write_failed,
    write_json,
    write_tensors,
)
from llmprune.checkpoint.source import (
    Entry,
    Source,
    check_free_space,
    open_folder,
    read_header,
    read_json,
)
from llmprune.delivery.masks import OWN, MaskFiles

if TYPE_CHECKING:
    from torch import Tensor

LIST = "packed.json"
FORMAT = 1
KEPT, BITS = ".kept", ".bits"
SAYS = ("report.json", "run.json", "evaluations.json")  # of the result, what is told without masks


class Parts(NamedTuple):
    """A tensor without its zeros: stored values in row-major order, and which they are."""

    kept: Tensor
    bits: Tensor


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What packing a result has saved."""

    folder: str
    num_packed: int
    bytes_before: int
    bytes_after: int
    packed_before: int
    packed_after: int

    def text(self) -> str:
        """Return the saving as a sentence."""
        return (
            f"{self.num_packed} tensors packed, {human_bytes(self.packed_before)} into "
            f"{human_bytes(self.packed_after)} ({self.packed_after / self.packed_before:.1%}); the "
            f"model {human_bytes(self.bytes_before)} into {human_bytes(self.bytes_after)} "
            f"({self.bytes_after / self.bytes_before:.1%}); unpacks bit for bit"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pack_tensor(value: Tensor, keep: Tensor | None = None) -> Parts:
    """Part a tensor into stored values and bits; nothing but +0 is left out.

    Stored is what `keep` (of the tensor's shape) keeps, where everything else is +0, and what is
    not +0 elsewise: a mask of another orientation, or none, costs the zeros among kept weights.

    >>> import torch
    >>> pack_tensor(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    Parts(kept=tensor([2., 3.]), bits=tensor([96], dtype=torch.uint8))
    """
    from llmprune.mask.packed import pack

    nonzero = _as_int(value) != 0
    stored = nonzero
    if keep is not None and keep.shape == value.shape and not bool((nonzero & ~keep).any()):
        stored = keep
    return Parts(value.reshape(-1)[stored.reshape(-1)], pack(stored))


def unpack_tensor(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor that was packed, bit for bit.

    Raises:
        ValueError: values and bits are not those of one tensor of this shape.
    """
    import torch

    from llmprune.mask.packed import unpack

    stored = unpack(parts.bits, shape)
    if int(stored.sum()) != parts.kept.numel():
        raise ValueError(f"{int(stored.sum())} bits for {parts.kept.numel()} values")
    value = torch.zeros(shape, dtype=parts.kept.dtype)
    _as_int(value)[stored] = _as_int(parts.kept)
    return value


def _as_int(value: Tensor) -> Tensor:
    """Return the bits of a tensor as whole numbers of the same size."""
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.view(kinds[value.element_size()])


def pack_model(folder: Path, out: Path, *, overwrite: bool = False) -> Packed:
    """Write a masked result to a new folder without its zeros, shard by shard, and prove it.

    Every shard is read back and compared with the result bit for bit before `out` gets its name.
    `overwrite` lets it replace another packed folder.

    Raises:
        RecipeError: the folder is no masked result, or `out` holds something.
        CheckpointError: the result is damaged, or what was written is not what it was.
        TooLarge: the disk is full.
    """
    source, masks = open_folder(folder), MaskFiles(folder)
    if not masks.index:
        raise RecipeError(
            f"pack: {folder} has no masks. It is a dense or a shrunk model, which stores no zeros "
            "that could be left out. Give a masked result, such as llmprune --model demo "
            "--sparsity 0.5 writes."
        )
    replaced = overwrite and is_packed(out)
    if out.exists() and not replaced and (not out.is_dir() or any(out.iterdir())):
        what = "is no packed folder, and only one is replaced" if overwrite else "is not empty"
        raise RecipeError(f"out: {out} exists and {what}. Choose a new folder with --out.")
    check_links(folder)
    check_free_space(out.parent, source.num_bytes, "packing")
    scratch = out.with_name(f".{out.name}.packing-{os.getpid()}")
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        found = _write(source, masks, scratch, out)
        if replaced:
            os.replace(out, aside)
        elif out.exists():
            out.rmdir()
        os.replace(scratch, out)
        settle(out.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except (TooLarge, OSError) as error:
        raise _unwritten(out, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return found


def _unwritten(out: Path, error: Exception) -> LlmpruneError:
    """Return the error for a folder that could not be written; nothing of it stays."""
    failed = error if isinstance(error, LlmpruneError) else write_failed(out, error)
    if not isinstance(failed, TooLarge):
        return failed
    return TooLarge(
        f"the disk is full: {out} could not be written, and nothing of it is left. Free some space "
        "and run the same command again, or choose another disk with --out."
    )


def _write(source: Source, masks: MaskFiles, scratch: Path, out: Path) -> Packed:
    """Write all files of the packed folder."""
    scratch.mkdir(parents=True)
    copy_side_files(source.folder, scratch)
    shapes: dict[str, list[int]] = {}
    after = 0
    files = sorted({entry.file for entry in source.entries.values()})
    for number, file in enumerate(files, 1):
        names = [name for name, entry in source.entries.items() if entry.file == file]
        path = scratch / f"packed-{number:05d}-of-{len(files):05d}.safetensors"
        packed = _write_shard(source, masks, sorted(names), path)
        _check_equal(source, names, packed, path)
        shapes |= packed
        after += sum(entry.num_bytes for entry in read_header(path).values())
    (scratch / OWN).mkdir()
    for name in SAYS:
        if (path := source.folder / OWN / name).exists():
            copy_file(path, scratch / OWN / name)
    listed = {"format": FORMAT, "files": len(files), "tensors": dict(sorted(shapes.items()))}
    write_json(scratch / LIST, listed)
    before = sum(source.entries[name].num_bytes for name in shapes)
    return Packed(
        folder=str(out),
        num_packed=len(shapes),
        bytes_before=source.num_bytes,
        bytes_after=after,
        packed_before=before,
        packed_after=before - (source.num_bytes - after),
    )


def _write_shard(
    source: Source, masks: MaskFiles, names: list[str], path: Path
) -> dict[str, list[int]]:
    """Write the tensors of a shard; return the shapes of those that were packed."""
    shard: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name in names:
        value = source.get([name])[name]
        parts = None
        if name in masks.touched and value.is_floating_point():
            parts = pack_tensor(value, _mask_of(masks, name))
        if parts is not None and parts.kept.nbytes + parts.bits.nbytes < value.nbytes:
            shard |= {name + KEPT: parts.kept, name + BITS: parts.bits}
            shapes[name] = list(value.shape)
        else:
            shard[name] = value
    write_tensors(path, shard)
    return shapes


def _mask_of(masks: MaskFiles, name: str) -> Tensor | None:
    """Return the mask of the linear whose weight a disk tensor is, where its name tells."""
    linear = name.removesuffix(".weight")
    return masks.of_block(linear)[linear] if linear in masks.index else None


def _check_equal(
    source: Source, names: list[str], packed: Mapping[str, list[int]], path: Path
) -> None:
    """Check that a packed shard gives the source's tensors, bit for bit.

    Raises:
        CheckpointError: it does not.
    """
    import torch

    shard = _Shards(path.parent, {path.name: read_header(path)}, packed)
    for name in names:
        ours, theirs = shard.get(name), source.get([name])[name]
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not same or not torch.equal(_as_int(ours), _as_int(theirs)):
            raise CheckpointError(
                f"{name} does not come out of {path.name} as it went in. Nothing was published; "
                "check the disk, and pack again."
            )


class _Shards:
    """The tensors of packed files, unpacked when they are asked for."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Entry]],
        shapes: Mapping[str, list[int]],
    ) -> None:
        self.folder, self.shapes = folder, shapes
        self.home = {name: file for file, entries in files.items() for name in entries}

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, as the result had them."""
        ends = {name + end for name in self.shapes for end in (KEPT, BITS)}
        return sorted([*(self.home.keys() - ends), *self.shapes])

    def get(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            CheckpointError: it is damaged or missing.
        """
        if name not in self.shapes:
            return self._read(name)
        parts = Parts(self._read(name + KEPT), self._read(name + BITS))
        try:
            return unpack_tensor(parts, tuple(self.shapes[name]))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder}: {name} cannot be unpacked ({error}). The copy is damaged; fetch "
                "the folder again."
            ) from error

    def _read(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self.home:
            raise CheckpointError(
                f"{self.folder}: no file holds {name}, which {LIST} promises. The copy is "
                "incomplete; fetch the folder again."
            )
        with safe_open(str(self.folder / self.home[name]), "pt") as handle:
            found: Tensor = handle.get_tensor(name)
            return found


def unpack_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a packed folder as the result stored them, bit for bit.

    Raises:
        CheckpointError: it is no packed folder, or damaged.
    """
    if not (folder / LIST).is_file():
        raise CheckpointError(
            f"{folder} has no {LIST}, so it is no packed model. Folders with model.safetensors "
            "load with from_pretrained."
        )
    listed = read_json(folder / LIST)
    if listed.get("format") != FORMAT or not isinstance(listed.get("tensors"), dict):
        raise CheckpointError(
            f"{folder / LIST} is of format {listed.get('format')!r}, and this llmprune reads "
            f"{FORMAT}. Install the release that wrote it: pip install --upgrade llmprune."
        )
    paths = sorted(folder.glob("packed-*.safetensors"))
    promised = listed.get("files")
    if len(paths) != promised:
        raise CheckpointError(
            f"{folder} holds {len(paths)} packed files of the {promised} that {LIST} promises. The "
            "copy is incomplete; fetch the folder again."
        )
    files = {path.name: read_header(path) for path in paths}
    shards = _Shards(folder, files, listed["tensors"])
    return {name: shards.get(name) for name in shards.names}


def load_packed(folder: Path, *, dtype: Any = "auto", trust_remote_code: bool = False) -> Any:
    """Load a packed folder into its stock class, in evaluation mode, on the host.

    `dtype` is as in `from_pretrained`. `load_packed(folder).save_pretrained(out)` writes an
    ordinary folder again.

    Raises:
        CheckpointError: it is no packed folder, or damaged. WontLoad: keys are missing or left.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tensors = unpack_tensors(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    loaded: Any = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    run = folder / OWN / "run.json"
    unused = set(read_json(run).get("unused", ())) if run.exists() else set()
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if found := sorted(set(map(str, info[what])) - unused):
            raise WontLoad(
                f"{folder} loads with {what.replace('_', ' ')}: {', '.join(found[:3])}. Config and "
                "tensors do not belong together; fetch the folder again."
            )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model.eval()


def packed_folder(model: str, revision: str | None = None) -> Path | None:
    """Return the folder of a packed model, fetched whole where that is on the Hub; None where the
    model is not packed.

    Raises:
        CheckpointError: the Hub knows no such model or revision, or cannot be reached.
    """
    path = Path(model).expanduser()
    if model == "demo" or path.exists() or not is_hub_id(model):
        return path if is_packed(path) else None
    return fetch_whole(model, revision, LIST)


def is_packed(folder: Path) -> bool:
    """Tell whether a folder holds a packed model."""
    try:
        return "format" in json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
