"""Blocks that turn the residual stream less lose more.

Legend: x a block's (or sublayer's) input, y its output, for each token.

Sources: Men et al., ShortGPT (block influence); Gromov et al., The Unreasonable Ineffectiveness of
the Deeper Layers (angular distance); Wang et al., CFSP; Pan et al., Adapt-Pruner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.types import Request

SLOPE = 13.1  # of CFSP on means: its 1e-4 on sums, at its 128 sequences of 1024 tokens
_ROOM = 1.05  # by how much CFSP's largest share stays clear of keeping everything
_MOST_REMOVED = 0.99  # of Adapt-Pruner


class Residual(NamedTuple):
    """Means over the tokens of a block: cosine of x and y, their angular distance, |y - x| / |x|.

    All are nan where no token came.
    """

    cosine: float
    angle: float
    change: float

    @classmethod
    def of(cls, profile: Tensor) -> Residual:
        """Return the means of a profile: three sums over tokens, and the number of tokens, (4,).

        >>> import torch
        >>> Residual.of(torch.tensor([3.0, 1.0, 2.0, 4.0]))
        Residual(cosine=0.75, angle=0.25, change=0.5)
        """
        *sums, num_tokens = profile.double().tolist()
        return cls(*(value / num_tokens if num_tokens else math.nan for value in sums))


def block_influence(cosine: float) -> float:
    """Return ShortGPT's score of a block from the mean cosine of its input and output.

    >>> round(block_influence(1 / 2**0.5), 5)
    0.29289
    """
    return 1 - cosine


def angular_distance(cosine: float) -> float:
    """Return the angle of two vectors over pi, from their cosine, which rounding may put above 1.

    >>> round(angular_distance(1 / 2**0.5), 12), angular_distance(1.0000001)
    (0.25, 0.0)
    """
    return math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def cfsp_keep(distances: Sequence[float], removed: float, slope: float = SLOPE) -> list[float]:
    """Return what each block keeps: its sigmoid over the mean sigmoid times 1 - `removed`.

    The sigmoid is of `slope` times how far the block's mean angular distance is above the mean of
    all blocks. Where a block would keep everything or more, all are moved towards their mean until
    the largest keeps 1 / 1.05 of what it may gain. With sums over tokens for distances, as in the
    published code, the slope is 1e-4; it then depends on the number of tokens.

    Source: Wang et al., CFSP, and the published code.

    >>> [round(keep, 5) for keep in cfsp_keep([1000, 2000, 3000], 0.2, slope=1e-4)]
    [0.76003, 0.8, 0.83997]
    >>> [round(keep, 5) for keep in cfsp_keep([5e4, 1e4, 0], 0.2, slope=1e-4)]
    [0.99048, 0.73296, 0.67656]
    """
    middle = math.fsum(distances) / len(distances)
    curved = [_sigmoid(slope * (distance - middle)) for distance in distances]
    mean = math.fsum(curved) / len(curved)
    top = max(curved)
    shrink = 1.0
    if top > mean and top / mean * (1 - removed) >= 1:
        shrink = mean * (1 / (1 - removed) - 1) / (top - mean) / _ROOM
    moved = [shrink * value + (1 - shrink) * mean for value in curved]
    return [value / mean * (1 - removed) for value in moved]


def adapt_importance(cosines: Sequence[float]) -> list[float]:
    """Return each block's importance in [-1, 1], from the mean cosines of inputs and outputs.

    It is by how much the negated cosine is above the mean of all, over the largest such distance;
    0 for all where they are alike.

    Source: Pan et al., Adapt-Pruner.

    >>> [round(each, 5) for each in adapt_importance([0.9, 0.95, 0.7])]
    [-0.33333, -0.66667, 1.0]
    """
    middle = math.fsum(cosines) / len(cosines)
    away = [middle - cosine for cosine in cosines]
    largest = max(abs(each) for each in away)
    return [each / largest if largest else 0.0 for each in away]


def adapt_shares(
    shares: Sequence[float], cosines: Sequence[float], step: float, spread: float
) -> list[float]:
    """Return the shares removed after one more step, of those before it, within 0 and 0.99.

    All go up by `step`, and that of a block down by `spread` times its importance. As shares end at
    0, their mean may drift from the sum of steps: the size that is left is what ends the steps.

    Source: Pan et al., Adapt-Pruner.

    >>> [round(each, 5) for each in adapt_shares([0, 0, 0], [0.9, 0.95, 0.7], 0.02, 0.02)]
    [0.02667, 0.03333, 0.0]
    """
    return [
        min(_MOST_REMOVED, max(0.0, share + step - spread * importance))
        for share, importance in zip(shares, adapt_importance(cosines), strict=True)
    ]


def by_angle(request: Request) -> dict[str, Fraction]:
    """Return CFSP's share of every block, moved by one offset to the target; reads `slope`.

    >>> from llmprune.arch.types import Site
    >>> import torch
    >>> sites = [Site(name=n, block=b, spans=(), num_units=100, unit_cost=1)
    ...          for b, n in enumerate("abc")]
    >>> profiles = {n: torch.tensor([0, a, 0, 1.0]) for n, a in zip("abc", [0.1, 0.2, 0.3])}
    >>> shares = by_angle(Request(
    ...     sites=sites, target=Fraction(1, 5), profiles=profiles, options={"slope": 1.0}))
    >>> [float(share) for share in shares.values()]
    [0.24, 0.2, 0.16]
    """
    angles = {block: each.angle for block, each in _residuals(request).items()}
    if not angles:
        return fitted(request, _alike(request))
    keeps = cfsp_keep(list(angles.values()), float(request.target), option(request, "slope"))
    return fitted(request, _wished(request, dict(zip(angles, keeps, strict=True))))


def by_similarity(request: Request) -> dict[str, Fraction]:
    """Return the shares of Adapt-Pruner's importance in one step, moved by one offset to the
    target; reads `spread`.

    The method takes many steps and measures again after each; this is the first of one.

    >>> from llmprune.arch.types import Site
    >>> import torch
    >>> sites = [Site(name=n, block=b, spans=(), num_units=100, unit_cost=1)
    ...          for b, n in enumerate("abc")]
    >>> profiles = {n: torch.tensor([c, 0, 0, 1.0]) for n, c in zip("abc", [0.9, 0.95, 0.7])}
    >>> shares = by_similarity(Request(
    ...     sites=sites, target=Fraction(1, 2), profiles=profiles, options={"spread": 0.3}))
    >>> [float(share) for share in shares.values()]
    [0.6, 0.7, 0.2]
    """
    cosines = {block: each.cosine for block, each in _residuals(request).items()}
    if not cosines:
        return fitted(request, _alike(request))
    spread = option(request, "spread", most=1.0)
    zeros = [0.0] * len(cosines)
    shares = adapt_shares(zeros, list(cosines.values()), float(request.target), spread)
    keeps = {block: 1 - share for block, share in zip(cosines, shares, strict=True)}
    return fitted(request, _wished(request, keeps))


def _residuals(request: Request) -> dict[int, Residual]:
    """Return the means of every block that a token reached; sites of a block share a profile."""
    found = {site.block: Residual.of(request.profiles[site.name]) for site in request.sites}
    return {block: each for block, each in found.items() if not math.isnan(each.cosine)}


def _wished(request: Request, keeps: Mapping[int, float]) -> dict[str, float]:
    """Return what every site is to lose; the target where no token came."""
    target = float(request.target)
    return {site.name: 1 - keeps.get(site.block, 1 - target) for site in request.sites}


def _alike(request: Request) -> dict[str, float]:
    """Return the target for every site."""
    return {site.name: float(request.target) for site in request.sites}


def _sigmoid(value: float) -> float:
    """Return 1 / (1 + e^-value), for a value of any size."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    small = math.exp(value)
    return small / (1 + small)
