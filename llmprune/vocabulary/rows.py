"""Which tensors of a checkpoint have an entry per token, and their shards written without some.

Nothing is told by names: these tensors are those whose shape changes when the model is built (on
meta) with the smaller vocabulary. K kept ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmprune.base.errors import CheckpointError, UnsupportedModel
from llmprune.checkpoint.naming import naming_of
from llmprune.checkpoint.sink import write_index, write_tensors
from llmprune.checkpoint.skeleton import build_skeleton, read_config
from llmprune.checkpoint.source import SINGLE, Entry, Source, read_header

Shapes = Mapping[str, tuple[int, ...]]


def token_axes(
    source: Source,
    result: Path,
    *,
    num_before: int,
    num_kept: int,
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Return the tensors on disk with an entry per token, and on which axis they have it.

    `result` is the folder whose config.json has the smaller vocabulary.

    Raises:
        UnsupportedModel: shapes follow the vocabulary in another way, or not at all.
        CheckpointError: a tensor has not the shape that the source's config.json makes it.
    """
    model = _on_meta(source.folder, trust_remote_code)
    before, after = _shapes(model), _shapes(_on_meta(result, trust_remote_code))
    axes = _changed_axes(before, after, num_before, num_kept)
    if num_kept < num_before and not axes:
        raise UnsupportedModel(
            f"no tensor of {type(model).__name__} changes with vocab_size, so there are no rows "
            "to cut. Leave the vocabulary as it is."
        )
    naming, unused = naming_of(model, source.entries)
    found = {}
    for name, param in naming.target.items():
        if param not in axes:
            continue
        if naming.pattern[name] is not None:
            raise _not_by_token(name)
        if source.entries[name].shape != before[param]:
            raise CheckpointError(
                f"{name} of {source.name} has shape {list(source.entries[name].shape)}, but "
                f"config.json makes it {list(before[param])}. Config and weights belong to "
                "different models."
            )
        found[name] = axes[param]
    for name in unused:  # which the model cannot tell about: a second head of its own, perhaps
        if num_before in source.entries[name].shape:
            raise _not_by_token(name)
    return found


def _on_meta(folder: Path, trust_remote_code: bool) -> Any:
    import torch

    config = read_config(folder, trust_remote_code=trust_remote_code)
    return build_skeleton(config, dtype=torch.float32, trust_remote_code=trust_remote_code).model


def _shapes(model: Any) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _changed_axes(before: Shapes, after: Shapes, num_before: int, num_kept: int) -> dict[str, int]:
    """Return the one axis of each parameter that follows the size of the vocabulary.

    Raises:
        UnsupportedModel: a parameter comes, goes or changes in another way.
    """
    axes = {}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ()), after.get(name, ())
        if old == new:
            continue
        differing = [
            axis for axis, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]
        ]
        if len(old) != len(new) or [(old[a], new[a]) for a in differing] != [
            (num_before, num_kept)
        ]:
            raise _not_by_token(name)
        axes[name] = differing[0]
    return axes


def _not_by_token(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} follows the vocabulary in another way than one entry per token, or may do so. "
        "Leave the vocabulary of this model as it is."
    )


def write_shards(source: Source, out: Path, axes: Mapping[str, int], kept: Sequence[int]) -> None:
    """Write every shard under its name, the given tensors cut to the kept ids, others bit for bit.

    Raises:
        CheckpointError: a shard is damaged.
        TooLarge: the disk is full.
    """
    import torch

    kept_K = torch.tensor(kept, dtype=torch.int64)
    shards: dict[str, list[str]] = {}
    for name, entry in source.entries.items():
        shards.setdefault(entry.file, []).append(name)
    entries: dict[str, Entry] = {}
    for file, names in sorted(shards.items()):
        tensors = source.get(names)
        for name in axes.keys() & tensors.keys():
            tensors[name] = tensors[name].index_select(axes[name], kept_K)
        write_tensors(out / file, tensors)
        entries |= read_header(out / file)
    if shards.keys() != {SINGLE}:
        write_index(
            out,
            {name: entry.file for name, entry in entries.items()},
            num_params=sum(entry.num_params for entry in entries.values()),
            num_bytes=sum(entry.num_bytes for entry in entries.values()),
        )
