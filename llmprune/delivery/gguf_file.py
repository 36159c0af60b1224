"""A stock checkpoint as one GGUF file for llama.cpp, written tensor by tensor and read back.

The file takes its name only after every tensor in it was found to be the checkpoint's, bit for bit.

Legend: O rows, I columns.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import settle, write_failed
from llmprune.checkpoint.source import Source, check_free_space
from llmprune.delivery.gguf_contents import Contents, describe

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    file: Path
    architecture: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return what was written as a sentence."""
        return (
            f"{self.file}: {self.num_bytes / 1e6:.1f} MB, architecture {self.architecture}; read "
            f"back, all {self.num_tensors} tensors are the checkpoint's, bit for bit"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "architecture": self.architecture,
            "num_tensors": self.num_tensors,
            "num_bytes": self.num_bytes,
            "notes": list(self.notes),
        }


def export_gguf(
    model: str, out: Path, *, revision: str | None = None, overwrite: bool = False
) -> Exported:
    """Write the GGUF file of a stock checkpoint, prove it, and only then give it its name.

    Raises:
        RecipeError: the package gguf is missing, or `out` cannot be a file to write.
        UnsupportedModel: the family, its shapes, its tokenizer or its dtype have no place in GGUF.
        CheckpointError: the checkpoint is damaged, or the file read back differs from it.
        TooLarge: the disk is full.
    """
    _check_out(out, overwrite)
    source = open_source(model, revision=revision)
    contents = describe(source)
    num_bytes = sum(row.num_bytes for row in contents.rows)
    check_free_space(out.absolute().parent, num_bytes, "the GGUF file")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, contents, source)
        prove(temporary, contents, source)
        settle(temporary)
        num_bytes = temporary.stat().st_size
        os.replace(temporary, out)
        settle(out.absolute().parent)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise write_failed(out, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return Exported(
        file=out,
        architecture=contents.architecture.name,
        num_tensors=len(contents.rows) + len(contents.computed),
        num_bytes=num_bytes,
        notes=contents.notes,
    )


def _check_out(out: Path, overwrite: bool) -> None:
    """Check what needs no model: the package, and the name of the file."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise RecipeError(
            "to: gguf needs the package gguf, which is not installed. Type "
            "`pip install 'llmprune[gguf]'`."
        ) from None
    if out.suffix != ".gguf":
        raise RecipeError(f"out: {out} is no name of a GGUF file. Type --out {out.name}.gguf.")
    if out.is_dir() or (out.exists() and not overwrite):
        raise RecipeError(
            f"out: {out} exists. Choose another name with --out, or add --overwrite to replace it."
        )


def permute(weight_OI: Tensor, heads: int) -> Tensor:
    """Bring the two halves of every head's rows together pairwise, as llama.cpp rotates them.

    >>> import torch
    >>> permute(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), 2).tolist()
    [0, 2, 1, 3, 10, 12, 11, 13]
    """
    halves = weight_OI.reshape(heads, 2, -1, *weight_OI.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight_OI.shape)


def unpermute(weight_OI: Tensor, heads: int) -> Tensor:
    """Undo `permute`: even rows of every head first, then odd ones."""
    pairs = weight_OI.reshape(heads, -1, 2, *weight_OI.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight_OI.shape)


def _write(path: Path, contents: Contents, source: Source) -> None:
    """Write a GGUF file; one tensor is in memory at a time."""
    import gguf
    import torch

    writer = gguf.GGUFWriter(path, contents.architecture.name)
    kinds = gguf.GGMLQuantizationType
    for key, value in contents.fields.items():
        writer.add_key_value(key, value, _field_type(value))
    for name, tensor in contents.computed.items():
        array = tensor.float().numpy()
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, kinds.F32)
    for row in contents.rows:
        bits = _numpy(torch.empty(0, dtype=_torch_dtype(row.dtype))).dtype
        writer.add_tensor_info(row.name, row.shape, bits, row.num_bytes, kinds[row.dtype])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in contents.computed.values():
            writer.write_tensor_data(tensor.float().numpy())
        for row in contents.rows:
            weight = source.get([row.disk])[row.disk].to(_torch_dtype(row.dtype))
            weight = permute(weight, row.heads) if row.heads else weight
            writer.write_tensor_data(_numpy(weight))
    finally:
        writer.close()


def _field_type(value: Any) -> Any:
    """Return the GGUF type of a field."""
    from gguf import GGUFValueType as Kind

    kinds = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}
    return kinds.get(type(value), Kind.ARRAY)


def _torch_dtype(name: str) -> Any:
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def _numpy(tensor: Tensor) -> Any:
    """Return a tensor's bits as an array; numpy has no bfloat16."""
    import torch

    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def prove(path: Path, contents: Contents, source: Source) -> None:
    """Read a file back and compare fields, names, types, shapes and every bit of every tensor.

    Raises:
        CheckpointError: something differs.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    wanted = {"general.architecture": contents.architecture.name, **contents.fields}
    for key, value in wanted.items():
        field = reader.get_field(key)
        if field is None or not _same_field(field.contents(), value):
            raise _differs(path, f"field {key}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rows = {row.name: row for row in contents.rows}
    if strange := tensors.keys() ^ (rows.keys() | contents.computed.keys()):
        raise _differs(path, f"the set of tensors ({sorted(strange)[0]})")
    for name, tensor in tensors.items():
        row = rows.get(name)
        if row is None:
            found, meant = _torch(tensor, "F32"), contents.computed[name].float()
        else:
            found = _torch(tensor, row.dtype)
            found = unpermute(found, row.heads) if row.heads else found
            meant = source.get([row.disk])[row.disk].to(found.dtype)
        bits = [part.contiguous().reshape(-1).view(torch.uint8) for part in (found, meant)]
        if found.shape != meant.shape or not torch.equal(*bits):
            raise _differs(path, f"tensor {name}")


def _torch(tensor: Any, dtype: str) -> Tensor:
    """Return a tensor of a file as torch sees it, if it is of the type that it should be of."""
    import torch

    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.tensor_type.name != dtype:
        return torch.empty(0)
    return torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=_torch_dtype(dtype)).reshape(
        shape
    )


def _same_field(found: Any, meant: Any) -> bool:
    """Compare a field read back with what was meant; floats are stored in 32 bits."""
    import numpy

    if isinstance(meant, float) or (isinstance(meant, list) and isinstance(meant[0], float)):
        return numpy.array_equal(numpy.asarray(found, "f4"), numpy.asarray(meant, "f4"))
    return bool(found == meant)


def _differs(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name.removeprefix('.').removesuffix('.tmp')}: {what} read back is not what was "
        "written. The disk is faulty, or the checkpoint changed meanwhile; nothing is kept. Run "
        "the same command again."
    )
