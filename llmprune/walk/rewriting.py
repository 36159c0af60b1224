"""Streamed blocks with somewhere to write: a committed block is a shard, read back from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.types import Family
from llmprune.base.memory import return_freed
from llmprune.base.timeline import Timeline
from llmprune.base.worker import Worker
from llmprune.checkpoint.naming import result_names
from llmprune.checkpoint.sink import shard_name, write_index, write_tensors
from llmprune.checkpoint.skeleton import Skeleton, empty
from llmprune.checkpoint.source import Entry, Source, read_header
from llmprune.walk.ahead import Ahead
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
    `places` says where each source block stands in the result; those that went are absent.
    With `ahead` the next block is read while one computes, and a finished shard is written by
    `worker`, as records are; its tensors are `held` for the one walk through what is stored.
    """

    source: Streamed
    result: Streamed
    out: Path
    places: Mapping[int, int]
    worker: Worker = field(default_factory=partial(Worker, "writer"))
    ahead: Ahead | None = None
    timeline: Timeline = field(default_factory=Timeline)
    held: dict[int, dict[str, Tensor]] = field(default_factory=dict)

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
        ready = None if self.ahead is None else self.ahead.take(index)
        with ExitStack() as stack:
            with self.timeline.span("read", index):
                block = stack.enter_context(self.source.open(index, ready=ready))
            del ready
            yield block

    def expect(self, index: int) -> None:
        """Begin to read a block that will be opened next."""
        if self.ahead is not None:
            self.ahead.begin(index)

    def is_gone(self, index: int) -> bool:
        """Tell whether the result has nothing of a source block."""
        return index not in self.places

    def param_of(self, index: int, name: str) -> str:
        """Return the result's name of a parameter of a source block; "" where the block is gone."""
        if self.is_gone(index):
            return ""
        return self.result.skeleton.prefix(self.places[index]) + name

    @contextmanager
    def stored(self, index: int) -> Iterator[Block]:
        """Bring a committed block, by its number in the source, to the device from its shard.

        One that is still held is not read back: its bits are those that are written.
        """
        held = self.held.pop(index, None)
        with ExitStack() as stack:
            if held is None:
                self.settle()
            with self.timeline.span("read", index):
                block = stack.enter_context(self.result.open(self.places[index], held=held))
            held = None
            yield block

    def settle(self) -> None:
        """Wait for what is being written.

        Raises:
            LlmpruneError: it could not be written.
        """
        with self.timeline.span("wait for write"):
            self.worker.settle()

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        with self.source.trunk(head=head) as model:
            yield model

    def commit(
        self, block: Block, touched: set[str], redo: Callable[[Block], None] | None = None
    ) -> Path | None:
        """Write a block: what was decided, on the bits that the source stores.

        Where the block was computed with in another dtype than it is stored in, the decisions are
        carried out again on the stored values (`redo`), so that a kept weight keeps its bits.
        Solvers that update weights have no `redo`: what the module holds is written. Nothing is
        written of a block that is gone.
        """
        self.held.clear()
        self.settle()  # one shard at a time is held
        if self.is_gone(block.index):
            return None
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
        place = self.places[block.index]
        prefix = self.result.skeleton.prefix(place)
        shard: dict[str, Tensor] = {}
        for name in _stored_names(self.source, self.result.skeleton, block.index, place):
            origin = block.prefix + name
            if name in touched or not self._copies(origin, prefix + name):
                value = self._value(block, name)
                for disk, part in self.result.naming.to_disk({prefix + name: value}).items():
                    shard[disk] = self._stored_form(part, origin)
                if name in touched and name not in block.added:
                    empty(block.module, [name])
            else:
                stored = sorted(self.source.naming.disk_names_of([origin]))
                names = sorted(self.result.naming.disk_names_of([prefix + name]))
                found = self.source.source.get(stored)
                shard |= {new: found[old] for old, new in zip(stored, names, strict=True)}
        path = self.out / shard_name(place, len(self.result))
        if self.ahead is None:
            self._write_shard(path, shard, block.index)
            return path
        if self._converts:
            self.held[block.index] = shard
        self.worker.begin(partial(self._write_shard, path, shard, block.index))
        return path

    def _write_shard(self, path: Path, shard: dict[str, Tensor], index: int) -> None:
        with self.timeline.span("write shard", index):
            write_tensors(path, shard, settled=False)

    @property
    def _converts(self) -> bool:
        """Tell whether a stored block is computed with in copies of its tensors.

        Others are mapped from the file, as in a resumed run: the place of a tensor in memory may
        decide how sums are rounded.
        """
        stored = {entry.dtype for entry in self.result.source.entries.values()}
        dtype = self.result.dtype
        same = {name for name, value in DTYPE_NAMES.items() if f"torch.{value}" == str(dtype)}
        return dtype is not None and (self.device.type != "cpu" or not stored & same)

    def _copies(self, origin: str, param: str) -> bool:
        """Tell whether a parameter is stored in the result in as many tensors as in the source."""
        stored = self.source.naming.disk_names_of([origin])
        return 0 < len(stored) == len(self.result.naming.disk_names_of([param]))

    def _value(self, block: Block, name: str) -> Tensor:
        """Return a parameter from the module, or a bias that the block got; zeros for another."""
        import torch

        if name in block.added:
            return block.added[name]
        if (found := block.values().get(name)) is not None:
            return found
        shape = self.result.skeleton.shapes(self.places[block.index])[name]
        return torch.zeros(shape)

    def added(self) -> set[str]:
        """Return the tensors of the result that the source has no counterpart of."""
        found: set[str] = set()
        for index, place in self.places.items():
            before, after = self.source.skeleton.prefix(index), self.result.skeleton.prefix(place)
            for name in self.result.skeleton.shapes(place):
                if not self.source.naming.disk_names_of([before + name]):
                    found |= self.result.naming.disk_names_of([after + name])
        return found

    def lost(self) -> list[str]:
        """Return the tensors of the source that the result has no counterpart of, sorted."""
        kept: set[str] = set()
        for index, place in self.places.items():
            before, after = self.source.skeleton.prefix(index), self.result.skeleton.prefix(place)
            for name in _stored_names(self.source, self.result.skeleton, index, place):
                stored = self.source.naming.disk_names_of([before + name])
                written = self.result.naming.disk_names_of([after + name])
                if len(stored) == len(written):
                    kept |= stored
        inside = self.source.skeleton.family.blocks + "."
        target = self.source.naming.target
        return sorted(n for n, p in target.items() if p.startswith(inside) and n not in kept)

    def commit_trunk(self) -> Path:
        """Copy what is not in a block into the last shard, bit for bit."""
        source = self.source.source
        inside = self.source.skeleton.family.blocks + "."
        names = [
            name
            for name in source.entries
            if not self.source.naming.target.get(name, "").startswith(inside)
        ]
        path = self.out / shard_name(-1, len(self.result))
        write_tensors(path, source.get(sorted(names)))
        return path

    def write_index(self) -> None:
        """Write the index of all shards."""
        entries: dict[str, Entry] = {}
        for index in (*range(len(self.result)), -1):
            entries |= read_header(self.out / shard_name(index, len(self.result)))
        write_index(
            self.out,
            {name: entry.file for name, entry in entries.items()},
            num_params=sum(entry.num_params for entry in entries.values()),
            num_bytes=sum(entry.num_bytes for entry in entries.values()),
        )

    def _stored_form(self, value: Tensor, origin: str) -> Tensor:
        """Return a tensor on the host in the dtype that the source stores its parameter in."""
        import torch

        dtype = DTYPE_NAMES.get(_stored_dtype(self.source, origin), "float32")
        return value.to(device="cpu", dtype=getattr(torch, dtype))


