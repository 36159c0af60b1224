"""The allocation that is written down by hand, for some sites or for all."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.projector import project
from llmprune.allocation.types import Request
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up

_TOLERANCE = Fraction(1, 1000)  # between the sparsity asked and that of shares that name all sites


def as_named(request: Request) -> dict[str, Fraction]:
    """Return the share that the recipe names; sites it does not name share what is left evenly.

    Named shares are rounded to whole units. The total is exact, and one unit of each site stays.

    Raises:
        RecipeError: no even share of the other sites meets the target; says which range is
            possible.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=name, block=0, spans=(), num_units=8, unit_cost=1) for name in "qkv"]
    >>> half = Fraction(1, 2)
    >>> as_named(Request(sites=sites, target=half, named={"q": Fraction(1, 4)}))
    {'q': Fraction(1, 4), 'k': Fraction(5, 8), 'v': Fraction(5, 8)}
    """
    units = {site.name: site.num_units for site in request.sites}
    cost = request.sites[0].unit_cost  # of a weight or a tile, the same everywhere
    total = sum(units.values())
    counts = {
        name: min(round_half_up(share * units[name]), units[name] - 1)
        for name, share in request.named.items()
    }
    fixed, wanted = sum(counts.values()), round_half_up(request.target * total)
    others = {name: num for name, num in units.items() if name not in counts}
    if others:
        free = sum(others.values()) - len(others)
        _check_range(request, fixed, wanted, fixed + free, total)
        share = Fraction(wanted - fixed, sum(others.values()))
        counts |= project(
            dict.fromkeys(others, share),
            others,
            dict.fromkeys(others, cost),
            budget=(wanted - fixed) * cost,
            exact=True,
        )
    elif abs(request.target - Fraction(fixed, total)) > _TOLERANCE:
        raise RecipeError(
            f"prune.sparsities: the shares name every linear and remove {fixed / total:.4f} of "
            f"all, but sparsity is {float(request.target):g}. Type --sparsity {fixed / total:.4f}, "
            "or leave some linears unnamed to make up the difference."
        )
    return {name: Fraction(counts[name], units[name]) for name in units}


def _check_range(request: Request, low: int, wanted: int, high: int, total: int) -> None:
    """Raise where what is named, and the most that can go beside it, do not enclose the target."""
    if not low <= wanted <= high:
        raise RecipeError(
            f"prune.sparsities: with these shares a sparsity of {low / total:.4f} to "
            f"{high / total:.4f} can be reached, but sparsity is {float(request.target):g}. Ask "
            "for one in that range with --sparsity, or change the shares."
        )
