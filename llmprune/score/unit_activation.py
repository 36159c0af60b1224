"""Scores of units by how large their activations are; weights are not looked at, or cancel.

Legend: I inputs, U units, W columns that one unit owns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.score.members import Member, reader_of

GAMMA = 1.0


def cfsp(members: Sequence[Member], num_units: int, *, gamma: float = GAMMA) -> Tensor:
    """Return CFSP's fine score of channels, float32 (U,); reads `col_sq`.

    The score adds, over the linears of a channel, each magnitude over the sum of the channel's
    magnitudes in that linear, takes the mean over the hidden width D, and multiplies by n^gamma,
    where n is the root mean square of the channel. Every such share adds up to 1, so the score
    *is* 3/D n^gamma for a gated FFN, and the ranking is by activations alone. Only linears in which
    all of the channel is zero are left out (0/0 is 0).

    The published code divides by sequences where this divides by tokens: one factor for all
    channels. For a unit of several columns, which the paper does not have, n is over all of them.

    Source: Wang et al., CFSP: An Efficient Structured Pruning Framework for LLMs with
    Coarse-to-Fine Activation Information (`three_w_one_wa` of the published code).

    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> stats = Stats(num_tokens=4, values={"col_sq": torch.tensor([36.0, 4.0])})
    >>> weight = torch.tensor([[1.0, 100.0], [3.0, 50.0]])
    >>> cfsp([Member(Span(linear="down", axis="in"), weight, stats)], 2)
    tensor([1.5000, 0.5000])
    """
    reader = reader_of(members)
    weight_OI = reader.weight_OI
    norm_U = _rms(reader, num_units)
    num_U = torch.zeros_like(norm_U)
    for member in members:
        if member.span.axis in ("in", "out"):
            num_U += (member.by_unit(member.weight_OI, num_units) != 0).any(dim=1).to(norm_U)
    score_U = num_U / weight_OI.shape[0] * norm_U.pow(gamma)
    return score_U.to(weight_OI.device, torch.promote_types(weight_OI.dtype, torch.float32))


def mean_magnitude(members: Sequence[Member], num_units: int) -> Tensor:
    """Return Minitron's score, float32 (U,): for each column the root of the sum over sequences of
    the squared mean magnitude, and the norm of these over the columns of a unit; reads `col_abs`.

    Source: Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation
    (mean over tokens, l2 over the batch), as in NVIDIA's ModelOpt.

    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> stats = Stats(num_tokens=4, values={"col_abs": torch.tensor([25.0, 1.0])})
    >>> reader = Member(Span(linear="down", axis="in"), torch.zeros(3, 2), stats)
    >>> mean_magnitude([reader], 2)
    tensor([5., 1.])
    """
    reader = reader_of(members)
    score_U = reader.columns(reader.stats["col_abs"], num_units).sum(dim=1).sqrt()
    wide = torch.promote_types(reader.weight_OI.dtype, torch.float32)
    return score_U.to(reader.weight_OI.device, wide)


def _rms(reader: Member, num_units: int) -> Tensor:
    """Return the root of the mean over tokens of the squares of every unit's columns, (U,)."""
    sum_U = reader.columns(reader.stats["col_sq"], num_units).sum(dim=1)
    return (sum_U / max(1, reader.stats.num_tokens)).sqrt()
