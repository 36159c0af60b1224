"""What a shrunk result must compute: its own numbers in modules of the source's shape, zeros in
place of all that went.

Legend: N rows of tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.checkpoint.shrink import put_back
from llmprune.checkpoint.shrink_experts import put_back_channels
from llmprune.checkpoint.sink import shard_name
from llmprune.checkpoint.skeleton import empty, fill
from llmprune.engine.factors import product_logits
from llmprune.engine.plan import Plan
from llmprune.engine.shipment import axes_of_block, cut_of_block
from llmprune.engine.sites import Group
from llmprune.mask.pattern import LowRank
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
    if isinstance(plan.pattern, LowRank):
        return product_logits(plan, blocks)
    kinds = {site.kind for site in plan.sites}
    computed = replace(
        blocks,
        source=replace(blocks.source, dtype=plan.dtype),
        result=replace(blocks.result, dtype=plan.dtype),
    )
    if blocks.result.skeleton is blocks.source.skeleton or EXPERTS in kinds:
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


def in_place_of_removed(plan: Plan) -> str:
    """Return what stands in the source's shapes for what a result has not."""
    return "products of factors" if isinstance(plan.pattern, LowRank) else "zeros"


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
    new = blocks.result.skeleton.shapes(place).keys() - shapes.keys()
    added = {name for name in new if name.endswith("bias")}  # a norm of a half that is gone may be
    whole_shapes = shapes | {bias: (shapes[_weight(bias)][0],) for bias in added}
    cut = {} if plan.form == "masked" else kept
    before = dict(module.named_buffers())
    axes = axes_of_block(plan.groups[index], cut, anatomy, whole_shapes, widths)
    with blocks.result.open(place) as small:
        found = small.values()
        found = {n: v for n, v in found.items() if n in before or n in whole_shapes}
        found = _channels_back(plan.groups[index], cut, anatomy, found, shapes)
        lost = shapes.keys() - found.keys()
        for (param, axis), index_N in axes.items():
            if param in found:
                found[param] = put_back(found[param], axis, index_N, whole_shapes[param][axis])
        whole = _without(source, index, lost)
        for name in added:  # a bias that the source's linear has no place for
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
            for name in added:
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._parameters[leaf] = None
            empty(module)
            fill(module, before)


def _channels_back(
    groups: Sequence[Group],
    kept: Mapping[str, Tensor],
    anatomy: Anatomy,
    params: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Return parameters with the channels of experts where they were, zeros in place of others."""
    rows = [(c, k) for c, k in cut_of_block(groups, kept) if c.kind == EXPERT_CHANNELS]
    couplings, units = [row for row, _ in rows], [kept_K for _, kept_K in rows]
    return put_back_channels(params, couplings, units, anatomy.linears, shapes)


def _weight(bias: str) -> str:
    """Return the weight that a bias belongs to."""
    return bias.removesuffix("bias") + "weight"


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