def open_rewriting(
    source: Streamed,
    skeleton: Skeleton,
    out: Path,
    places: Mapping[int, int] | None = None,
    *,
    overlaps: bool = False,
    timeline: Timeline | None = None,
) -> Rewriting:
    """Open a checkpoint for rewriting into `out`; `skeleton` has the result's config.

    `places` says where each source block stands in the result; none means that all stay. Where it
    `overlaps`, blocks are read ahead and shards written while the next block computes.
    """
    timeline = timeline or Timeline()
    places = {index: index for index in range(len(source))} if places is None else places
    entries = _entries(source, skeleton, places)
    written = Source(name=str(out), folder=out, entries=entries)
    if skeleton is source.skeleton:
        result = replace(source, source=written)
    else:
        result = stream(written, skeleton, device=source.device, dtype=source.dtype)
    return Rewriting(
        source=source,
        result=result,
        out=out,
        places=places,
        ahead=Ahead(source, timeline) if overlaps else None,
        timeline=timeline,
    )


def _entries(source: Streamed, skeleton: Skeleton, places: Mapping[int, int]) -> dict[str, Entry]:
    """Return what will be stored, by name: the shard, the shape and the dtype of every tensor."""
    num_blocks = len(skeleton.blocks)
    inside = skeleton.family.blocks + "."
    trunk = shard_name(-1, num_blocks)
    found = {
        name: replace(entry, file=trunk)
        for name, entry in source.source.entries.items()
        if not source.naming.target.get(name, "").startswith(inside)
    }
    for index, place in places.items():
        before, after = source.skeleton.prefix(index), skeleton.prefix(place)
        for name in _stored_names(source, skeleton, index, place):
            origin = before + name if source.naming.disk_names_of([before + name]) else None
            dtype = _stored_dtype(source, before + name)
            named = result_names(source.naming, skeleton.model, after + name, origin)
            for disk, part in named.items():
                file = shard_name(place, num_blocks)
                found[disk] = Entry(file=file, dtype=dtype, shape=part)
    return found


def _stored_names(source: Streamed, skeleton: Skeleton, index: int, place: int) -> list[str]:
    """Return what is stored of a block of the result: parameters, and buffers that the source has
    stored."""
    before, params = source.skeleton.prefix(index), skeleton.shapes(place)
    return sorted(
        name
        for name in skeleton.stored_shapes(place)
        if name in params or source.naming.disk_names_of([before + name])
    )


def _stored_dtype(source: Streamed, param: str) -> str:
    """Return the dtype that a parameter is stored in; of one that is new, that of its module."""
    names, owner = source.naming.disk_names_of([param]), param
    while not names and (owner := owner.rpartition(".")[0]):
        names = set(source.naming.disk_names(owner + "."))
    return source.source.entries[min(names)].dtype if names else "F32"
