"""A checkpoint rewritten with a smaller hidden size: one block in memory at a time, trunk last.

What becomes of a block follows from the source and the basis alone, so blocks may be written in any
order, and a run that was cut short goes on with those that are missing.
Legend: D hidden size, K channels that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import NumericalError, WontLoad
from llmprune.checkpoint.sink import (
    copy_side_files,
    shard_name,
    write_index,
    write_json,
    write_tensors,
)
from llmprune.checkpoint.skeleton import build_skeleton
from llmprune.checkpoint.source import Entry, read_header
from llmprune.hidden.roles import Blueprint, Roles
from llmprune.hidden.sizes import config_changes, config_of_width, entrance_scale, hidden_size
from llmprune.hidden.turning import narrow_block, narrow_trunk
from llmprune.walk.rewriting import DTYPE_NAMES
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Reads blocks of `source` as they are stored, and writes each on `basis` as a shard of `out`.

    `basis` is rotation_DK (float64, orthonormal columns) or kept_K (indices of channels), and
    `entrance` what the embeddings are multiplied with.
    """

    source: Streamed
    blueprint: Blueprint
    basis: Tensor
    entrance: float
    out: Path

    def __len__(self) -> int:
        return len(self.source)

    @property
    def width(self) -> int:
        """Return the hidden size of the result."""
        return int(self.basis.shape[-1])

    @property
    def unties(self) -> bool:
        """Tell whether head and embeddings, which the source ties, become two tensors."""
        return self.basis.dim() == 2 and self.blueprint.head not in self._trunk_params()

    def commit(self, index: int) -> Path:
        """Write one block; its bytes depend on the source and the basis alone.

        Raises:
            NumericalError: a weight is not finite, or no longer is in the dtype it is stored in.
        """
        prefix = self.source.skeleton.prefix(index)
        with self.source.stored_form().open(index) as block:
            params = {name: value.data for name, value in block.module.named_parameters()}
            roles = self.roles(index)
            found = narrow_block(params, roles, self.basis)
            _check_finite(found, prefix)
            changed = {prefix + name: found[name] for name in sorted(roles.axes)}
            return self._write(index, changed, set(self.source.naming.disk_names(prefix)))

    def commit_trunk(self) -> Path:
        """Write embeddings, last norm, head, and what no model uses, as the last shard."""
        naming, source = self.source.naming, self.source.source
        inside = self.source.skeleton.family.blocks + "."
        names = {n for n in source.entries if not naming.target.get(n, "").startswith(inside)}
        params = naming.to_params(source.get(sorted(naming.disk_names_of(self._trunk_params()))))
        found = narrow_trunk(params, self.blueprint, self.basis, entrance=self.entrance)
        _check_finite(found, "")
        return self._write(-1, found, names)

    def complete(self) -> None:
        """Write index, config and side files, once all shards are there."""
        entries: dict[str, Entry] = {}
        for index in (*range(len(self)), -1):
            entries |= read_header(self.out / shard_name(index, len(self)))
        write_index(
            self.out,
            {name: entry.file for name, entry in entries.items()},
            num_params=sum(entry.num_params for entry in entries.values()),
            num_bytes=sum(entry.num_bytes for entry in entries.values()),
        )
        copy_side_files(self.source.source.folder, self.out)
        config = self.source.source.config() | self.changes()
        write_json(self.out / "config.json", config)

    def changes(self) -> dict[str, Any]:
        """Return the entries of config.json that change."""
        return config_changes(self.source.model.config, self.width, untie=self.basis.dim() == 2)

    def roles(self, index: int) -> Roles:
        """Return the roles of a block's parameters; reads nothing."""
        width = hidden_size(self.source.model.config)
        return self.blueprint.block(self.source.skeleton.shapes(index), width)

    def _trunk_params(self) -> set[str]:
        """Return the trunk's parameters that the source stores."""
        trunk = set(self.source.skeleton.trunk_params())
        return trunk & set(self.source.naming.target.values())

    def _write(self, index: int, params: Mapping[str, Tensor], names: set[str]) -> Path:
        """Write parameters under the names that the source has on disk, and its others as they are.

        A head that the source has not is written under its name in the model.
        """
        naming, source = self.source.naming, self.source.source
        stored = set(naming.target.values())
        shard = {name: value for name, value in params.items() if name not in stored}
        shard |= naming.to_disk({name: v for name, v in params.items() if name in stored})
        for name, value in shard.items():
            if name in source.entries:
                kind = DTYPE_NAMES.get(source.entries[name].dtype, "float32")
                shard[name] = value.to("cpu", getattr(torch, kind))
        shard |= source.get(sorted(names - shard.keys()))
        path = self.out / shard_name(index, len(self))
        write_tensors(path, shard)
        return path


