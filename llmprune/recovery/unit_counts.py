"""How many units every block loses when a model gets smaller while adapters are trained around it.

The first blocks and the last are spared, and the others lose the more, so that what is asked goes.
Counts at the end are those of a cut with equal widths: legal ones, and no less than is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmprune.allocation.units import legal_counts
from llmprune.arch.couplings import CHANNELS, HEADS, QUERY_HEADS
from llmprune.arch.types import Coupling, Site
from llmprune.base.errors import RecipeError
from llmprune.base.registry import unknown
from llmprune.engine.budgets import Budget, multiple_of
from llmprune.engine.shapes import what_stays
from llmprune.engine.sites import all_sites, check_units, groups_of
from llmprune.engine.unit_amounts import allocate_units
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import Units, parse_pattern
from llmprune.recovery.schedules import SCHEDULES, counts_by_step

if TYPE_CHECKING:
    from llmprune.engine.shapes import Anatomies
    from llmprune.recipe import PruneStep, RecoverStep

KINDS = (CHANNELS, HEADS, QUERY_HEADS)
SPARED = {"first": 0.1, "last": 1.0}  # LoRAPrune: a share of all blocks, and a number of them
WINDOW = (0.1, 0.9)  # LoRAPrune


class Going(NamedTuple):
    """Units of one block that go: whose they are, and how many."""

    block: int
    coupling: Coupling
    units: int


def final_counts(wish: RecoverStep, anatomies: Anatomies) -> dict[str, Going]:
    """Return what goes in the end, by name of the units, such as `model.layers.3.heads`.

    Raises:
        UnknownName, RecipeError: a wish for other units than heads and channels, for more of them
            than there are in the blocks that are not spared, or an option that is none.
    """
    prune = wish.prune
    assert prune is not None
    check_kinds(prune)
    pattern = parse_pattern(prune.pattern)
    groups = [
        groups_of(pattern, anatomy, block=index, prefix=anatomies.prefixes[index], skip=prune.skip)
        for index, anatomy in enumerate(anatomies.blocks)
    ]
    check_units(pattern, groups, anatomies)
    sites, spared = all_sites(groups), spared_blocks(wish, len(groups))
    open_sites = [site for site in sites if site.block not in spared]
    if not open_sites:
        raise RecipeError(
            f"recover.options: all {len(groups)} blocks are spared, so nothing can go. Type --set "
            "recover.options.first=0 --set recover.options.last=0 to spare none."
        )
    asked = math.ceil(exact_sparsity(prune.sparsity) * what_stays(anatomies, prune, sites)[1])
    _check_room(prune, asked, open_sites, spared)
    prices = {site.name: site.unit_cost for site in open_sites}
    budget = Budget(asked=asked, weights=asked, prices=prices)
    counts = allocate_units(prune, "uniform", sites, budget) or {}
    return {
        site.name: Going(site.block, group.coupling, counts[site.name])
        for here in groups
        for group in here
        for site in group.sites
        if group.coupling is not None and counts.get(site.name)
    }


def counts_of(going: Going, wish: RecoverStep) -> dict[int, int]:
    """Return by step of the optimizer how many units are gone from then on, at last all that go.

    Groups within which units compete lose equally many at every step.
    """
    groups = going.coupling.num_groups
    by_group = counts_by_step(
        *(wish.schedule, wish.steps, wish.every),
        num=going.coupling.num_units // groups,
        final=going.units / going.coupling.num_units,
        window=wish.window or WINDOW,
        options=options_of(wish)[1],
    )
    return {step: groups * each for step, each in by_group.items()}


def options_of(wish: RecoverStep) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is said of spared blocks, defaults filled in, and the options of the schedule.

    Raises:
        UnknownName: an option that neither has.
        RecipeError: no share or number of blocks.
    """
    of_schedule = SCHEDULES[wish.schedule].options
    for name in wish.options:
        if name not in SPARED and name not in of_schedule:
            raise unknown("recover.options", name, [*SPARED, *of_schedule])
    spared = {name: wish.options.get(name, value) for name, value in SPARED.items()}
    first, last = spared["first"], spared["last"]
    if not 0 <= first < 1:
        raise RecipeError(
            f"recover.options.first: {first:g} is no share of the blocks. It is at least 0 and "
            "below 1; type 0.1 to spare the first tenth of them."
        )
    if last < 0 or last != int(last):
        raise RecipeError(
            f"recover.options.last: {last:g} is no number of blocks. Type 1 to spare the last, or "
            "0 for none."
        )
    return spared, {name: value for name, value in wish.options.items() if name not in SPARED}


def spared_blocks(wish: RecoverStep, num_blocks: int) -> set[int]:
    """Return the blocks that lose nothing: a share of them ahead, rounded down, and the last ones.

    >>> from llmprune.recipe import RecoverStep
    >>> spared_blocks(RecoverStep(), 32), spared_blocks(RecoverStep(options={"last": 2}), 4)
    ({0, 1, 2, 31}, {2, 3})
    """
    spared = options_of(wish)[0]
    ahead = math.floor(exact_sparsity(spared["first"]) * num_blocks)
    return {*range(ahead), *range(max(0, num_blocks - int(spared["last"])), num_blocks)}


def check_kinds(prune: PruneStep) -> None:
    """Check that a pattern is of units whose importance adapters tell, in equal numbers by block.

    Raises:
        RecipeError: it is of single weights, experts, halves or blocks, or an allocation is given.
    """
    pattern = parse_pattern(prune.pattern)
    if not isinstance(pattern, Units) or not {*pattern.kinds} <= {*KINDS}:
        raise RecipeError(
            f"recover.prune.pattern: loraprune removes {', '.join(KINDS)}, and the pattern is "
            f"{prune.pattern}. Type --set recover.prune.pattern=ffn-channels+heads, or --method "
            "full for other patterns."
        )
    if prune.allocation not in (None, "uniform"):
        raise RecipeError(
            "recover.prune.allocation: loraprune takes equally many units of a kind from every "
            f"block that is not spared, and {prune.allocation} decides otherwise. Leave it out."
        )


def _check_room(prune: PruneStep, asked: int, sites: Sequence[Site], spared: set[int]) -> None:
    """Check that blocks which are not spared can lose as much as is asked for."""
    multiple = multiple_of(prune, sites)
    most = sum(legal_counts(site, multiple, prune.parallel)[-1] * site.unit_cost for site in sites)
    if asked > most:
        share = math.floor(1000 * prune.sparsity * most / asked) / 1000
        raise RecipeError(
            f"recover.prune.sparsity: {prune.sparsity:g} of all weights in blocks is more than "
            f"{prune.pattern} can give outside of the spared blocks ({len(spared)} of them): at "
            f"most {share:g} can go. Type --set recover.prune.sparsity={share:g}, or spare none "
            "with --set recover.options.first=0 --set recover.options.last=0."
        )
