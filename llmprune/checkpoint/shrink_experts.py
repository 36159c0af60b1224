"""Cutting experts, and channels of experts, out of a block; zeros in place of these channels again.

Experts lie in stacks, (E, 2F, D) and (E, D, F), or are modules in a list. Which channels an expert
keeps is its own affair. Legend: E experts, F channels of one, D hidden size, K kept units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.arch.experts import NUMBERED, axes_by_expert, homes_of, owner_of, parent_of, root_of
from llmprune.arch.types import Coupling, Linear, Span
from llmprune.base.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

Linears = Mapping[str, Linear]
Chosen = dict[tuple[str, int], dict[int | None, list[int]]]
"""By parameter and axis of one of its matrices: the entries that stay, by expert."""


def without_units(
    params: Mapping[str, Tensor], kept: Sequence[tuple[Coupling, Tensor]], linears: Linears
) -> dict[str, Tensor]:
    """Return a block's parameters and buffers without the experts, or their channels, that go.

    Couplings of other kinds are passed over; what nothing is cut out of is the same object.
    """
    found = dict(params)
    channels = [(row, kept_K) for row, kept_K in kept if row.kind == EXPERT_CHANNELS]
    for coupling, kept_K in kept:
        if coupling.kind == EXPERTS and len(kept_K) < coupling.num_units:
            found = cut_experts(found, coupling, kept_K, linears)
    if any(len(kept_K) < row.num_units for row, kept_K in channels):
        rows, units = zip(*channels, strict=True)
        found = cut_expert_channels(found, rows, units, linears)
    return found


def cut_experts(
    params: Mapping[str, Tensor], coupling: Coupling, kept_K: Tensor, linears: Linears
) -> dict[str, Tensor]:
    """Return a block's parameters and buffers with these experts (indices) alone.

    What has no entry per expert is the same object as before. Experts in a list are numbered anew.

    Raises:
        UnsupportedModel: a tensor beside the experts has an entry per expert, and is not known.
        ValueError: the groups of the router would not lose equally many.
    """
    kept = sorted(int(expert) for expert in kept_K)
    _check_groups(coupling, kept)
    shapes = {name: tuple(value.shape) for name, value in params.items()}
    homes = homes_of(linears) | {root_of(name, owner_of(linears)) for name, _ in coupling.vectors}
    axes = axes_by_expert(shapes, coupling.num_units, homes, linears)
    place = {expert: index for index, expert in enumerate(kept)}
    cut: dict[str, Tensor] = {}
    for name, value in params.items():
        match = NUMBERED.match(name)
        if name in axes:
            index_K = kept_K.new_tensor(kept).to(value.device)
            cut[name] = value.index_select(axes[name], index_K)
        elif match is None or match[1] not in homes:
            cut[name] = value
        elif int(match[2]) in place:
            cut[f"{match[1]}.{place[int(match[2])]}{name[match.end() :]}"] = value
    return cut


def cut_expert_channels(
    params: Mapping[str, Tensor],
    couplings: Sequence[Coupling],
    kept: Sequence[Tensor],
    linears: Linears,
) -> dict[str, Tensor]:
    """Return a block's parameters with these channels (indices, one kept_K per coupling) alone.

    Which channels an expert keeps is its own affair, how many is not. What holds no channel is the
    same object as before; channels keep their order.

    Raises:
        ValueError: couplings keep different numbers, or not all experts of a stack are cut.
        UnsupportedModel: a tensor of the experts seems to have an entry per channel, unknown here.
    """
    if len({len(kept_K) for kept_K in kept}) != 1:
        raise ValueError(
            f"{sorted({len(kept_K) for kept_K in kept})} channels would be left of experts that "
            "lie in one stack: all must keep equally many. Give the same count for each."
        )
    cut = dict(params)
    for (param, axis), by_expert in _chosen(couplings, kept, linears, params).items():
        cut[param] = _sliced(param, cut[param], axis, by_expert)
    _check_channels(params, cut, couplings, linears)
    return cut


def put_back_channels(
    params: Mapping[str, Tensor],
    couplings: Sequence[Coupling],
    kept: Sequence[Tensor],
    linears: Linears,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Return cut parameters in their old shapes: channels where they were, zeros elsewhere."""
    import torch

    back = dict(params)
    for (param, axis), by_expert in _chosen(couplings, kept, linears, params).items():
        whole = list(back[param].shape)
        stacked = None not in by_expert
        whole[axis + stacked] = shapes[param][axis + stacked]
        wide = back[param].new_zeros(whole)
        for expert, places in by_expert.items():
            one, small = (each if expert is None else each[expert] for each in (wide, back[param]))
            one.index_copy_(axis, torch.tensor(sorted(places), device=one.device), small)
        back[param] = wide
    return back


