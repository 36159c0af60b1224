"""What a unit matters, from the gradients of adapters alone: no gradient of a weight is made.

A step of size e on both factors moves B A by -e (dB A + B dA - e dB dA). That bracket stands for
the gradient of the frozen weight. All tensors are read as float32 or wider, none is changed.
Legend: O outputs, I inputs, R rank, U units of a coupling.

Source: Zhang et al., LoRAPrune. Of its code these are mended: what was removed is said by a mask
and not by an importance of zero, counts are those asked for, and the rows of a group's queries are
that group's, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.arch.types import Coupling
from llmprune.mask.rank import keep_highest
from llmprune.score.members import Member
from llmprune.score.reduction import reduce_scores
from llmprune.stats.types import Stats

MOMENTUM = 0.9
_EMPTY = Stats(num_tokens=0, values={})


def estimated_gradient(
    a_RI: Tensor, b_OR: Tensor, grad_a_RI: Tensor, grad_b_OR: Tensor, step: float = 1.0
) -> Tensor:
    """Return grad_OI, what the gradients of an adapter's factors say of the gradient of a weight.

    Take gradients before they are clipped, and of all micro-batches of a step: the last term grows
    with their square. `step` is the size e; the authors' is 1, with 0 the term is left out.

    Source: Zhang et al., LoRAPrune.

    >>> a, b = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0], [2.0]])
    >>> estimated_gradient(a, b, torch.tensor([[0.3, 0.4]]), torch.tensor([[0.1], [0.2]]))
    tensor([[0.3200, 0.4600],
            [0.6400, 0.9200]])
    """
    a_RI, b_OR, grad_a_RI, grad_b_OR = (_wide(t) for t in (a_RI, b_OR, grad_a_RI, grad_b_OR))
    return grad_b_OR @ (a_RI - step * grad_a_RI) + b_OR @ grad_a_RI


def adapter_importance(
    weight_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    grad_a_RI: Tensor,
    grad_b_OR: Tensor,
    scale: float,
    keep_OI: Tensor | None = None,
    step: float = 1.0,
) -> Tensor:
    """Return importance_OI, |G * (W + scale B A)| with the estimated gradient G.

    `scale` is alpha over rank. Where keep_OI is given, what it removes matters nothing, as in an
    adapter that masks cut. For linears fused in one parameter the result is of the parameter, and
    `arch.types.Linear.view` cuts linears out of it.

    Raises:
        ValueError: the factors are not of this weight.

    Source: Zhang et al., LoRAPrune.
    """
    if weight_OI.shape != (len(b_OR), a_RI.shape[1]) or b_OR.shape[1] != len(a_RI):
        raise ValueError(
            f"factors A {tuple(a_RI.shape)} and B {tuple(b_OR.shape)} are not of a weight of shape "
            f"{tuple(weight_OI.shape)}. A is (rank, inputs) and B (outputs, rank); pass the weight "
            "transposed where the model stores it so."
        )
    importance_OI = estimated_gradient(a_RI, b_OR, grad_a_RI, grad_b_OR, step)
    importance_OI *= _wide(weight_OI) + scale * (_wide(b_OR) @ _wide(a_RI))
    if keep_OI is not None:
        importance_OI.masked_fill_(~keep_OI, 0)
    return importance_OI.abs_()


def importance_by_unit(coupling: Coupling, importances: Mapping[str, Tensor]) -> Tensor:
    """Return unit_score_U (float32 or wider, higher = keep) of a coupling's units.

    `importances` holds importance_OI by linear. Each span sums what each unit owns of its linear,
    all rows of a group's queries or one of a channel, and is divided by its norm over units, so
    that every linear has an equal say. A span without any importance has none.

    Raises:
        ValueError: units that own whole linears, a linear that is missing or too small.

    Source: Zhang et al., LoRAPrune.

    >>> from llmprune.arch.types import Span
    >>> spans = (Span(linear="up", axis="out"), Span(linear="down", axis="in"))
    >>> found = importance_by_unit(Coupling(name="x", spans=spans, num_units=2), {
    ...     "up": torch.tensor([[1.0, 2.0], [1.0, 3.0]]), "down": torch.tensor([[8.0, 6.0]])})
    >>> found
    tensor([1.4000, 1.4000])
    """
    parts = [_by_unit(coupling, importances, place) for place in range(len(coupling.spans))]
    return torch.stack(parts).sum(dim=0)


def averaged(before_U: Tensor, now_U: Tensor, momentum: float = MOMENTUM) -> Tensor:
    """Return the running mean of scores after one more step; as it was, if one is not finite.

    Begin with zeros, as the authors do: only the order of scores counts. Update once for each step
    of the optimizer.

    Source: Zhang et al., LoRAPrune.

    >>> averaged(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    tensor([0.9000, 0.2000])
    """
    if not bool(now_U.isfinite().all()):
        return before_U
    return momentum * before_U + (1 - momentum) * now_U.to(before_U)


def units_kept(
    unit_score_U: Tensor, num_removed: int, *, num_groups: int = 1, before_U: Tensor | None = None
) -> Tensor:
    """Return keep_U (bool) without exactly `num_removed` units, those of lowest score.

    Every one of `num_groups` equal, consecutive groups loses equally many. Of equal scores the
    first go. `before_U` is the mask of now, whose removed units count, whatever their scores.

    Raises:
        ValueError: a score is NaN, groups cannot share the number, or one has lost more already.

    >>> before = torch.tensor([True, True, True, False])
    >>> units_kept(torch.tensor([3.0, 1.0, 2.0, 9.0]), 2, before_U=before)
    tensor([ True, False,  True, False])
    """
    num_units = len(unit_score_U)
    if num_units % num_groups or num_removed % num_groups or not 0 <= num_removed <= num_units:
        raise ValueError(
            f"{num_groups} equal groups cannot lose {num_removed} of {num_units} units. Each loses "
            f"equally many; pass a multiple of {num_groups} from 0 to {num_units}."
        )
    each = num_removed // num_groups
    score_GU = _wide(unit_score_U).reshape(num_groups, -1)
    if before_U is not None:
        gone_GU = ~before_U.to(score_GU.device).reshape(num_groups, -1)
        if int(gone_GU.sum(dim=1).max()) > each:
            raise ValueError(
                f"a group has lost {int(gone_GU.sum(dim=1).max())} units and is to lose {each}. "
                "What was removed stays removed; pass a count that does not fall."
            )
        score_GU = score_GU.masked_fill(gone_GU, -torch.inf)
    return keep_highest(score_GU, torch.full((num_groups,), each)).reshape(-1)


def _by_unit(coupling: Coupling, importances: Mapping[str, Tensor], place: int) -> Tensor:
    """Return what one span says of the units, (U,), of norm 1 or 0."""
    span = coupling.spans[place]
    if span.axis not in ("in", "out"):
        raise ValueError(
            f"units of {coupling.name} own {span.linear} whole, and importances that are compared "
            "within a linear say nothing of it. Pass a coupling of heads or channels."
        )
    if span.linear not in importances:
        raise ValueError(
            f"{coupling.name} owns a part of {span.linear}, which is not among "
            f"{', '.join(importances) or 'no importances'}. Attach adapters to it as well."
        )
    importance_OI = _wide(importances[span.linear])
    member = Member(span, importance_OI, _EMPTY)
    sum_U = reduce_scores([member], [importance_OI], coupling.num_units, "sum")
    found: Tensor = sum_U / max(float(sum_U.square().sum().sqrt()), torch.finfo(sum_U.dtype).tiny)
    return found


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
