"""What the GGUF file of a checkpoint shall hold, known before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, UnsupportedModel
from llmprune.checkpoint.naming import naming_of
from llmprune.checkpoint.skeleton import build_skeleton, read_config, untie
from llmprune.checkpoint.source import Source
from llmprune.delivery.gguf_model import (
    ROPE_FACTORS,
    Architecture,
    Fields,
    check_family,
    choose_architecture,
    heads_of,
    hyperparameters,
    rope_factors,
    tensor_name,
)
from llmprune.delivery.gguf_vocabulary import vocabulary_fields

if TYPE_CHECKING:
    from torch import Tensor

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type: what most matrices are stored in


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor of the file: whose name it has there and in the checkpoint, and how it is stored.

    `heads` tells within how many heads its rows change places; 0 for none.
    """

    name: str
    disk: str
    shape: tuple[int, ...]
    dtype: str
    heads: int = 0

    @property
    def num_bytes(self) -> int:
        count = 4 if self.dtype == "F32" else 2
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All that a file shall hold: fields, tensors of the checkpoint, and those computed for it."""

    architecture: Architecture
    fields: Fields
    rows: tuple[Row, ...]
    computed: Mapping[str, Tensor]
    notes: tuple[str, ...]


def describe(source: Source) -> Contents:
    """Return what the file of a checkpoint shall hold; no weight is read.

    Raises:
        UnsupportedModel: something in it has no place in GGUF.
        CheckpointError: tensors are missing, or not of the shape that the config says.
    """
    import torch

    check_family(source.config(), source.name)
    config = read_config(source.folder)
    model = build_skeleton(config, dtype=torch.float32).model
    disk_of, unused = _stored(model, source)
    architecture, note = choose_architecture(config, disk_of)
    network, notes = hyperparameters(config, architecture)
    rows = tuple(_row(source, disk_of, name, architecture, config) for name in disk_of)
    factors_R = rope_factors(config)
    vocabulary, more = vocabulary_fields(source.folder, int(config.vocab_size))
    if unused:
        more.append(f"left out, as the model does not use them: {', '.join(unused)}")
    fields = {
        "general.type": "model",
        "general.name": Path(source.name).expanduser().resolve().name,
        "general.file_type": _file_type(rows),
        **network,
        **vocabulary,
    }
    return Contents(
        architecture=architecture,
        fields=fields,
        rows=rows,
        computed={} if factors_R is None else {ROPE_FACTORS: factors_R},
        notes=tuple(filter(None, (note, *notes, *more))),
    )


def _stored(model: Any, source: Source) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return where the checkpoint stores each parameter, in the model's order, and what is unused.

    A head tied to the embeddings is no parameter of its own, and gets no tensor.
    """
    naming, unused = naming_of(model, source.entries)
    found = {param: name for name, param in naming.target.items()}
    untie(model, set(found))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in found:
            raise CheckpointError(
                f"{source.name} has no tensor {name}, which its config says there is. The "
                "checkpoint is incomplete; write it again, or mend its config.json."
            )
        shape = source.entries[found[name]].shape
        if naming.pattern[found[name]] is not None or shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{source.name}: {found[name]} has shape {list(shape)}, and its config says "
                f"{list(parameter.shape)}. A stock uniform checkpoint has one shape in all blocks; "
                "mend its config.json, or prune again to a uniform result."
            )
    return {name: found[name] for name in parameters}, unused


def _row(
    source: Source, disk_of: Mapping[str, str], param: str, architecture: Architecture, config: Any
) -> Row:
    """Return how a parameter is stored: vectors in float32 as llama.cpp wants, the rest as is."""
    entry = source.entries[disk_of[param]]
    if entry.dtype not in FILE_TYPES:
        raise UnsupportedModel(
            f"{source.name}: {disk_of[param]} is stored as {entry.dtype}. GGUF files are written "
            f"from {', '.join(FILE_TYPES)}; save the checkpoint in one of these first."
        )
    name = str(tensor_name(param))
    return Row(
        name=name,
        disk=disk_of[param],
        shape=entry.shape,
        dtype=entry.dtype if len(entry.shape) > 1 else "F32",
        heads=heads_of(name, architecture, config),
    )


def _file_type(rows: tuple[Row, ...]) -> int:
    """Return the number of the type that most matrix entries have."""
    total = dict.fromkeys(FILE_TYPES, 0)
    for row in rows:
        if len(row.shape) > 1:
            total[row.dtype] += row.num_bytes
    return FILE_TYPES[max(total, key=lambda dtype: total[dtype])]
