"""Cutting units out of a block's parameters, and putting zeros in their place again.

Every axis of a parameter that units lie on gets an index: which of the old entries stand where, -1
where there is nothing but zeros. Legend: K units kept, N entries of the new axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmprune.arch.couplings import EXPERT_CHANNELS, EXPERTS
from llmprune.arch.types import Coupling, Linear, Span

if TYPE_CHECKING:
    from torch import Tensor

Kept = Sequence[tuple[Coupling, "Tensor"]]
"""Couplings of one block with the units kept of each, ascending indices kept_K."""
MIXED = (EXPERTS, EXPERT_CHANNELS)
Axes = dict[tuple[str, int], "Tensor"]
"""By parameter (relative to its block) and axis: the index_N of what stands there."""


def axes_of(
    kept: Kept,
    linears: Mapping[str, Linear],
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int] | None = None,
) -> Axes:
    """Return the index of every axis that changes, biases and vectors per unit included.

    `widths` says to how many units a coupling, by name, is filled up with zeros. Experts and their
    channels are passed over: in a stack every expert has an index of its own.
    """
    kept = [(coupling, units) for coupling, units in kept if coupling.kind not in MIXED]
    found: Axes = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for (name, axis), index_N in linear_axes(kept, linears, widths).items():
        linear = linears[name]
        if axis == 1:
            found[linear.param, 0 if linear.transposed else 1] = index_N
        else:
            rows.setdefault(linear.param, {})[linear.part] = index_N
    for param, pieces in rows.items():
        fused = {row.part: row for row in linears.values() if row.param == param}
        index_N = _joined(pieces, fused)
        found[param, 1 if fused[min(pieces)].transposed else 0] = index_N
        bias = param.removesuffix("weight") + "bias"
        if bias in shapes:
            found[bias, 0] = index_N
    for coupling, kept_K in kept:
        units_N = _filled(kept_K, (widths or {}).get(coupling.name, len(kept_K)))
        for name, width in coupling.vectors:
            found[name, 0] = _spread(units_N, width, 0)
    return found


def linear_axes(
    kept: Kept, linears: Mapping[str, Linear], widths: Mapping[str, int] | None = None
) -> Axes:
    """Return the index of every axis (0 rows, 1 columns) of linears that changes, by name."""
    spans: dict[tuple[str, int], list[tuple[Span, Tensor, int]]] = {}
    for coupling, kept_K in kept:
        units_N = _filled(kept_K, (widths or {}).get(coupling.name, len(kept_K)))
        for span in coupling.spans:
            if span.axis in ("out", "in"):
                key = span.linear, 0 if span.axis == "out" else 1
                spans.setdefault(key, []).append((span, units_N, coupling.num_units))
    return {key: _along(parts, linears[key[0]].shape[key[1]]) for key, parts in spans.items()}


def take(value: Tensor, axis: int, index_N: Tensor) -> Tensor:
    """Return a parameter with the entries of an axis that an index names, zeros where it has -1.

    >>> import torch
    >>> take(torch.tensor([5.0, 6.0, 7.0]), 0, torch.tensor([2, -1]))
    tensor([7., 0.])
    """
    index_N = index_N.to(value.device)
    taken = value.index_select(axis, index_N.clamp(min=0))
    if bool((index_N < 0).any()):
        shape = [1] * value.dim()
        shape[axis] = len(index_N)
        taken.masked_fill_((index_N < 0).view(shape), 0)
    return taken.contiguous()


def put_back(value: Tensor, axis: int, index_N: Tensor, length: int) -> Tensor:
    """Return a cut parameter in its old length: entries where they were, zeros elsewhere.

    >>> import torch
    >>> put_back(torch.tensor([7.0, 0.0]), 0, torch.tensor([2, -1]), 3)
    tensor([0., 0., 7.])
    """
    import torch

    back = torch.full((length,), -1, dtype=torch.int64)
    places = torch.arange(len(index_N))
    there = index_N >= 0
    back[index_N[there]] = places[there]
    return take(value, axis, back)


def _filled(kept_K: Tensor, width: int) -> Tensor:
    """Return the units kept, then -1 up to a width."""
    import torch

    rest = torch.full((width - len(kept_K),), -1, dtype=torch.int64)
    return torch.cat([kept_K.to("cpu", torch.int64), rest])


def _spread(units_N: Tensor, width: int, offset: int) -> Tensor:
    """Return the entries that units own: `width` each, from `offset` on."""
    import torch

    entries = offset + units_N[:, None] * width + torch.arange(width)
    return entries.masked_fill(units_N[:, None] < 0, -1).reshape(-1)


def _along(parts: Iterable[tuple[Span, Tensor, int]], length: int) -> Tensor:
    """Return the index of one axis of a linear: what no span covers stays."""
    import torch

    pieces, at = [], 0
    for span, units_N, num_units in sorted(parts, key=lambda part: part[0].offset):
        pieces += [torch.arange(at, span.offset), _spread(units_N, span.width, span.offset)]
        at = span.offset + num_units * span.width
    return torch.cat([*pieces, torch.arange(at, length)])


def _joined(pieces: Mapping[int, Tensor], fused: Mapping[int, Linear]) -> Tensor:
    """Return the index of the rows of a parameter from those of the linears that it is made of."""
    import torch

    found = []
    for part, linear in sorted(fused.items()):
        rows = linear.shape[0]
        index_N = pieces.get(part, torch.arange(rows))
        found.append(torch.where(index_N < 0, index_N, index_N + part * rows))
    return torch.cat(found)
