"""What a shrunk result must compute: its own numbers in modules of the source's shape, zeros in
place of all that went.

Legend: N rows of tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.checkpoint.shrink import put_back
from llmprune.checkpoint.sink import shard_name
from llmprune.checkpoint.skeleton import empty, fill
from llmprune.engine.plan import Plan
from llmprune.engine.shipping import axes_of_block
from llmprune.walk.block import Block
from llmprune.walk.forward import advance, embed, logits
from llmprune.walk.rewriting import Rewriting

if TYPE_CHECKING:
    from torch import Tensor

Logits = Callable[["Tensor"], "Tensor"]


def masked_logits(plan: Plan, blocks: Rewriting, own: Path) -> Logits | None:
    """Return what gives logits (N, T, V) of token ids (N, T), on the host, for the masked model.

    Every stored block is put into a block of the source's shape. None where the result's shapes are
    the source's, or where experts went: no weight that is zero keeps a router from choosing one.
    """
    kinds = {site.kind for site in plan.sites}
    computed = replace(
        blocks,
        source=replace(blocks.source, dtype=plan.dtype),
        result=replace(blocks.result, dtype=plan.dtype),
    )
    if blocks.result.skeleton is blocks.source.skeleton or kinds & {EXPERTS, EXPERT_CHANNELS}:
        return None

    def logits_of(tokens_NT: Tensor) -> Tensor:
        flow = embed(computed.source, tokens_NT, len(tokens_NT))
        for index in range(len(computed)):
            if not computed.is_gone(index):
                kept = read_kept(own, index, len(computed))
                with _expanded(plan, computed, index, kept) as block:
                    advance(block, flow)
        parts = [part.cpu() for _, _, part in logits(computed.source, flow)]
        return torch.cat(parts, 1)

    return logits_of


def read_kept(own: Path, index: int, num_blocks: int) -> dict[str, Tensor]:
    """Return the units kept of a source block, by site."""
    from safetensors import safe_open

    name = shard_name(index, num_blocks).replace("model-", "masks-")
    with safe_open(str(own / name), "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return {key: value.long() for key, value in tensors.items() if value.dtype == torch.int32}


@contextmanager
def _expanded(
    plan: Plan, blocks: Rewriting, index: int, kept: Mapping[str, Tensor]
) -> Iterator[Block]:
    """Put a stored block into the source's module."""
    source, place = blocks.source, blocks.places[index]
    module, shapes = source.skeleton.blocks[index], source.skeleton.shapes(index)
    widths = plan.shipment.widths if plan.shipment else {}
    anatomy = source.anatomy(index)
    axes = axes_of_block(plan.groups[index], kept, anatomy, shapes, widths)
    with blocks.result.open(place) as small:
        found = {name: value.data for name, value in small.module.named_parameters()}
        lost = shapes.keys() - found.keys()
        for (param, axis), index_N in axes.items():
            if param in found:
                found[param] = put_back(found[param], axis, index_N, shapes[param][axis])
        whole = _without(source, index, lost)
        extra = found.keys() - shapes.keys()
        for name in extra:  # a bias that the source's linear has no place for
            owner, _, leaf = name.rpartition(".")
            bias = torch.nn.Parameter(found.pop(name), requires_grad=False)
            module.get_submodule(owner)._parameters[leaf] = bias
        fill(module, whole | found)
        try:
            yield Block(
                index=index,
                prefix=source.skeleton.prefix(index),
                module=module,
                anatomy=anatomy,
                device=source.device,
            )
        finally:
            for name in extra:
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = None
            empty(module)


def _without(source: object, index: int, lost: set[str]) -> dict[str, Tensor]:
    """Return the parameters that the result lacks: matrices and biases are zero, others as in the
    source."""
    with source.open(index) as block:  # type: ignore[attr-defined]
        params = {name: value.data for name, value in block.module.named_parameters()}
        return {
            name: torch.zeros_like(params[name])
            if params[name].dim() > 1 or name.endswith("bias")
            else params[name].clone()
            for name in lost
        }