def open_narrowing(
    source: Streamed,
    out: Path,
    blueprint: Blueprint,
    basis: Tensor,
    *,
    trust_remote_code: bool = False,
) -> Narrowing:
    """Open a checkpoint for rewriting on a basis; nothing is read or written yet.

    Raises:
        UnsupportedModel: a parameter is not what the blueprint says, or the config takes no such
            hidden size.
        WontLoad: the smaller config makes a model of other shapes than what would be written.
    """
    config = source.model.config
    width = hidden_size(config)
    home = source.device if source.device.type == "cuda" else torch.device("cpu")
    basis = basis.to(home)
    found = Narrowing(
        source=source,
        blueprint=blueprint,
        basis=basis,
        entrance=1.0,
        out=out,
    )
    skeleton = build_skeleton(
        config_of_width(config, found.width, untie=basis.dim() == 2),
        dtype=source.model.dtype,
        attention=config._attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    returns = source.family.returns
    before = entrance_scale(source.model, source.modules, returns=returns)
    after = entrance_scale(skeleton.model, skeleton.blocks, returns=returns)
    found = replace(found, entrance=before / after)
    for index in range(len(source)):
        axes = found.roles(index).axes
        _check_shapes(source.skeleton.shapes(index), axes, skeleton.shapes(index), found.width)
    trunk = {
        name: tuple(source.model.get_parameter(name).shape) for name in skeleton.trunk_params()
    }
    made = {name: tuple(skeleton.model.get_parameter(name).shape) for name in trunk}
    _check_shapes(trunk, blueprint.trunk(width).axes, made, found.width)
    return found


def slice_checkpoint(
    source: Streamed,
    out: Path,
    blueprint: Blueprint,
    basis: Tensor,
    *,
    whole: Callable[[int], bool] = lambda index: False,
    trust_remote_code: bool = False,
) -> Narrowing:
    """Write a checkpoint on a basis into a folder, block by block; those that are `whole` stay.

    Raises:
        UnsupportedModel, WontLoad: before anything is written, see `open_narrowing`.
        NumericalError: a weight is not finite.
    """
    narrowing = open_narrowing(source, out, blueprint, basis, trust_remote_code=trust_remote_code)
    for index in range(len(narrowing)):
        if not whole(index):
            narrowing.commit(index)
    narrowing.commit_trunk()
    narrowing.complete()
    return narrowing


def _check_shapes(
    before: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, int],
    after: Mapping[str, tuple[int, ...]],
    width: int,
) -> None:
    """Check that the smaller config makes the shapes that parameters will have.

    Raises:
        WontLoad: it does not; names the first.
    """
    for name, shape in before.items():
        wanted = list(shape)
        if name in axes:
            wanted[axes[name]] = width
        if tuple(wanted) != after.get(name):
            raise WontLoad(
                f"with hidden size {width} the config makes {name} "
                f"{list(after.get(name, ()))}, but cut it is {wanted}: other sizes of this model "
                "follow from the hidden size. Prune widths inside the blocks instead: --pattern "
                "ffn-channels or heads."
            )


def _check_finite(params: Mapping[str, Tensor], prefix: str) -> None:
    """Check what is to be written.

    Raises:
        NumericalError: a value is not finite; names the tensor.
    """
    for name, value in params.items():
        if value.is_floating_point():
            low, high = torch.aminmax(value)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise NumericalError(
                    f"tensor {prefix}{name} holds NaN or infinity on the smaller stream. The "
                    "checkpoint is damaged, or stored in float16, where products of weights "
                    "overflow: convert it to bfloat16 and prune that."
                )
