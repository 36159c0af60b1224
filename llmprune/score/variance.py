"""Scores of units by how much their activations vary: what varies little, a bias can stand for.

All are standardised within the site, over the columns of the linear that reads the units, so that
units of different sites compare. Legend: I inputs, U units, W columns that one unit owns.

Source: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models (FLAP).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.score.members import Member, reader_of
from llmprune.stats.types import Stats


def weighted_fluctuation(members: Sequence[Member], num_units: int) -> Tensor:
    """Return FLAP's score WIFV (U,): the variance of an input times the squared norm of its column,
    standardised; a unit of several columns has their mean. Reads `col_var`.

    The variance is that of all tokens. The published code updates a running variance by the squared
    distance from the new mean, which leaves out the first batch.

    Source: An et al., FLAP.

    >>> from llmprune.arch.types import Span
    >>> values = {"col_var": torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64)}
    >>> weight = torch.tensor([[1.0, 2.0, 1.0], [0.0, 1.0, -1.0]])
    >>> reader = Member(Span(linear="o", axis="in"), weight, Stats(num_tokens=4, values=values))
    >>> weighted_fluctuation([reader], 3)
    tensor([-0.4148, -0.7259,  1.1406])
    """
    reader = reader_of(members)
    return _by_unit(reader, fluctuations(reader.weight_OI, reader.stats), num_units)


def published_fluctuation(members: Sequence[Member], num_units: int) -> Tensor:
    """Return the score WIFV as the published code ranks it: of heads it is squared before it is
    standardised, which the paper does not say. Reads `col_var`.

    Units of several columns count as heads. The variance is the true one, as in
    `weighted_fluctuation`.

    Source: the code of An et al., FLAP.
    """
    reader = reader_of(members)
    score_I = fluctuations(reader.weight_OI, reader.stats)
    return _by_unit(reader, score_I.square() if reader.span.width > 1 else score_I, num_units)


def fluctuation(members: Sequence[Member], num_units: int) -> Tensor:
    """Return FLAP's variant IFV (U,): the variance of an input, standardised; reads `col_var`.

    Source: An et al., FLAP.
    """
    reader = reader_of(members)
    return _by_unit(reader, _variances(reader.stats), num_units)


def weighted_norm(members: Sequence[Member], num_units: int) -> Tensor:
    """Return FLAP's variant WIFN (U,): the mean of |W_ij| times the norm of input j, standardised;
    reads `col_sq`.

    Source: An et al., FLAP.
    """
    reader = reader_of(members)
    norm_I = reader.stats["col_sq"].sqrt()
    size_I = reader.weight_OI.detach().to(_wide(reader.weight_OI)).abs().mean(dim=0)
    return _by_unit(reader, size_I.to(norm_I) * norm_I, num_units)


def fluctuations(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return the unbiased variance of every input times the squared norm of its column, float64.

    >>> values = {"col_var": torch.tensor([0.5, 0.0], dtype=torch.float64)}
    >>> fluctuations(torch.tensor([[1.0, 2.0], [1.0, 1.0]]), Stats(num_tokens=2, values=values))
    tensor([2., 0.], dtype=torch.float64)
    """
    variance_I = _variances(stats)
    energy_I = weight_OI.detach().to(_wide(weight_OI)).square().sum(dim=0)
    return variance_I * energy_I.to(variance_I)


def _variances(stats: Stats) -> Tensor:
    """Return the unbiased variances; `col_var` divides by the number of tokens."""
    return stats["col_var"] * (stats.num_tokens / max(1, stats.num_tokens - 1))


def _by_unit(reader: Member, score_I: Tensor, num_units: int) -> Tensor:
    """Return standardised scores by unit, on the device of the weight; 0 where all are equal."""
    score_UW = reader.columns(score_I, num_units)
    away_UW = score_UW - score_UW.mean()
    if bool((score_UW == score_UW.flatten()[:1]).all()):
        away_UW = torch.zeros_like(score_UW)
    else:
        away_UW = away_UW / score_UW.std()
    return away_UW.mean(dim=1).to(reader.weight_OI.device, _wide(reader.weight_OI))


def _wide(weight_OI: Tensor) -> torch.dtype:
    """Return float32, or float64 of float64 weights."""
    return torch.promote_types(weight_OI.dtype, torch.float32)
