"""Halves of blocks, or blocks, that go in one shot: those that matter least.

Sources: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect
(scores: block influence); Castells et al., LD-Pruner: Efficient Pruning of Latent Diffusion Models
using Task-Agnostic Insights, its operators being halves or blocks of a language model here.
Legend: U units of a site, here 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    admitted,
    after,
    asked_cost,
    candidate,
    check_removable,
    covers_of,
    finite,
    removed_cost,
    shares_of,
    unguarded,
)
from llmprune.arch.types import Site


def by_lowest(request: Request) -> dict[str, Fraction]:
    """Return which halves or blocks go: those of the lowest score, until the asked size is met.

    The `first` and the `last` blocks stay. One that would overshoot is passed over while smaller
    ones do not, so that the result overshoots by less than the smallest that is left.

    >>> sites = [Site(name=n, block=i, spans=(), num_units=1, unit_cost=4, kind="block")
    ...     for i, n in enumerate("abc")]
    >>> import torch
    >>> shares = by_lowest(Request(
    ...     sites=sites, target=Fraction(1, 3), options={"first": 0, "last": 0},
    ...     profiles={n: torch.tensor([score]) for n, score in zip("abc", [0.3, 0.1, 0.2])}))
    >>> [name for name, share in shares.items() if share]
    ['b']
    """
    sites = unguarded(request)
    return lowest(request, sites, {s.name: float(request.profiles[s.name].sum()) for s in sites})


def by_shift(request: Request) -> dict[str, Fraction]:
    """Return which halves or blocks go: those that alone shift the final hidden states least.

    One round of the probe, a candidate without each. Its score is how far mean and standard
    deviation over tokens move, ||mean - mean'|| + ||std - std'||. The lowest go, until the asked
    size is met; one that would overshoot is passed over while smaller ones do not.
    """
    assert request.probe is not None
    sites = unguarded(request)
    check_removable(request, sites)
    answers = request.probe([candidate(sites, {site.name: 1}) for site in sites])
    scores = {s.name: each.distance("shift") for s, each in zip(sites, answers, strict=True)}
    return lowest(request, sites, scores)


def lowest(
    request: Request, sites: Sequence[Site], scores: Mapping[str, float]
) -> dict[str, Fraction]:
    """Return the shares where sites of one unit go in the order of their scores.

    One whose score is no number goes last; of equal ones the first.

    Raises:
        RecipeError: these sites hold less than is asked.
    """
    check_removable(request, sites)
    covers, counts, need = covers_of(sites), dict[str, int](), asked_cost(request)
    while (missing := need - removed_cost(sites, counts)) > 0:
        gains = gains_of(sites, counts, covers)
        name = min(admitted(gains, missing), key=lambda each: finite(scores[each]))
        counts = after(counts, {name: 1}, covers)
    return shares_of(request.sites, counts)


def gains_of(
    sites: Sequence[Site], counts: Mapping[str, int], covers: Mapping[str, Sequence[str]]
) -> dict[str, int]:
    """Return how many weights more go with each site of one unit that is still there."""
    removed = removed_cost(sites, counts)
    gains = {
        site.name: removed_cost(sites, after(counts, {site.name: 1}, covers)) - removed
        for site in sites
        if not counts.get(site.name)
    }
    return {name: gain for name, gain in gains.items() if gain > 0}


def as_scored(unit_score_U: Tensor) -> Tensor:
    """Return the scores that the method gives the units of a site, as they are."""
    return unit_score_U


def one_of_each(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of the only round.

    >>> one_of_each(64, {})
    [64]
    """
    return [num_sites]
