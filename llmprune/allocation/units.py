"""Whole units as an allocation counts them: legal numbers, what they hold, and what covers what.

A half of a block, or a block, is a site of one unit, which may go whole. Of all other sites at
least one unit stays. Where a half or a block goes whole, the sites within it are covered: they lose
nothing of their own, so that what sites lose adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from llmprune.allocation.fitting import option
from llmprune.allocation.types import Candidate, Request
from llmprune.arch.couplings import CHANNELS, DEPTHS, EXPERT_CHANNELS, HEADS, QUERY_HEADS
from llmprune.arch.types import Site, Span
from llmprune.base.errors import RecipeError

Counts = Mapping[str, int]
Covers = Mapping[str, Sequence[str]]


def legal_counts(site: Site, multiple: int | None, parallel: int = 1) -> list[int]:
    """Return how many units a site may lose, in ascending order, 0 among them.

    Kept widths of channels are multiples of `multiple`, and groups in which units compete keep
    equally many. As many units as the site says stay, one or one multiple at least, but for sites
    that may go whole. What `parallel` devices are to share has a whole part for each: multiples of
    channels, query heads, and key/value heads or whole copies of them. Where what there is has not,
    0 is not legal.

    >>> site = Site(name="f", block=0, spans=(), num_units=10, unit_cost=1, kind="ffn-channels")
    >>> legal_counts(site, 4), legal_counts(site, 1, parallel=4)
    ([0, 2, 6], [2, 6])
    """
    if site.kind in DEPTHS:
        return [0, 1]
    wide = site.kind in (CHANNELS, EXPERT_CHANNELS)
    grid = math.lcm(site.num_groups, site.grid, (multiple or 1) * parallel if wide else 1)
    fewest = -(-site.least // grid) * grid
    kept = {site.num_units, *range(fewest, site.num_units + 1, grid)}
    if parallel > 1:
        kept = {width for width in kept if _is_shareable(site, width, parallel)}
    return sorted(site.num_units - width for width in kept)


def _is_shareable(site: Site, width: int, devices: int) -> bool:
    """Tell whether devices can share what is left of a site."""
    if site.kind == HEADS:
        return shareable(width * heads_per_unit(site.spans), width, devices)
    if site.kind == QUERY_HEADS:
        return shareable(width, site.num_groups, devices)
    return site.kind not in (CHANNELS, EXPERT_CHANNELS) or width % devices == 0


def shareable(num_heads: int, num_groups: int, devices: int) -> bool:
    """Tell whether devices can share heads equally, each with whole key/value heads or a copy.

    >>> shareable(32, 8, 4), shareable(32, 2, 4), shareable(12, 3, 2)
    (True, True, False)
    """
    return num_heads % devices == 0 and (num_groups % devices == 0 or devices % num_groups == 0)


def heads_per_unit(spans: Sequence[Span]) -> int:
    """Return the query heads of a key/value group, from the rows and columns that it owns.

    Rows beyond as many as the output projection has columns are those of one key and one value.
    """
    rows = sum(span.width for span in spans if span.axis == "out")
    columns = sum(span.width for span in spans if span.axis == "in")
    return 2 * columns // (rows - columns)


def covers_of(sites: Sequence[Site]) -> dict[str, list[str]]:
    """Return the sites that lie within each site that may go whole."""
    linears = {site.name: {span.linear for span in site.spans} for site in sites}

    def within(inner: Site, outer: Site) -> bool:
        small, large = linears[inner.name], linears[outer.name]
        smaller = inner.kind not in DEPTHS or small != large
        return inner is not outer and inner.block == outer.block and small <= large and smaller

    return {
        outer.name: [inner.name for inner in sites if linears[inner.name] and within(inner, outer)]
        for outer in sites
        if outer.kind in DEPTHS
    }


def after(counts: Counts, more: Counts, covers: Covers) -> dict[str, int]:
    """Return counts with some of them changed; what is then covered loses nothing of its own."""
    found = {**counts, **more}
    for outer, inner in covers.items():
        if found.get(outer):
            found.update(dict.fromkeys(inner, 0))
    return found


def is_covered(name: str, counts: Counts, covers: Covers) -> bool:
    """Tell whether a site lies within one that goes whole."""
    return any(counts.get(outer) and name in inner for outer, inner in covers.items())


def removed_cost(sites: Sequence[Site], counts: Counts) -> int:
    """Return the weights that go."""
    return sum(counts.get(site.name, 0) * site.unit_cost for site in sites)


def asked_cost(request: Request) -> int:
    """Return the weights that are to go, rounded up."""
    return math.ceil(request.target * sum(site.num_weights for site in request.sites))


def admitted(gains: Mapping[str, int], need: int) -> list[str]:
    """Return what may go next where `need` weights are missing, by the weights that each holds.

    That is what does not overshoot or, where all does, what overshoots least. So a choice in rounds
    ends at or above the asked size, by less than the smallest that is left.

    >>> admitted({"attention": 4, "ffn": 12}, 5), admitted({"attention": 4, "ffn": 12}, 1)
    (['attention'], ['attention'])
    """
    within = [name for name, gain in gains.items() if gain <= need]
    return within or [name for name, gain in gains.items() if gain == min(gains.values())]


def unguarded(request: Request) -> list[Site]:
    """Return the sites outside of the `first` and the `last` blocks, as many as the options say."""
    blocks = sorted({site.block for site in request.sites})
    first, last = (int(option(request, name)) for name in ("first", "last"))
    inner = set(blocks[first : max(0, len(blocks) - last)])
    return [site for site in request.sites if site.block in inner]


def check_removable(request: Request, sites: Sequence[Site]) -> None:
    """Check that these sites hold what is asked.

    Raises:
        RecipeError: they hold less; says how much they do.
    """
    covers = covers_of(sites)
    every = {
        site.name: legal_counts(site, request.multiple, request.parallel)[-1] for site in sites
    }
    removable = removed_cost(sites, after({}, every, covers))
    if len(sites) == len(request.sites) and all(site.kind in DEPTHS for site in sites):
        removable -= min(site.unit_cost for site in sites)  # something stays between the ends
    if asked_cost(request) > removable:
        most = removable / sum(site.num_weights for site in request.sites)
        guards = [name for name in ("first", "last") if request.options.get(name)]
        freed = " ".join(f"--set prune.options.{name}=0" for name in guards)
        raise RecipeError(
            f"prune.sparsity: {float(request.target):.6g} cannot be removed in whole units. At "
            f"most {most:.6g} can. Lower it, as in --sparsity {math.floor(most * 100) / 100:g}"
            + (f", or let blocks at the ends go: {freed}." if guards else ".")
        )


def shares_of(sites: Sequence[Site], counts: Counts) -> dict[str, Fraction]:
    """Return the share that every site loses.

    >>> site = Site(name="f", block=0, spans=(), num_units=10, unit_cost=1)
    >>> shares_of([site], {"f": 5})
    {'f': Fraction(1, 2)}
    """
    return {site.name: Fraction(counts.get(site.name, 0), site.num_units) for site in sites}


def candidate(sites: Sequence[Site], counts: Counts) -> Candidate:
    """Return the model without these units."""
    return Candidate(shares={name: s for name, s in shares_of(sites, counts).items() if s})


def finite(value: float) -> float:
    """Return a distance, infinity where it is no number."""
    return value if math.isfinite(value) else math.inf
