"""Units that are chosen to go: they shrink to nothing while the rest learns to do without them.

A unit is what a coupling says: rows of the linears that write it and columns of the one that reads
it, as of a key/value head with all its query heads. Kept units are not touched. Once the reader's
columns are zero a unit adds nothing, whatever its rows and biases are, and cutting it out is exact.
Legend: O outputs, I inputs, U units, AB what a unit owns of a linear.

Sources: Jiang et al., Pruning with Fine-grained Sparsity (MaskSparsity); Chen et al., HESSO:
Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmprune.arch.types import Coupling, Span
from llmprune.engine.units import columns_kept

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

PULL = 5e-4  # MaskSparsity: the length of what is added to the gradient of a doomed unit


def pull_on_doomed(
    coupling: Coupling,
    weights: Mapping[str, Tensor],
    keep_U: Tensor,
    strength: float = PULL,
    smooth_below: float = 0.0,
) -> dict[str, Tensor]:
    """Return what to add to the gradients, by linear: `strength` W / |W| for each doomed unit W.

    W is all that a unit owns, over every linear; `weights` holds weight_OI by name, and what is
    returned has its shapes and dtypes. A unit with |W| under `smooth_below` (the authors take the
    learning rate times the strength) is pulled by `strength` W instead, lest it swing around zero.

    Raises:
        ValueError: keep_U is of another coupling, or a linear is missing or too small.

    Source: Jiang et al., MaskSparsity, with units in place of the scales of batch norms.
    """
    norm_U = unit_norms(coupling, weights)
    factor_U = strength / norm_U.masked_fill(norm_U == 0, 1)
    factor_U = factor_U.masked_fill(norm_U < smooth_below, strength)
    factor_U = factor_U.masked_fill(_checked(coupling, keep_U).to(norm_U.device), 0)
    found = {name: torch.zeros_like(weights[name].detach()) for name in _names(coupling)}
    into = dict(_owned(coupling, found))
    for span, owned_UAB in _owned(coupling, weights):
        into[span].copy_(owned_UAB.detach() * _wide(span, factor_U))
    return found


def unit_norms(coupling: Coupling, weights: Mapping[str, Tensor]) -> Tensor:
    """Return norm_U (float32 or wider) of all that each unit owns, over every linear.

    Raises:
        ValueError: a linear is missing or too small.

    >>> row = Coupling(name="x", spans=(Span(linear="o", axis="in"),), num_units=2)
    >>> unit_norms(row, {"o": torch.tensor([[3.0, 0.0], [4.0, 1.0]])})
    tensor([5., 1.])
    """
    first = weights[_names(coupling)[0]]
    wide = torch.promote_types(first.dtype, torch.float32)
    square_U = torch.zeros(coupling.num_units, dtype=wide, device=first.device)
    for span, owned_UAB in _owned(coupling, weights):
        square_U[_units(span)] += owned_UAB.detach().to(wide).square().sum(dim=(1, 2))
    return square_U.sqrt()


def march_factor(step: int, steps: int) -> float:
    """Return what the weights of doomed units are multiplied by after update `step` of `steps`.

    Steps count from 0. Without other changes weights march to exactly 0 on a line, and stay there.

    Source: Chen et al., HESSO.

    >>> [round(march_factor(step, 4), 4) for step in range(4)]
    [0.75, 0.6667, 0.5, 0.0]
    """
    left = steps - step
    return (left - 1) / left if left > 1 else 0.0


def march(coupling: Coupling, weights: Mapping[str, Tensor], keep_U: Tensor, factor: float) -> None:
    """Multiply what doomed units own, in place; 0 puts exact zeros there.

    For after the optimizer's update, whose momentum otherwise moves them again: that of units that
    have reached zero must be zero too, and they are marched with 0 from then on.

    Raises:
        ValueError: keep_U is of another coupling, or a linear is missing or too small.

    Source: Chen et al., HESSO.
    """
    go_U = ~_checked(coupling, keep_U)
    with torch.no_grad():
        for span, owned_UAB in _owned(coupling, weights):
            go_U11 = _wide(span, go_U.to(owned_UAB.device))
            if factor == 0:
                owned_UAB.masked_fill_(go_U11, 0)
            else:
                owned_UAB.copy_(torch.where(go_U11, owned_UAB * factor, owned_UAB))


def gates(coupling: Coupling, keep_U: Tensor, num_columns: int, progress: float) -> Tensor:
    """Return gate_I (float32) on what the reader reads: 1 - progress at doomed units, 1 elsewhere.

    For a frozen model: nothing of it changes, and from progress 1 on gates are those of the cut
    model, so that slicing is exact.

    Raises:
        ValueError: keep_U is of another coupling, or no linear reads the units as columns.

    >>> row = Coupling(name="x", spans=(Span(linear="o", axis="in", width=2),), num_units=2)
    >>> gates(row, torch.tensor([True, False]), 5, 0.75)
    tensor([1.0000, 1.0000, 0.2500, 0.2500, 1.0000])
    """
    if coupling.reader is None:
        raise ValueError(
            f"no linear reads {coupling.name} as columns, so no gate can close before it. Gates "
            "are for heads and channels; use march for whole halves, blocks and experts."
        )
    keep_I = columns_kept(coupling, _checked(coupling, keep_U), num_columns)
    left = min(max(1 - progress, 0.0), 1.0)
    return torch.ones(num_columns).masked_fill_(~keep_I, left)


def gate_reader(reader: torch.nn.Module, gate_I: Tensor) -> RemovableHandle:
    """Multiply what a module reads by gate_I until the handle returned is removed.

    Adapters around the reader see gated inputs as well. Fill gate_I in place between steps, not
    within one: a recomputed forward pass must find the gates of the first.
    """

    def gated(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * gate_I.to(args[0]), *args[1:])

    return reader.register_forward_pre_hook(gated)


def _names(coupling: Coupling) -> list[str]:
    """Return the linears of a coupling, each once."""
    return list(dict.fromkeys(span.linear for span in coupling.spans))


def _owned(coupling: Coupling, weights: Mapping[str, Tensor]) -> Iterator[tuple[Span, Tensor]]:
    """Yield each span with a view_UAB of its linear, in which every unit has its own matrix.

    Raises:
        ValueError: a linear is missing or too small.
    """
    for span in coupling.spans:
        if span.linear not in weights:
            raise ValueError(
                f"{coupling.name} owns a part of {span.linear}, which is not among "
                f"{', '.join(weights) or 'no weights'}. Pass the weights of the whole block."
            )
        weight_OI = weights[span.linear]
        if span.axis == "all":
            yield span, weight_OI[None]
            continue
        axis, size = 0 if span.axis == "out" else 1, coupling.num_units * span.width
        if span.offset + size > weight_OI.shape[axis]:
            raise ValueError(
                f"{coupling.num_units} units of width {span.width} reach to {span.offset + size} "
                f"on the axis {span.axis!r} of {span.linear}, which has {weight_OI.shape[axis]}. "
                "Pass the weights from before the cut."
            )
        part = weight_OI.narrow(axis, span.offset, size)
        yield span, part.unflatten(axis, (coupling.num_units, span.width)).movedim(axis, 0)


def _units(span: Span) -> slice:
    """Return which units a span belongs to."""
    return slice(span.unit, span.unit + 1) if span.axis == "all" else slice(None)


def _wide(span: Span, value_U: Tensor) -> Tensor:
    """Return the values of a span's units, (U, 1, 1)."""
    return value_U[_units(span)][:, None, None]


def _checked(coupling: Coupling, keep_U: Tensor) -> Tensor:
    """Return keep_U after a look at its size and dtype.

    Raises:
        ValueError: it does not say of every unit whether it stays.
    """
    if keep_U.shape != (coupling.num_units,) or keep_U.dtype != torch.bool:
        raise ValueError(
            f"keep_U is {keep_U.dtype} of shape {tuple(keep_U.shape)}, and {coupling.name} has "
            f"{coupling.num_units} units. Pass a bool for each, True where it stays."
        )
    return keep_U
