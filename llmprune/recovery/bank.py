"""Which weights of a model stay, by parameter: the masks that pruning stored, nothing else.

A kept weight may happen to be zero, so masks are not read off weights. Where the two agree a mask
is not held: while the weights are frozen it is made from them on the fly.
Legend: O outputs, I inputs; keep has the shape of the parameter, which may be fused or stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune.base.errors import CheckpointError
from llmprune.delivery.masks import MaskFiles
from llmprune.walk.resident import Resident

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Bank:
    """Masks by the name of their parameter in the model; bool, on the model's device."""

    keeps: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keeps)

    @property
    def num_removed(self) -> int:
        """Return how many weights the masks remove."""
        return sum(int((~keep).sum()) for keep in self.keeps.values())

    def violations(self, params: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
        """Yield parameters that have numbers where their mask says removed, with how many."""
        for name, keep in self.keeps.items():
            count = int((params[name][~keep] != 0).sum())
            if count:
                yield name, count

    def hold(self, params: Mapping[str, Tensor]) -> None:
        """Put zeros where weights are removed, in place."""
        for name, keep in self.keeps.items():
            params[name].data.mul_(keep)


def stored_bank(folder: Path, blocks: Resident) -> Bank:
    """Return the masks of a result by parameter, an empty bank where it stores none.

    Raises:
        CheckpointError: a mask is of a linear that the model lacks, or has another shape.
    """
    files = MaskFiles(folder)
    keeps: dict[str, Tensor] = {}
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            for full, keep_OI in files.of_block(block.prefix).items():
                linear = block.anatomy.linears.get(full.removeprefix(block.prefix))
                if linear is None or linear.shape != tuple(keep_OI.shape):
                    raise CheckpointError(
                        f"{folder}: the mask of {full} fits no linear of the model "
                        f"(shape {tuple(keep_OI.shape)}). The folder was changed after pruning; "
                        "prune the model again."
                    )
                param = block.module.get_parameter(linear.param)
                name = block.prefix + linear.param
                if name not in keeps:
                    keeps[name] = torch.ones_like(param, dtype=torch.bool)
                linear.view(keeps[name]).copy_(keep_OI)
    return Bank(keeps=keeps)


def bank_of_zeros(blocks: Resident) -> Bank:
    """Return masks that remove what is zero in the linears of a model.

    For results of other tools. Linears without any zero get no mask.
    """
    keeps: dict[str, Tensor] = {}
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            for linear in block.anatomy.linears.values():
                param = block.module.get_parameter(linear.param).data
                name = block.prefix + linear.param
                keep_OI = linear.view(param) != 0
                if bool(keep_OI.all()):
                    continue
                if name not in keeps:
                    keeps[name] = torch.ones_like(param, dtype=torch.bool)
                linear.view(keeps[name]).copy_(keep_OI)
    return Bank(keeps=keeps)
