"""Halves of blocks, or blocks, that go by trial: exchanges of some for others, kept where KL falls.

Source: Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, its
search over the blocks to drop. Here it starts from those that alone change least, and one selection
follows each generation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from llmprune.allocation.depth import gains_of
from llmprune.allocation.fitting import option
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

_TRIES = 20  # draws for one new candidate
_MOST = 3  # sites that come back at once

Covers = Mapping[str, Sequence[str]]


def by_evolution(request: Request) -> dict[str, Fraction]:
    """Return which halves or blocks go: the set of least KL that some generations found.

    The first round of the probe measures each alone, and the lowest go until the asked size is
    met, as of `finercut` where divergences add up. Then each round tries up to `offspring` other
    sets in which a few came back and others went for them; the best takes the place of its parent
    where it is better. The `first` and the `last` blocks stay. Deterministic for a seed and a
    probe; `facts` get the divergence.

    Raises:
        RecipeError: the sites hold less than is asked.
    """
    assert request.probe is not None
    sites = unguarded(request)
    check_removable(request, sites)
    covers, need = covers_of(sites), asked_cost(request)
    if need <= 0:
        return shares_of(request.sites, {})
    answers = request.probe([candidate(sites, {site.name: 1}) for site in sites])
    alone = {site.name: finite(each.kl) for site, each in zip(sites, answers, strict=True)}
    draw = random.Random(f"{request.seed} evopress-halves")
    parent = _filled_up(sites, covers, need, {}, alone)
    seen, best = {_gone(parent)}, None
    for _ in range(int(option(request, "generations"))):
        most = int(option(request, "offspring", least=1))
        offspring = list(_unseen(draw, sites, covers, need, parent, alone, seen, most))
        if not offspring:
            break
        tried = [parent, *offspring] if best is None else offspring
        found = [finite(each.kl) for each in request.probe([candidate(sites, x) for x in tried])]
        lowest = min(range(len(tried)), key=found.__getitem__)  # of equal ones the first
        if best is None or found[lowest] < best:
            parent, best = tried[lowest], found[lowest]
    if best is not None:
        request.facts["kl"] = best
    return shares_of(request.sites, parent)


def rounds_of_evolution(num_sites: int, options: Mapping[str, float]) -> list[int]:
    """Return the candidates of every round: each site alone, then generations.

    >>> rounds_of_evolution(12, {"generations": 3, "offspring": 16})
    [12, 17, 16, 16]
    """
    most, generations = int(options["offspring"]), int(options["generations"])
    return [num_sites, *[most + (not index) for index in range(generations)]]


def _unseen(
    draw: random.Random,
    sites: Sequence[Site],
    covers: Covers,
    need: int,
    parent: Mapping[str, int],
    alone: Mapping[str, float],
    seen: set[frozenset[str]],
    most: int,
) -> Iterator[dict[str, int]]:
    """Yield up to `most` sets that were not tried yet, and remember them."""
    for _ in range(most):
        for _ in range(_TRIES):
            child = _exchanged(draw, sites, covers, need, parent, alone)
            if child is not None and _gone(child) not in seen:
                seen.add(_gone(child))
                yield child
                break


def _exchanged(
    draw: random.Random,
    sites: Sequence[Site],
    covers: Covers,
    need: int,
    parent: Mapping[str, int],
    alone: Mapping[str, float],
) -> dict[str, int] | None:
    """Return a set in which some sites came back and drawn ones went; None where none can go."""
    gone = sorted(_gone(parent))
    back = set(draw.sample(gone, min(len(gone), draw.randint(1, _MOST))))
    counts = {name: 1 for name in gone if name not in back}
    order = {name: draw.random() for name in alone}
    able = [site for site in sites if site.name not in back]
    child = _filled_up(able, covers, need, counts, order)
    return child if removed_cost(able, child) >= need else None


def _filled_up(
    sites: Sequence[Site],
    covers: Covers,
    need: int,
    counts: Mapping[str, int],
    order: Mapping[str, float],
) -> dict[str, int]:
    """Return counts where sites went in an order until `need` weights do, as far as there are any,
    and none is gone that need not be."""
    counts = dict(counts)
    while (missing := need - removed_cost(sites, counts)) > 0:
        gains = gains_of(sites, counts, covers)
        if not gains:
            break
        name = min(admitted(gains, missing), key=order.__getitem__)
        counts = after(counts, {name: 1}, covers)
    for site in sorted(sites, key=lambda each: each.unit_cost):
        if counts.get(site.name) and removed_cost(sites, counts) - site.unit_cost >= need:
            counts[site.name] = 0
    return counts


def _gone(counts: Mapping[str, int]) -> frozenset[str]:
    return frozenset(name for name, count in counts.items() if count)