def _chosen(
    couplings: Sequence[Coupling],
    kept: Sequence[Tensor],
    linears: Linears,
    params: Mapping[str, Tensor],
) -> Chosen:
    """Return which entries stay, by parameter and axis of one matrix, biases of rows included."""
    chosen: Chosen = {}
    for coupling, kept_K in zip(couplings, kept, strict=True):
        for span in coupling.spans:
            linear, out = linears[span.linear], span.axis == "out"
            entries = _places(linear, span, kept_K)
            axis = int(out == linear.transposed)
            biases = [(_bias(linear.param), 0)] * (out and _bias(linear.param) in params)
            for place in ((linear.param, axis), *biases):
                chosen.setdefault(place, {}).setdefault(linear.expert, []).extend(entries)
    return chosen


def _check_groups(coupling: Coupling, kept: Sequence[int]) -> None:
    """Check that every group of the router keeps equally many experts.

    Raises:
        ValueError: they do not, or an expert is named twice or does not exist.
    """
    if len(set(kept)) != len(kept) or not kept or kept[-1] >= coupling.num_units or kept[0] < 0:
        raise ValueError(f"{kept} are not some of {coupling.num_units} experts, each named once")
    size = coupling.num_units // coupling.num_groups
    counts = [sum(e // size == group for e in kept) for group in range(coupling.num_groups)]
    if len(set(counts)) != 1:
        raise ValueError(
            f"the groups of the router would keep {counts} experts: they must stay equal. Keep "
            "equally many of each."
        )


def _places(linear: Linear, span: Span, kept_K: Tensor) -> list[int]:
    """Return the rows (or columns) of the whole matrix that these units own."""
    own = [
        span.offset + unit * span.width + step
        for unit in sorted(kept_K.tolist())
        for step in range(span.width)
    ]
    if span.axis == "in" or linear.num_parts == 1:
        return own
    if linear.interleaved:
        return [place * linear.num_parts + linear.part for place in own]
    return [linear.part * linear.shape[0] + place for place in own]


def _sliced(
    name: str, value: Tensor, axis: int, by_expert: Mapping[int | None, list[int]]
) -> Tensor:
    """Return a parameter, or all matrices of a stack, with these slices of one axis.

    Raises:
        ValueError: matrices of the stack are missing.
    """
    import torch

    def part(one: Tensor, places: list[int]) -> Tensor:
        return one.index_select(axis, torch.tensor(sorted(places), device=one.device))

    if None in by_expert:
        return part(value, by_expert[None])
    if sorted(expert for expert in by_expert if expert is not None) != list(range(len(value))):
        raise ValueError(
            f"{name} stacks {len(value)} experts, of which {len(by_expert)} would be cut: one "
            "cannot be narrower than another. Cut all of them."
        )
    return torch.stack([part(value[expert], by_expert[expert]) for expert in range(len(value))])


def _check_channels(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    couplings: Sequence[Coupling],
    linears: Linears,
) -> None:
    """Check that nothing else of the experts' modules has an entry per channel.

    Raises:
        UnsupportedModel: something may have.
    """
    width = couplings[0].num_units
    narrow = {_bias(linears[row.spans[-1].linear].param) for row in couplings}  # D may equal F
    for name, value in before.items():
        home = parent_of(name) in homes_of(linears)
        if home and after[name] is value and name not in narrow and width in value.shape[1:]:
            raise UnsupportedModel(
                f"{name} {list(value.shape)} may have an entry for each of {width} channels, and "
                "it is not known which: a channel cannot go without it"
            )


def _bias(param: str) -> str:
    """Return the name of the bias that belongs to a weight."""
    own = param.endswith(".weight")
    return param.removesuffix("weight") + "bias" if own else param + "_bias"
