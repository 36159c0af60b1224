"""Blocks with more outstanding scores keep more.

Legend: O outputs, I inputs.

Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
LLMs to High Sparsity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from llmprune.allocation.fitting import fitted, means_by_block, option, scaled
from llmprune.allocation.types import Evidence, Request
from llmprune.mask.pieces import PIECE
from llmprune.stats.precision import wide_sum


def outlier_share(block: Mapping[str, Evidence], *, outliers: float) -> dict[str, Tensor]:
    """Return for every linear of a block the same number, float64 (1,): the share of the block's
    scores |W_ij| ||X_j|| above `outliers` times their mean.

    Linears whose tap no token reached are left out; nan where that is all of them. The scores are
    never in memory together.

    >>> from llmprune.stats.types import Stats
    >>> stats = Stats(num_tokens=1, values={"col_sq": torch.ones(4)})
    >>> block = {"q": Evidence(torch.tensor([[9.0, 1.0, 1.0, 1.0]]), stats)}
    >>> outlier_share(block, outliers=2.0)
    {'q': tensor([0.2500], dtype=torch.float64)}
    """
    seen = [evidence for evidence in block.values() if evidence.stats.num_tokens]
    num = sum(evidence.weight_OI.numel() for evidence in seen)
    if not num:
        return {name: torch.full((1,), torch.nan, dtype=torch.float64) for name in block}
    total = sum(float(wide_sum(part)) for each in seen for part in _scores(each))
    limit = outliers * total / num
    above = sum(int((part > limit).sum()) for each in seen for part in _scores(each))
    return {name: torch.tensor([above / num], dtype=torch.float64) for name in block}


def by_outliers(request: Request) -> dict[str, Fraction]:
    """Return one share per block: densities differ by at most 2 `spread`, in line with the shares
    of outliers.

    The target is met by a common offset, so blocks count by their size.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=n, block=b, spans=(), num_units=100, unit_cost=1)
    ...          for b, n in enumerate("abc")]
    >>> profiles = {n: torch.tensor([v]) for n, v in zip("abc", [2.0, 6.0, 4.0])}
    >>> shares = by_outliers(Request(
    ...     sites=sites, target=Fraction(7, 10), profiles=profiles, options={"spread": 0.08}))
    >>> [float(share) for share in shares.values()]
    [0.78, 0.62, 0.7]
    """
    values = {site.name: float(request.profiles[site.name]) for site in request.sites}
    of_block = means_by_block(request, values)
    low, high = min(of_block.values(), default=0.0), max(of_block.values(), default=0.0)
    width = 2 * option(request, "spread", most=0.5)
    middle = (low + high) / 2  # for a block that no token reached
    wished = {
        site.name: float(request.target)
        + width * (0.5 - scaled(of_block.get(site.block, middle), low, high))
        for site in request.sites
    }
    return fitted(request, wished)


def _scores(evidence: Evidence) -> Iterator[Tensor]:
    """Yield the scores of a linear in float32, a few rows at a time."""
    norm_I = evidence.stats["col_sq"].sqrt().to(evidence.weight_OI.device, torch.float32)
    rows = max(1, PIECE // max(1, evidence.weight_OI.shape[1]))
    for part_OI in evidence.weight_OI.detach().split(rows):
        yield part_OI.to(torch.float32).abs() * norm_I
