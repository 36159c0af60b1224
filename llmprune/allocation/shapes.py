"""Allocations that look at where a linear stands and how it is shaped, and at no value."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.fitting import fitted, option, rational
from llmprune.allocation.types import Request
from llmprune.arch.types import Site


def random_graph(request: Request) -> dict[str, Fraction]:
    """Return shares whose densities are proportional to (O + I) / (O I), the densest all kept.

    Narrow linears keep more. A linear whose density would exceed one stays whole, and the others
    share what is left.

    Source: Mocanu et al. and Evci et al., the Erdos-Renyi-kernel densities for matrices.

    >>> shapes = {"q": (64, 64), "up": (256, 64), "k": (8, 64)}
    >>> sites = [
    ...     Site(name=name, block=0, spans=(), num_units=o * i, unit_cost=1, shape=(o, i))
    ...     for name, (o, i) in shapes.items()
    ... ]
    >>> shares = random_graph(Request(sites=sites, target=Fraction(1, 2)))
    >>> {name: round(float(share), 3) for name, share in shares.items()}
    {'q': 0.303, 'up': 0.565, 'k': 0.0}
    """
    sites = request.sites
    density = {site.name: _sum_of_sides(site) / site.num_weights for site in sites}
    left = (1 - request.target) * sum(site.num_weights for site in sites)
    whole: set[str] = set()
    while len(whole) < len(sites):
        others = [site for site in sites if site.name not in whole]
        kept = left - sum(site.num_weights for site in sites if site.name in whole)
        factor = kept / sum(density[site.name] * site.num_weights for site in others)
        full = {site.name for site in others if factor * density[site.name] > 1}
        if not full:
            break
        whole |= full
    wished = {
        site.name: 0.0 if site.name in whole else float(1 - factor * density[site.name])
        for site in sites
    }
    return fitted(request, wished)


def spare_ends(request: Request) -> dict[str, Fraction]:
    """Return equal shares but for the first and the last block, which lose at most `first`, `last`.

    The other blocks make up the difference.

    Raises:
        RecipeError: they cannot.

    Source: Gale et al., The State of Sparsity in Deep Neural Networks ("uniform+": the first layer
    of a convolutional network stays whole, the last keeps a fifth); here of blocks.

    >>> sites = [Site(name=n, block=b, spans=(), num_units=20, unit_cost=1)
    ...          for b, n in enumerate("abc")]
    >>> options = {"first": 0.0, "last": 0.8}
    >>> spare_ends(Request(sites=sites, target=Fraction(1, 2), options=options))
    {'a': Fraction(0, 1), 'b': Fraction(3, 4), 'c': Fraction(3, 4)}
    """
    first, last = (option(request, name, most=1) for name in ("first", "last"))
    blocks = [site.block for site in request.sites]
    at_most = {
        site.name: rational(first if site.block == min(blocks) else last)
        for site in request.sites
        if site.block in (min(blocks), max(blocks))
    }
    return fitted(request, {s.name: float(request.target) for s in request.sites}, at_most=at_most)


def _sum_of_sides(site: Site) -> Fraction:
    """Return rows plus columns; of a site without a shape, those of a square as large."""
    sides = sum(site.shape) if site.shape else 2 * site.num_weights**0.5
    return Fraction(sides)
