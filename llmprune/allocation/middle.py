"""The first and the last blocks stay whole, all others lose the same share of every kind of unit.

Source: Ma et al., LLM-Pruner (its runs spare the first four and the last two of 32 blocks).
"""

from __future__ import annotations

import math
from fractions import Fraction

from llmprune.allocation.fitting import option
from llmprune.allocation.types import Request
from llmprune.allocation.units import (
    asked_cost,
    check_removable,
    legal_counts,
    removed_cost,
    shares_of,
)


def spare_ends_of_depth(request: Request) -> dict[str, Fraction]:
    """Return shares of 0 for the blocks at both ends, and equal ones for the others.

    `first` and `last` are shares of the number of blocks, rounded to the nearest. The others lose
    the legal counts next to an equal share of their units; of these, that kind goes up first whose
    share is lowest, until the asked size is met.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=n, block=b, spans=(), num_units=8, unit_cost=1) for b, n in
    ...          enumerate("abcd")]
    >>> spare_ends_of_depth(Request(
    ...     sites=sites, target=Fraction(1, 4), options={"first": 0.25, "last": 0.25}))
    {'a': Fraction(0, 1), 'b': Fraction(1, 2), 'c': Fraction(1, 2), 'd': Fraction(0, 1)}
    """
    blocks = sorted({site.block for site in request.sites})
    first, last = (
        math.floor(option(request, name, most=0.5) * len(blocks) + 0.5)
        for name in ("first", "last")
    )
    inner = set(blocks[first : len(blocks) - last])
    sites = [site for site in request.sites if site.block in inner]
    check_removable(request, sites)
    asked = asked_cost(request)
    share = Fraction(asked, sum(site.num_weights for site in sites))
    grids = {site.name: legal_counts(site, request.multiple, request.parallel) for site in sites}
    counts = {
        site.name: max(count for count in grids[site.name] if count <= share * site.num_units)
        for site in sites
    }
    while removed_cost(sites, counts) < asked:
        able = [site for site in sites if counts[site.name] < grids[site.name][-1]]
        lowest = min(able, key=lambda site: Fraction(counts[site.name], site.num_units))
        above = [count for count in grids[lowest.name] if count > counts[lowest.name]]
        counts[lowest.name] = above[0]
    return shares_of(request.sites, counts)
