"""Blocks streamed from a checkpoint: one at a time on the device, the rest on meta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError
from llmprune.base.memory import return_freed
from llmprune.checkpoint.naming import Naming, naming_of
from llmprune.checkpoint.skeleton import Skeleton, empty, fill, tie, untie
from llmprune.checkpoint.source import Source
from llmprune.walk.block import Block

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A checkpoint opened for walking; `dtype` None keeps the stored dtype (no forward is run)."""

    source: Source
    skeleton: Skeleton
    naming: Naming
    unused: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype | None

    def __len__(self) -> int:
        return len(self.skeleton.blocks)

    @property
    def model(self) -> Any:
        return self.skeleton.model

    @property
    def family(self) -> Family:
        return self.skeleton.family

    @property
    def modules(self) -> Any:
        return self.skeleton.blocks

    def anatomy(self, index: int) -> Anatomy:
        """Return the linears and taps of a block; reads nothing."""
        return anatomy_of(self.skeleton.family, self.skeleton.shapes(index))

    def stored_form(self) -> Streamed:
        """Return the same blocks on the host in the dtype that each tensor is stored in."""
        import torch

        return replace(self, device=torch.device("cpu"), dtype=None)

    @contextmanager
    def open(
        self,
        index: int,
        *,
        ready: dict[str, Tensor] | None = None,
        held: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Block]:
        """Read one block and bring it to the device; it is freed at the end.

        Nothing is read of `ready` parameters that are on the device, or of tensors, by their names
        on disk, that are `held` in memory.
        """
        prefix = self.skeleton.prefix(index)
        module = self.skeleton.blocks[index]
        before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        try:
            if ready is None:
                self._fill(module, self.naming.disk_names(prefix), prefix, held)
            while ready:
                name, value = ready.popitem()
                fill(module, {name.removeprefix(prefix): value})
            yield Block(
                index=index,
                prefix=prefix,
                module=module,
                anatomy=self.anatomy(index),
                device=self.device,
            )
        finally:
            fill(module, before)  # on meta, in the shapes of the source
            return_freed()

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        """Read embeddings (or, with `head`, all of the trunk but untied token embeddings)."""
        model = self.model
        entrance, exit_ = model.get_input_embeddings(), model.get_output_embeddings()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        unwanted = None if tied else (entrance if head else exit_).weight
        trunk = set(self.skeleton.trunk_params())
        names = [  # a tied parameter is stored, and filled, under the name it is tied to
            tied.get(name, name)
            for name, value in model.named_parameters()
            if name in trunk and value is not unwanted
        ]
        self._move_buffers()
        try:
            self._fill(model, sorted(self.naming.disk_names_of(names)))
            tie(model)
            yield model
        finally:
            empty(model, names)
            tie(model)
            return_freed()

    def _fill(
        self,
        module: Any,
        disk_names: list[str],
        prefix: str = "",
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Read tensors into a module's parameters, one by one in device and dtype."""
        stored = self.source.get(disk_names) if held is None else dict(held)
        params = self.naming.to_params(stored)
        for name in list(params):
            value = params.pop(name)
            wanted = self.dtype if value.is_floating_point() else None
            ready = value.to(device=self.device, dtype=wanted or value.dtype)
            fill(module, {name.removeprefix(prefix): ready})

    def _move_buffers(self) -> None:
        """Bring the (small, real) buffers to the device."""
        for module in self.model.modules():
            for key, value in module._buffers.items():
                if (
                    value is not None
                    and value.device != self.device
                    and value.device.type != "meta"
                ):
                    module._buffers[key] = value.to(self.device)


def stream(
    source: Source,
    skeleton: Skeleton,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Streamed:
    """Open a checkpoint for walking, checking names and shapes without reading a weight.

    Raises:
        CheckpointError: a parameter has no tensor on disk, or one of another shape.
    """
    naming, unused = naming_of(skeleton.model, source.entries)
    covered = set(naming.target.values())
    untie(skeleton.model, covered)
    tied = set(getattr(skeleton.model, "all_tied_weights_keys", None) or {})
    for name, value in skeleton.model.named_parameters():
        if name not in covered and name not in tied:
            raise CheckpointError(
                f"{source.name} holds no tensor for {name}, which config.json asks for; "
                "transformers would fill it with random numbers. Fetch the checkpoint again."
            )
        _check_shape(source, naming, name, tuple(value.shape))
    return Streamed(
        source=source,
        skeleton=skeleton,
        naming=naming,
        unused=unused,
        device=device,
        dtype=dtype,
    )


def _check_shape(source: Source, naming: Naming, param: str, shape: tuple[int, ...]) -> None:
    """Check that the tensors on disk of a parameter give its shape, or merge to its size.

    Raises:
        CheckpointError: they do not.
    """
    merged: dict[str, set[tuple[int, ...]]] = {}
    size = 0
    for disk in naming.disk_names_of([param]):
        entry, pattern = source.entries[disk], naming.pattern[disk]
        if pattern is None and entry.shape != shape:
            raise CheckpointError(
                f"{disk} of {source.name} has shape {list(entry.shape)}, but config.json makes it "
                f"{list(shape)}. Config and weights belong to different models."
            )
        merged.setdefault(str(pattern), set()).add(entry.shape)
        size += entry.num_params
    wanted = math.prod(shape)
    if merged and (size != wanted or any(len(shapes) > 1 for shapes in merged.values())):
        raise CheckpointError(
            f"the tensors of {source.name} that merge into {param} hold {size:,} values in shapes "
            f"{sorted(s for shapes in merged.values() for s in shapes)}, where config.json needs "
            f"{wanted:,}. One is missing or of another model; fetch the checkpoint again."
        )
