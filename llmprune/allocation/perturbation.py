"""Blocks at which a little noise changes the loss more keep more; forward passes alone.

Source: Sung et al., ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language
Models, the zeroth-order score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.types import Candidate, Measured, Request


def by_noise(request: Request) -> dict[str, Fraction]:
    """Return one share per block: what is kept beyond a floor goes by the sum of its scores.

    One round of the probe, two candidates for each linear: noise of +-`eps` on its weights. Its
    score is the mean over sequences of |loss+ - loss-| / (2 eps). Blocks lose at most the target
    plus `spread`.
    """
    assert request.probe is not None
    eps = option(request, "eps", above=0)
    names = [site.name for site in request.sites]
    answers = request.probe(
        [Candidate(noise={name: sign * eps}) for name in names for sign in (1, -1)]
    )
    scores: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for site, plus, minus in zip(request.sites, answers[::2], answers[1::2], strict=True):
        scores[site.block] = scores.get(site.block, 0.0) + slope(plus, minus, eps)
        sizes[site.block] = sizes.get(site.block, 0) + site.num_weights
    most = min(1 - 1e-3, float(request.target) + option(request, "spread", above=0, most=1))
    kept = dict(
        zip(
            sizes,
            keep_counts(
                list(sizes.values()), list(scores.values()), float(request.target), most=most
            ),
            strict=True,
        )
    )
    wished = {site.name: 1 - kept[site.block] / sizes[site.block] for site in request.sites}
    return fitted(request, wished)


def slope(plus: Measured, minus: Measured, eps: float) -> float:
    """Return the mean change of a sequence's loss over the change of scale; 0 if it is no number.

    >>> import torch
    >>> loss = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    >>> slope(Measured(loss[0], loss[0]), Measured(loss[1], loss[1]), 0.5)
    1.5
    """
    value = float((plus.loss_S - minus.loss_S).abs().mean()) / (2 * eps)
    return value if math.isfinite(value) else 0.0


def keep_counts(
    sizes: Sequence[int], scores: Sequence[float], share: float, *, most: float
) -> list[int]:
    """Return how many weights every group keeps, so that `share` of all goes, at least roughly.

    None loses more than `most`; what then is missing is dealt out by score, in rounds, and a group
    that is full drops out. Where no score is above 0 groups are dealt by size.

    >>> keep_counts([100, 100, 200], [1.0, 3.0, 4.0], 0.5, most=0.6)
    [45, 55, 100]
    """
    if not any(score > 0 for score in scores):
        scores = [float(size) for size in sizes]
    kept = [min(size, _ceiling(size * (1 - most))) for size in sizes]
    wanted = _ceiling(sum(sizes) * (1 - share))
    while (missing := wanted - sum(kept)) > 0:
        open_ = [
            index
            for index, (num, size) in enumerate(zip(kept, sizes, strict=True))
            if num < size and scores[index] > 0
        ] or [
            index for index, (num, size) in enumerate(zip(kept, sizes, strict=True)) if num < size
        ]
        if not open_:
            break
        total = sum(scores[index] for index in open_)
        for index in open_:
            part = scores[index] / total if total > 0 else 1 / len(open_)
            kept[index] = min(sizes[index], kept[index] + _ceiling(part * missing))
    return kept


def two_of_each(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of the only round.

    >>> two_of_each(42, {})
    [84]
    """
    return [2 * num_sites]


def _ceiling(value: float) -> int:
    """Return the next whole number; 40.000000000000006 is 40."""
    return math.ceil(value - 1e-9 * max(1.0, abs(value)))
