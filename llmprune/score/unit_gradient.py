"""Scores of units by what the gradients of the loss say of all their weights.

Legend: O outputs, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmprune.score.members import Member
from llmprune.score.reduction import reduce_scores
from llmprune.stats.types import Stats


def taylor_vector(members: Sequence[Member], num_units: int) -> Tensor:
    """Return LLM-Pruner's score "vector", float32 (U,): for every row or column that a unit owns
    |sum of W * mean gradient|, summed over lines and members; reads `grad_sum`.

    Source: Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models.

    >>> from llmprune.arch.types import Span
    >>> values = {"grad_sum": torch.tensor([[0.2, 0.1], [-0.4, 0.3]])}
    >>> stats = Stats(num_tokens=0, num_sequences=1, values=values)
    >>> weight = torch.tensor([[1.0, -2.0], [0.5, 1.0]])
    >>> taylor_vector([Member(Span(linear="up", axis="out"), weight, stats)], 2)
    tensor([0.0000, 0.1000])
    """
    lines = [_signed_lines(member, _first_order(member)) for member in members]
    return reduce_scores(members, lines, num_units, "sum")


def taylor_first(members: Sequence[Member], num_units: int) -> Tensor:
    """Return LLM-Pruner's score "element-1", float32 (U,): the sum of |W * mean gradient|; reads
    `grad_sum`.

    Source: Ma et al., LLM-Pruner.
    """
    return _summed(members, num_units, lambda member: _first_order(member).abs_())


def taylor_second(members: Sequence[Member], num_units: int) -> Tensor:
    """Return LLM-Pruner's score "element-2", float32 (U,): the sum of W^2 times the mean squared
    gradient; reads `grad_sq`.

    Source: Ma et al., LLM-Pruner (the published code leaves out the half).
    """
    return _summed(members, num_units, _second_order)


def taylor_mixed(members: Sequence[Member], num_units: int) -> Tensor:
    """Return LLM-Pruner's score "mix", float32 (U,): the sum of |W * mean gradient - half of W^2
    times the mean squared gradient|; reads `grad_sum` and `grad_sq`.

    Source: Ma et al., LLM-Pruner.
    """

    def mixed(member: Member) -> Tensor:
        return _first_order(member).sub_(_second_order(member), alpha=0.5).abs_()

    return _summed(members, num_units, mixed)


def hesso(members: Sequence[Member], num_units: int) -> Tensor:
    """Return HESSO's saliency, float32 (U,); reads `grad_sum`.

    A fifth each of ||w||, ||w|| / size, 1 + cos(w, g), |w g| and (w g)^2 / 2 of all weights w of
    a unit and their mean gradient g, every term over its norm over the site's units. The last is no
    curvature, but the fourth counted twice; the cosine of a unit of zeros is 0.

    Source: Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network
    Training and Pruning, with the terms of the published code, where g is the optimiser's direction
    and norms are over all groups of the model.
    """

    def total(values: Callable[[Member], Tensor]) -> Tensor:
        return _summed(members, num_units, values)

    norm_U = total(lambda member: _weight(member).square_()).sqrt()
    slope_U = total(lambda member: _mean(member, "grad_sum").square_()).sqrt()
    along_U = total(_first_order)
    size_U = total(lambda member: torch.ones_like(_weight(member)))
    both_U = norm_U * slope_U
    cos_U = torch.where(both_U > 0, along_U / both_U.clamp(min=torch.finfo(both_U.dtype).tiny), 0)
    terms = (norm_U, norm_U / size_U, 1 + cos_U, along_U.abs(), along_U.square() / 2)
    return 0.2 * torch.stack([_unit_length(term_U) for term_U in terms]).sum(dim=0)


def _summed(
    members: Sequence[Member], num_units: int, values: Callable[[Member], Tensor]
) -> Tensor:
    """Return the sum over all weights of every unit, one matrix of values in memory at a time."""
    total_U = torch.zeros(num_units)
    for member in members:
        own_U = reduce_scores([member], [values(member)], num_units, "sum")
        total_U = total_U.to(own_U) + own_U
    return total_U


def _signed_lines(member: Member, salience_OI: Tensor) -> Tensor:
    """Return |sum| of every row (of columns: column), as a matrix of one value a line."""
    dim = 0 if member.span.axis == "in" else 1
    return salience_OI.sum(dim=dim, keepdim=True).abs_()


def _first_order(member: Member) -> Tensor:
    """Return W * mean gradient, new."""
    return _weight(member).mul_(_mean(member, "grad_sum"))


def _second_order(member: Member) -> Tensor:
    """Return W^2 * mean squared gradient, new."""
    return _weight(member).square_().mul_(_mean(member, "grad_sq"))


def _weight(member: Member) -> Tensor:
    """Return the weight, new, float32 or wider."""
    weight_OI = member.weight_OI.detach()
    return weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32), copy=True)


def _mean(member: Member, name: str) -> Tensor:
    """Return the mean over sequences, new, on the device of the weight.

    Raises:
        ValueError: the number of sequences is unknown; a mistake where statistics were joined.
    """
    stats: Stats = member.stats
    if not stats.num_sequences:
        raise ValueError(f"{name} of {member.span.linear} is over an unknown number of sequences")
    wide = torch.promote_types(member.weight_OI.dtype, torch.float32)
    value = stats[name].to(member.weight_OI.device, wide, copy=True)
    return value.div_(stats.num_sequences)


def _unit_length(term_U: Tensor) -> Tensor:
    """Return a term over its norm; zeros stay zeros."""
    norm = torch.linalg.vector_norm(term_U)
    return term_U / torch.where(norm == 0, torch.ones_like(norm), norm)
