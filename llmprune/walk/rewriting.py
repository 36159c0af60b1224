"""Streamed blocks with somewhere to write: a committed block is a shard, read back from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.types import Family
from llmprune.base.memory import return_freed
from llmprune.checkpoint.sink import shard_name, write_index, write_tensors
from llmprune.checkpoint.skeleton import Skeleton, empty
from llmprune.checkpoint.source import Entry, Source, read_header
from llmprune.walk.block import Block
from llmprune.walk.streamed import Streamed, stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """Reads blocks from `source`, writes each as a shard of `out`, reads it back by `result`.

    `result` has the config of what is written, so a shrunk block runs in modules of its own size.
    """

    source: Streamed
    result: Streamed
    out: Path

    def __len__(self) -> int:
        return len(self.source)

    @property
    def model(self) -> Any:
        return self.source.model

    @property
    def family(self) -> Family:
        return self.source.family

    @property
    def modules(self) -> Any:
        return self.source.modules

    @property
    def device(self) -> torch.device:
        return self.source.device

    @contextmanager
    def open(self, index: int) -> Iterator[Block]:
        """Bring a source block to the device."""
        with self.source.open(index) as block:
            yield block

    @contextmanager
    def stored(self, index: int) -> Iterator[Block]:
        """Bring a committed block to the device, from its shard."""
        with self.result.open(index) as block:
            yield block

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        with self.source.trunk(head=head) as model:
            yield model

    def commit(
        self, block: Block, touched: set[str], redo: Callable[[Block], None] | None = None
    ) -> Path:
        """Write a block: what was decided, on the bits that the source stores.

        Where the block was computed with in another dtype than it is stored in, the decisions are
        carried out again on the stored values (`redo`), so that a kept weight keeps its bits.
        Solvers that update weights have no `redo`: what the module holds is written.
        """
        if redo is None or self.source.dtype is None:
            return self._write(block, touched)
        empty(block.module)
        return_freed()
        with self.source.stored_form().open(block.index) as plain:
            redo(plain)
            return self._write(plain, touched)

    def _write(self, block: Block, touched: set[str]) -> Path:
        """Write touched parameters from the module, others as they are in the source.

        The module gives each parameter up once it is converted, so that the block is held once.
        """
        source, naming = self.source.source, self.source.naming
        shard: dict[str, Tensor] = {}
        for name in sorted(touched):
            param = {block.prefix + name: block.module.get_parameter(name).data}
            for disk, value in naming.to_disk(param).items():
                shard[disk] = self._stored_form(value, source.entries[disk])
            empty(block.module, [name])
        shard |= source.get(sorted(set(naming.disk_names(block.prefix)) - shard.keys()))
        path = self.out / shard_name(block.index, len(self))
        write_tensors(path, shard, settled=False)
        return path

    def commit_trunk(self) -> Path:
        """Copy what is not in a block into the last shard, bit for bit."""
        source = self.source.source
        inside = self.source.skeleton.family.blocks + "."
        names = [
            name
            for name in source.entries
            if not self.source.naming.target.get(name, "").startswith(inside)
        ]
        path = self.out / shard_name(-1, len(self))
        write_tensors(path, source.get(sorted(names)))
        return path

    def write_index(self) -> None:
        """Write the index of all shards."""
        entries: dict[str, Entry] = {}
        for index in (*range(len(self)), -1):
            entries |= read_header(self.out / shard_name(index, len(self)))
        write_index(
            self.out,
            {name: entry.file for name, entry in entries.items()},
            num_params=sum(entry.num_params for entry in entries.values()),
            num_bytes=sum(entry.num_bytes for entry in entries.values()),
        )

    def _stored_form(self, value: Tensor, entry: Entry) -> Tensor:
        """Return a tensor on the host in the dtype that the source stores it in."""
        import torch

        dtype = getattr(torch, DTYPE_NAMES.get(entry.dtype, "float32"))
        return value.to(device="cpu", dtype=dtype)


def open_rewriting(source: Streamed, skeleton: Skeleton, out: Path) -> Rewriting:
    """Open a checkpoint for rewriting into `out`; `skeleton` has the result's config."""
    files = {name: _file(source, name) for name in source.source.entries}
    entries: Mapping[str, Entry] = {
        name: replace(entry, file=files[name]) for name, entry in source.source.entries.items()
    }
    written = Source(name=str(out), folder=out, entries=entries)
    if skeleton is source.skeleton:
        result = replace(source, source=written)
    else:
        shaped = replace(written, entries=_reshaped(entries, source, skeleton))
        result = stream(shaped, skeleton, device=source.device, dtype=source.dtype)
    return Rewriting(source=source, result=result, out=out)


def _file(source: Streamed, name: str) -> str:
    """Return the shard that a tensor will be written to."""
    inside = source.skeleton.family.blocks + "."
    target = source.naming.target.get(name, "")
    index = int(target[len(inside) :].split(".", 1)[0]) if target.startswith(inside) else -1
    return shard_name(index, len(source))


def _reshaped(
    entries: Mapping[str, Entry], source: Streamed, skeleton: Skeleton
) -> dict[str, Entry]:
    """Return the entries with the shapes of the result's parameters."""
    shapes = {name: tuple(value.shape) for name, value in skeleton.model.named_parameters()}
    found = {}
    for name, entry in entries.items():
        param = source.naming.target.get(name)
        plain = param in shapes and source.naming.pattern[name] is None
        found[name] = replace(entry, shape=shapes[param]) if plain and param else entry
    return found
