"""What is to go at least: weights, or numbers of the key/value cache, and what units count in it.

A budget is decided from shapes, or measured (`engine.pace`). Allocations see units at the price
that they have in it; units without a price stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmprune.allocation.projector import default_multiple
from llmprune.allocation.units import (
    after,
    covers_of,
    heads_per_unit,
    legal_counts,
    removed_cost,
)
from llmprune.arch.couplings import ATTENTION, BLOCK, CHANNELS, DEPTHS, EXPERT_CHANNELS, HEADS
from llmprune.arch.types import Coupling, Site
from llmprune.base.errors import RecipeError
from llmprune.engine.sites import Group
from llmprune.mask.counts import exact_sparsity
from llmprune.recipe.targets import amount_of

if TYPE_CHECKING:
    from llmprune.engine.shapes import Anatomies
    from llmprune.recipe.pruning import PruneStep

Counts = Mapping[str, int]
UNITS = {"params": "parameters", "size": "bytes", "kv": "values of key and value per token"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is to go at least.

    `asked` is in weights or, with `prices` by site, in what a unit of these counts; `weights` is
    the number of weights that it means, as far as it can be told beforehand. `whole` and `most` are
    what the model has and may have in the unit of the target; `facts` what was measured.
    """

    asked: int
    weights: int
    prices: Mapping[str, int] | None = None
    whole: float = 0
    most: float = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def priced(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that count towards the budget, with units at their price."""
        if self.prices is None:
            return list(sites)
        prices = self.prices
        return [replace(s, unit_cost=prices[s.name]) for s in sites if prices.get(s.name)]


EMPTY = Budget(asked=0, weights=0)


def budget_of(
    step: PruneStep,
    sites: Sequence[Site],
    eligible: int,
    *,
    num_params: int,
    num_bytes: int,
    itemsize: int,
    cache: Sequence[int] | None,
) -> Budget:
    """Return what a recipe's sparsity or target of size asks for.

    `num_bytes` is what the model's tensors take, `itemsize` that of a weight; `cache` are the
    numbers of key and value that a token leaves in every block, None where that is not known.

    Raises:
        RecipeError: the model is smaller than what is asked for, or has less that can go.
    """
    key, text = target_of(step)
    if key in ("", "ppl"):
        gone = math.ceil(exact_sparsity(step.sparsity) * eligible)
        return Budget(asked=gone, weights=gone)
    check_shrinks(step, key)
    if key == "kv":
        return _cache_budget(step, text, sites, cache)
    whole = num_params if key == "params" else num_bytes
    per_weight = 1 if key == "params" else itemsize
    most = most_of(key, text, whole)
    gone = math.ceil((whole - most) / per_weight)
    unit = UNITS[key]
    if gone <= 0:
        raise RecipeError(
            f"prune.target: {key}={text} is {most:,} {unit}, and the model has {whole:,} already. "
            f"Ask for less, as in --target {key}=0.8x."
        )
    able = removable(step, sites)
    if gone > able:
        least = whole - able * per_weight
        raise RecipeError(
            f"prune.target: {key}={text} is {most:,} {unit}, but {least:,} stay, which are outside "
            f"of {step.pattern} or the last of them. Between {least:,} and {whole:,} can be asked "
            f"for, as in --target {key}={math.ceil(100 * least / whole) / 100:g}x."
        )
    check_share(step, gone / eligible)
    return Budget(asked=gone, weights=gone, whole=whole, most=most)


def budget_data(budget: Budget) -> dict[str, Any] | None:
    """Return a budget that was measured, for the folder of a run; None for one that follows from
    the recipe."""
    if not budget.facts:
        return None
    return {"asked": budget.asked, "whole": budget.whole, "most": budget.most, **budget.facts}


def budget_from(data: Mapping[str, Any]) -> Budget:
    """Return the budget that `budget_data` wrote."""
    facts = {key: value for key, value in data.items() if key not in ("asked", "whole", "most")}
    asked = int(data["asked"])
    whole, most = float(data["whole"]), float(data["most"])
    return Budget(asked=asked, weights=asked, whole=whole, most=most, facts=facts)


def removable(step: PruneStep, sites: Sequence[Site]) -> int:
    """Return the weights that can go at most; something of every site stays, or one block."""
    covers = covers_of(sites)
    most = {s.name: legal_counts(s, multiple_of(step, sites), step.parallel)[-1] for s in sites}
    able = removed_cost(sites, after({}, most, covers))
    if all(site.kind in DEPTHS for site in sites):
        able -= min(site.unit_cost for site in sites)
    return able


def multiple_of(step: PruneStep, sites: Sequence[Site]) -> int | None:
    """Return what kept widths of channels are multiples of, on each of the parallel devices."""
    channels = [site.num_units for site in sites if site.kind in (CHANNELS, EXPERT_CHANNELS)]
    default = default_multiple(max(1, min(channels) // step.parallel)) if channels else None
    return step.multiple or default


def target_of(step: PruneStep) -> tuple[str, str]:
    """Return key and text of a step's target; two empty texts where there is none."""
    return next(iter((step.target or {}).items()), ("", ""))


def most_of(key: str, text: str, whole: int) -> int:
    """Return what a model of `whole` may have, by the text of a target.

    >>> most_of("kv", "0.7x", 10), most_of("params", "3M", 4_000_000)
    (7, 3000000)
    """
    kind, amount = amount_of(key, text)
    return math.floor(exact_sparsity(amount) * whole) if kind == "times" else int(amount)


def check_shrinks(step: PruneStep, key: str) -> None:
    """Check that tensors get smaller.

    Raises:
        RecipeError: the form keeps their shapes.
    """
    if step.form == "masked":
        raise RecipeError(
            f"prune.form: masked keeps every tensor's shape, so the {key} of the model would not "
            "change. Leave it out, or give a --sparsity instead of the target."
        )


def check_share(step: PruneStep, share: float) -> None:
    """Check that no more goes than the recipe's sparsity, which is the most beside a target.

    Raises:
        RecipeError: more would.
    """
    if share > step.sparsity:
        key, text = target_of(step)
        more = math.ceil(share * 100) / 100
        raise RecipeError(
            f"prune.target: {key}={text} takes {share:.4f} of the eligible weights, and sparsity "
            f"{step.sparsity:g} is the most that may go. Ask for a larger model"
            + (f", or type --sparsity {more:g}." if more < 1 else ".")
        )


def cache_of(coupling: Coupling) -> int:
    """Return the numbers of key and value that all units of heads leave in the cache per token.

    Rows of a key/value group that are neither those of its queries, as many as columns of the
    output projection, make its key and value.
    """
    rows = sum(span.width for span in coupling.spans if span.axis == "out")
    queries = sum(span.width for span in coupling.spans if span.axis == "in")
    return (rows - queries) * coupling.num_units


def cache_by_block(anatomies: Anatomies) -> list[int] | None:
    """Return what a token leaves in the cache of every block; None where a block's attention is not
    understood."""
    found = []
    for block in anatomies.blocks:
        heads = block.coupling(HEADS)
        if heads is None and (block.coupling(ATTENTION) is not None or HEADS in block.lacks):
            return None
        found.append(0 if heads is None else cache_of(heads))
    return found if any(found) else None


def heads_shared(anatomies: Anatomies) -> tuple[int, int] | None:
    """Return the query heads and key/value heads of a block, where there are any."""
    rows = [row for block in anatomies.blocks if (row := block.coupling(HEADS)) is not None]
    if not rows:
        return None
    return heads_per_unit(rows[0].spans) * rows[0].num_units, rows[0].num_units


def cache_prices(sites: Sequence[Site], cache: Sequence[int]) -> dict[str, int]:
    """Return what one unit of every site frees of the cache."""
    return {
        site.name: cache[site.block] // site.num_units
        for site in sites
        if site.kind in (HEADS, ATTENTION, BLOCK)
    }


def cache_left(
    sites: Sequence[Site], cache: Sequence[int], counts: Counts, filled: int | None = None
) -> int:
    """Return what a token leaves in the cache of the result.

    `filled` is to how many key/value heads every block is filled up with zeros, if it is.
    """
    prices = cache_prices(sites, cache)
    if filled is not None:
        return sum(filled * prices[site.name] for site in sites if site.kind == HEADS)
    freed: dict[int, int] = {}
    for site in sites:  # heads of a half that goes whole are not counted again
        here = counts.get(site.name, 0) * prices.get(site.name, 0)
        freed[site.block] = min(cache[site.block], freed.get(site.block, 0) + here)
    return sum(cache) - sum(freed.values())


def _cache_budget(
    step: PruneStep, text: str, sites: Sequence[Site], cache: Sequence[int] | None
) -> Budget:
    """Return the numbers of key and value that are to go."""
    if cache is None:
        raise RecipeError(
            f"prune.target: kv={text} cannot be kept, since how this family caches keys and values "
            "is not known here. Give a budget of parameters, as in --target params=0.8x."
        )
    prices = {name: price for name, price in cache_prices(sites, cache).items() if price}
    if not prices:
        raise RecipeError(
            f"prune.target: kv={text} asks for a smaller key/value cache, and {step.pattern} frees "
            "nothing of it: FFN channels and experts hold no keys, and query heads share those of "
            "their group, which stays. Type --pattern heads, attention or blocks."
        )
    whole, most = sum(cache), most_of("kv", text, sum(cache))
    cheapest = min(
        (site.unit_cost / prices[site.name] for site in sites if site.name in prices), default=1.0
    )
    gone = whole - most
    return Budget(
        asked=gone,
        weights=math.ceil(gone * cheapest),
        prices=prices,
        whole=whole,
        most=most,
    )


def unpriced(budget: Budget, groups: Sequence[Sequence[Group]]) -> list[str]:
    """Return the kinds of unit that a budget leaves alone."""
    if budget.prices is None:
        return []
    sites = [site for here in groups for group in here for site in group.sites]
    priced = {site.kind for site in sites if site.name in budget.prices}
    return list(dict.fromkeys(site.kind for site in sites if site.kind not in priced))
