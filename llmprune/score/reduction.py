"""From scores of weights to scores of units: what of a unit counts, and how it is put together.

Legend: O outputs, I inputs, U units of the site, W lines (rows or columns) that one unit owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from llmprune.score.members import Member, reader_of

Reduction = Literal["reader", "sum", "mean", "max"]
"""Which members of a unit count: the one that reads it alone, or all, by their sum, mean or max."""
Pooling = Literal["sum", "mean", "l2"]
"""How the scores of one row or column become one number."""


def reduce_scores(
    members: Sequence[Member],
    scores: Sequence[Tensor],
    num_units: int,
    how: Reduction,
    pool: Pooling = "sum",
) -> Tensor:
    """Return unit_score_U of the scores score_OI of every member's weights, in their dtype.

    Each row or column that a unit owns is pooled to one number, and a member counts for a unit with
    the sum of its lines: so a head is the sum of its columns, and the rows of several query heads
    count for the kv group they belong to. `how` then joins the members that own a part of the unit.

    Raises:
        ValueError: "reader" where no member reads the units as columns.

    Source: "reader" is the magnitude ("l2") and Wanda ("mean") baseline of An et al., FLAP; the
    others are the group reductions of Ma et al., LLM-Pruner.

    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> weight = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    >>> down = Member(Span(linear="down", axis="in"), weight, Stats(num_tokens=0, values={}))
    >>> reduce_scores([down], [weight], 2, "reader", "l2")
    tensor([5., 1.])
    """
    if how == "reader":
        reader = reader_of(members)
        pairs = zip(members, scores, strict=True)
        score_OI = next(score_OI for member, score_OI in pairs if member is reader)
        return _member_score(reader, score_OI, num_units, pool)
    total_U = torch.zeros(num_units, dtype=scores[0].dtype, device=scores[0].device)
    num_U, top_U = torch.zeros_like(total_U), torch.full_like(total_U, -torch.inf)
    for member, score_OI in zip(members, scores, strict=True):
        place = slice(None)
        if member.span.axis == "all":
            place = slice(member.span.unit, member.span.unit + 1)
        own_U = _member_score(member, score_OI, num_units, pool).to(total_U)
        total_U[place] += own_U
        num_U[place] += 1
        top_U[place] = torch.maximum(top_U[place], own_U)
    match how:
        case "sum":
            return total_U
        case "mean":
            return total_U / num_U
        case "max":
            return top_U
        case _:
            assert_never(how)


def normalised(unit_score_U: Tensor, by: Literal["sum", "mean", "max"] = "mean") -> Tensor:
    """Return scores over their sum, mean or maximum, so that those of different sites compare.

    Scores that are all zero stay so.

    Source: Wang et al., Structurally Prune Anything (scores are normalised within a group).

    >>> normalised(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0.5000, 1.0000, 1.5000])
    """
    match by:
        case "sum":
            found = unit_score_U.sum()
        case "mean":
            found = unit_score_U.mean()
        case "max":
            found = unit_score_U.amax()
        case _:
            assert_never(by)
    return unit_score_U / torch.where(found == 0, torch.ones_like(found), found)


def _member_score(member: Member, score_OI: Tensor, num_units: int, pool: Pooling) -> Tensor:
    """Return what one member counts for each unit, (U,); (1,) where all of it is one unit's.

    Columns are pooled where they lie: the sums of a reader are those of any other column.
    """
    match member.span.axis:
        case "in":
            line_UW = member.columns(pooled(score_OI, pool, dim=0), num_units)
        case "out":
            rows_OI = score_OI[member.place(num_units)]
            line_UW = pooled(rows_OI, pool, dim=1).reshape(num_units, -1)
        case _:
            line_UW = pooled(score_OI, pool, dim=1)[None]
    return line_UW.sum(dim=1)


def pooled(score_OI: Tensor, pool: Pooling, dim: int) -> Tensor:
    """Return the sum, mean or norm along one axis.

    >>> pooled(torch.tensor([[3.0, 4.0]]), "l2", dim=1)
    tensor([5.])
    """
    match pool:
        case "sum":
            return score_OI.sum(dim=dim)
        case "mean":
            return score_OI.mean(dim=dim)
        case "l2":
            norm: Tensor = torch.linalg.vector_norm(score_OI, dim=dim)
            return norm
        case _:
            assert_never(pool)
