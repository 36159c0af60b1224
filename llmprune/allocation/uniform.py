"""The allocation that treats all sites alike."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.types import Request


def same_share(request: Request) -> dict[str, Fraction]:
    """Return the target itself for every site: each linear loses the same share.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=name, block=0, spans=(), num_units=8, unit_cost=1) for name in "qk"]
    >>> same_share(Request(sites=sites, target=Fraction(1, 2)))
    {'q': Fraction(1, 2), 'k': Fraction(1, 2)}
    """
    return {site.name: request.target for site in request.sites}
