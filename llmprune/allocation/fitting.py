"""From numbers that an allocation computes to exact shares that meet the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llmprune.allocation.projector import project
from llmprune.allocation.types import Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up

_DENOMINATOR = 10**9


def fitted(
    request: Request,
    wished: Mapping[str, float],
    *,
    at_most: float | Mapping[str, Fraction] = 1.0,
) -> dict[str, Fraction]:
    """Return the share of every site: whole units, all wishes moved by one offset to the target.

    One number of `at_most` limits all sites, but never below the target. A wish that is no number
    counts as the target.

    Raises:
        RecipeError: the target cannot be reached within the limits.

    >>> sites = [Site(name=name, block=0, spans=(), num_units=100, unit_cost=1) for name in "qk"]
    >>> fitted(Request(sites=sites, target=Fraction(1, 2)), {"q": 0.4, "k": 0.8})
    {'q': Fraction(3, 10), 'k': Fraction(7, 10)}
    """
    sites = request.sites
    units = {site.name: site.num_units for site in sites}
    if not isinstance(at_most, Mapping):
        limit = max(rational(at_most), request.target)
        at_most = dict.fromkeys(units, limit)
    shares = {
        name: rational(wished[name]) if abs(wished[name]) <= 100 else request.target
        for name in units
    }
    counts = project(
        shares,
        units,
        {site.name: site.unit_cost for site in sites},
        budget=budget_of(sites, request.target),
        exact=True,
        at_most=at_most,
    )
    return {name: Fraction(counts[name], units[name]) for name in units}


def budget_of(sites: Sequence[Site], target: Fraction) -> int:
    """Return how many weights go: of units that cost the same, the nearest number of whole ones.

    >>> sites = [Site(name="q", block=0, spans=(), num_units=5, unit_cost=4)]
    >>> budget_of(sites, Fraction(1, 2))
    12
    """
    costs = {site.unit_cost for site in sites}
    cost = costs.pop() if len(costs) == 1 else 1
    return round_half_up(target * sum(site.num_weights for site in sites) / cost) * cost


def rational(value: float) -> Fraction:
    """Return a finite number as a fraction, to nine digits.

    >>> rational(0.1)
    Fraction(1, 10)
    """
    return Fraction(value).limit_denominator(_DENOMINATOR)


def means_by_block(request: Request, values: Mapping[str, float]) -> dict[int, float]:
    """Return the plain mean of the sites' values by block, without those that are no number."""
    found: dict[int, list[float]] = {}
    for site in request.sites:
        if abs(values[site.name]) < float("inf"):
            found.setdefault(site.block, []).append(values[site.name])
    return {block: sum(each) / len(each) for block, each in found.items()}


def scaled(value: float, low: float, high: float) -> float:
    """Return where a value lies between two others, 0 to 1; one half where these are equal."""
    return (value - low) / (high - low) if high > low else 0.5


def option(
    request: Request,
    name: str,
    *,
    above: float | None = None,
    least: float = 0.0,
    most: float = float("inf"),
) -> float:
    """Return a number of the recipe within its range, ends included but for `above`.

    Raises:
        RecipeError: it is outside of it.
    """
    return in_range(name, request.options[name], above=above, least=least, most=most)


def in_range(
    name: str,
    value: float,
    *,
    above: float | None = None,
    least: float = 0.0,
    most: float = float("inf"),
) -> float:
    """Return a number that the recipe gives a part, if it lies in its range and is finite.

    Raises:
        RecipeError: it does not.
    """
    if not (least <= value <= most and math.isfinite(value)) or (
        above is not None and value <= above
    ):
        low = f"above {above:g}" if above is not None else f"at least {least:g}"
        high = "" if most == float("inf") else f" and at most {most:g}"
        raise RecipeError(
            f"prune.options.{name}: {value:g} is out of range. It must be {low}{high}; type for "
            f"example --set prune.options.{name}={_example(above, least, most)}."
        )
    return value


def _example(above: float | None, least: float, most: float) -> str:
    """Return a number that is in range."""
    low = above if above is not None else least
    return f"{(low + most) / 2 if most < float('inf') else low + 1:g}"
