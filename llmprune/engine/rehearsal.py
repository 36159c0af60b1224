"""Try on a miniature what a result's config asks of its family: fewer units, fewer blocks.

Shapes and kinds of blocks can be right and the meaning wrong: where a size also scales something,
or where a block computes with its own number. So half of the units of a miniature go, and the first
block, and what is left must compute what it did with zeros in their place.

Legend: N rows, T tokens, U units, K units kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.couplings import BLOCK, CHANNELS, HEADS, QUERY_HEADS, heads_of
from llmprune.arch.layout import BlockLayout, Layout
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.resize import as_mistral, check_blocks_alike, resized
from llmprune.arch.types import Coupling, Family
from llmprune.base.errors import WontLoad
from llmprune.checkpoint.shrink import axes_of, take
from llmprune.checkpoint.skeleton import use_eager_experts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRIED = (CHANNELS, HEADS, QUERY_HEADS, BLOCK)
ROWS = 2
TOLERANCE = 1e-4  # of the largest logit; a wrong meaning changes as much as a unit does


def check_meaning(
    config: Any,
    family: Family,
    kinds: Sequence[str],
    result_type: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Check that fewer units of these kinds mean the same model with zeros in place of the others.

    `config` is that of the source, `result_type` the model type of the result. What a miniature
    cannot show is left to the gate.

    Raises:
        WontLoad: they mean another model.
    """
    tried = [kind for kind in TRIED if kind in kinds]
    while tried:
        apart = _try(config, family, tried, result_type, trust_remote_code)
        if apart is not None and apart > TOLERANCE:
            units = ", ".join("blocks" if kind == BLOCK else kind for kind in tried)
            raise WontLoad(
                f"a {config.model_type} model with fewer {units} computes something else than with "
                f"zeros in their place (logits of a miniature are {apart:.1e} apart): its config "
                "gives the other sizes, or block numbers, another meaning. Type --set "
                "prune.form=masked, or choose another --pattern."
            )
        if apart is not None or BLOCK not in tried:
            return
        tried.remove(BLOCK)  # no config says what is left of so few blocks; widths may be tried


def _try(
    config: Any, family: Family, kinds: Sequence[str], result_type: str, trust: bool
) -> float | None:
    """Return how far apart the logits are, relative to the largest; None where nothing was cut."""
    import torch

    whole = miniature_model(config, trust_remote_code=trust)
    _strengthen(whole)
    use_eager_experts(whole)
    family = replace(family, heads=heads_of(whole.config), mixture=None, seen=None)
    blocks = whole.get_submodule(family.blocks)
    anatomies = [anatomy_of(family, _shapes(block)) for block in blocks]
    kept = [_half(anatomy, kinds) for anatomy in anatomies]
    places = [index for index in range(len(blocks)) if BLOCK not in kinds or index]
    layout = Layout(
        blocks=tuple(BlockLayout(source=index, sizes=_sizes(kept[index])) for index in places)
    )
    small = _built(whole.config, layout, kept, result_type, trust) if layout.uniform else None
    if small is None:
        return None
    state, inside = whole.state_dict(), family.blocks + "."
    found = {name: value for name, value in state.items() if not name.startswith(inside)}
    for place, index in enumerate(places):
        axes = axes_of(kept[index], anatomies[index].linears, _shapes(blocks[index]))
        prefix = f"{inside}{index}."
        for name in (name for name in state if name.startswith(prefix)):
            value, own = state[name], name.removeprefix(prefix)
            for axis in (0, 1):
                if (own, axis) in axes:
                    value = take(value, axis, axes[own, axis])
            found[f"{inside}{place}.{own}"] = value
    try:
        missing, _ = small.load_state_dict(found, strict=False)
        check_blocks_alike(blocks, small.get_submodule(family.blocks), layout, {})
    except (RuntimeError, WontLoad):  # the model itself was compared block by block before
        return None
    if set(missing) & {name for name, _ in small.named_parameters()}:
        return None
    with torch.no_grad():
        for index, block in enumerate(blocks):
            _silence(block, anatomies[index], kept[index])
            if index not in places:
                block.forward = _identity(family.returns)
        return _apart(whole, small)


def _strengthen(model: Any) -> None:
    """Give blocks an effect: at their usual spread they have almost none, and biases are zero."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif value.dim() > 1:
                value.mul_(5)


def _half(anatomy: Anatomy, kinds: Sequence[str]) -> list[tuple[Coupling, Tensor]]:
    """Return every second unit of each coupling of these kinds, of each of its groups."""
    import torch

    found = []
    for row in anatomy.couplings:
        if row.kind in kinds and row.kind != BLOCK:
            units_GU = torch.arange(row.num_units).view(row.num_groups, -1)
            found.append((row, units_GU[:, -((units_GU.shape[1] + 1) // 2) :].reshape(-1)))
    return found


def _sizes(kept: Sequence[tuple[Coupling, Tensor]]) -> dict[str, int]:
    return {key: per * len(units_K) for row, units_K in kept for key, per in row.config_keys}


def _built(
    config: Any,
    layout: Layout,
    kept: Sequence[Sequence[tuple[Coupling, Tensor]]],
    result_type: str,
    trust: bool,
) -> Any | None:
    """Return the model that a config makes of a layout; None where there is no such model."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    pinned = {key: value for here in kept for row, _ in here for key, value in row.pinned}
    data = resized(config.to_dict(), layout, layout.widest | pinned)
    config_class = type(config)
    if result_type != config.model_type:
        data, config_class = as_mistral(data), CONFIG_MAPPING[result_type]
    try:
        own = config_class.from_dict(data)
        own._attn_implementation = config._attn_implementation
        small = AutoModelForCausalLM.from_config(own, trust_remote_code=trust)
    except Exception:  # configs are validated in many ways; the result's own passed all of them
        return None
    use_eager_experts(small)
    return small.float().eval()


def _shapes(block: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in block.named_parameters()}


def _silence(block: Any, anatomy: Anatomy, kept: Sequence[tuple[Coupling, Tensor]]) -> None:
    """Set to zero what is read of the units that go."""
    import torch

    for row, units_K in kept:
        gone_U = torch.ones(row.num_units, dtype=torch.bool)
        gone_U[units_K] = False
        for span in row.spans:
            if span.axis == "in":
                linear = anatomy.linears[span.linear]
                weight_OI = linear.view(block.get_parameter(linear.param).data)
                wide = row.num_units * span.width
                read_OI = weight_OI[:, span.offset : span.offset + wide]
                read_OI.masked_fill_(gone_U.repeat_interleave(span.width), 0)


def _identity(returns: int) -> Any:
    """Return the forward of a block that does nothing."""

    def forward(hidden_NTD: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_NTD, *[None] * (returns - 1)) if returns else hidden_NTD

    return forward


def _apart(whole: Any, small: Any) -> float:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(3, whole.config.vocab_size, (ROWS, SEQ_LEN), generator=generator)
    expected = whole(input_ids=tokens_NT, use_cache=False).logits
    found = small(input_ids=tokens_NT, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())
