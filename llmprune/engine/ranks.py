"""Which linears become two, and of what rank: decided from shapes, before a weight is read.

A unit of such a site is a rank: O + I weights of the two linears. A linear has as many as make
these as large as it was, O I / (O + I); what loses none of them stays as it is.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from llmprune.arch.types import RANK, Linear, Site, Span
from llmprune.base.errors import RecipeError
from llmprune.base.text import ranges
from llmprune.catalog import Method, methods_for
from llmprune.engine.sites import Group, all_sites
from llmprune.mask.pattern import LOW_RANK, LowRank, Pattern
from llmprune.score import RANK_SCORES
from llmprune.solver.low_rank import rank_for

if TYPE_CHECKING:
    from llmprune.arch.anatomy import Anatomy
    from llmprune.engine.plan import Plan
    from llmprune.recipe.pruning import PruneStep

UNFIT = ("solver", "refine", "repair", "reduce", "min_keep", "permute", "multiple", "group")
DENSE = "dense"
"""The form of a result whose linears are products of factors, in tensors of the shape they had."""


def compose_ranks(step: PruneStep, pattern: Pattern, method: Method) -> Method:
    """Return the method of a step that lowers the rank of linears.

    Raises:
        RecipeError: method and pattern do not go together, or something is asked for that is of
            masks or of units.
    """
    if method.score not in RANK_SCORES or not isinstance(pattern, LowRank):
        able = methods_for(step.pattern)
        raise RecipeError(
            f"prune.pattern: method {method.name} has no rule for {step.pattern}; it is for "
            f"{', '.join(method.patterns)}. Type --pattern {method.pattern}, or --method "
            f"{' or '.join(able[:4])}."
        )
    for name in UNFIT:
        if (given := getattr(step, name)) not in (None, "none", "zero", False):
            raise RecipeError(
                f"prune.{name}: {given!r} is for masks or for whole units, and {LOW_RANK} puts two "
                "linears in place of one. Leave it out."
            )
    if step.target:
        raise RecipeError(
            f"prune.target: {min(step.target)} is not looked for with pattern {LOW_RANK}, whose "
            "ranks follow from a share. Give a --sparsity: parameters of the linears fall by it."
        )
    if step.allocation not in (None, "uniform", "manual"):
        raise RecipeError(
            f"prune.allocation: {step.allocation} compares masks, and {LOW_RANK} has none. Leave "
            "it out, or name shares: --set 'prune.sparsities={\"*down_proj\": 0.5}'."
        )
    if step.propagate == "dense" and not RANK_SCORES[method.score].needs:
        raise RecipeError(
            f"prune.propagate: {method.name} reads no text, so nothing is passed on. Leave it out."
        )
    if step.options:
        raise RecipeError(f"prune.options: {method.title} has none; leave it out.")
    return replace(method, solver="zero", refine=None, repair=None)


def decide_rank_form(step: PruneStep) -> str:
    """Return how linears of low rank are stored: as two ("shrunk"), or as their product ("dense").

    Raises:
        RecipeError: a form or tier that neither is.
    """
    if step.form == "masked":
        raise RecipeError(
            f"prune.form: masked writes zeros, and {LOW_RANK} has none. Type --set prune.tier=E0 "
            "for tensors of the old shape, which save nothing, or leave form out."
        )
    if step.tier in ("E1", "E2"):
        raise RecipeError(
            f"prune.tier: {step.tier} cannot hold this result: no stock class, and no other "
            "runtime, has two linears in place of one. Type --set prune.tier=E3 for code beside "
            "the weights, or E0 for their product, which saves nothing."
        )
    if step.tier == "E0":
        if step.form == "shrunk":
            raise RecipeError(
                "prune.form: shrunk needs two linears in place of one, which tier E0, a stock "
                "model, does not have. Leave one of form and tier out."
            )
        return DENSE
    return "shrunk"


def rank_groups(
    anatomy: Anatomy, groups: Sequence[Group], *, tier: str, block: int
) -> tuple[Group, ...]:
    """Return the groups of linears of a block whose rank may be lowered.

    Those go that have no rank to lose, and but for tier E0 what is no parameter of its own: a part
    of a fused one, or of a stack of experts.
    """
    found = []
    for group in groups:
        sites = []
        for site in group.sites:
            linear = anatomy.linears[site.spans[0].linear]
            if (tier == "E0" or is_single(linear)) and most_ranks(linear.shape) > 1:
                sites.append(rank_site(site.name, linear, block))
        if sites:
            found.append(replace(group, sites=tuple(sites)))
    return tuple(found)


def rank_site(name: str, linear: Linear, block: int) -> Site:
    """Return the site of a linear by its full name."""
    return Site(
        name=name,
        block=block,
        spans=(Span(linear=linear.name, axis="weight"),),
        num_units=most_ranks(linear.shape),
        unit_cost=sum(linear.shape),
        shape=linear.shape,
        kind=RANK,
    )


def is_single(linear: Linear) -> bool:
    """Tell whether a linear is the whole weight of a module, which others can stand for."""
    whole = linear.num_parts == 1 and linear.expert is None
    return whole and linear.param == f"{linear.name}.weight"


def most_ranks(shape: tuple[int, int]) -> int:
    """Return the ranks that two linears may have and be no larger than one of (O, I).

    >>> most_ranks((4096, 4096)), most_ranks((6, 3))
    (2048, 2)
    """
    return rank_for(shape, 0)


def check_ranks(step: PruneStep, groups: Sequence[Sequence[Group]], model_type: str) -> None:
    """Check that there is a linear whose rank can be lowered.

    Raises:
        RecipeError: there is none.
    """
    if not all_sites(groups):
        raise RecipeError(
            f"prune.pattern: no linear of this {model_type} model that is to be pruned is a module "
            "of its own, so no two can take the place of one. Type --set prune.tier=E0 for "
            "products in the old tensors, which save nothing, or --pattern ffn-channels."
        )


def rank_counts(sites: Sequence[Site], shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Return how many ranks each linear loses: the fewest that free its share of weights.

    A linear keeps one at least, and all where it is to lose nothing. So a little more goes than is
    asked for: what is left over of a rank.
    """
    counts = {}
    for site in sites:
        assert site.shape is not None
        share = shares[site.name]
        kept = rank_for(site.shape, float(share)) if share else site.num_units
        counts[site.name] = site.num_units - kept
    return counts


def rank_notes(plan: Plan) -> tuple[str, ...]:
    """Return what a reader of a plan may not expect."""
    if not isinstance(plan.pattern, LowRank):
        return ()
    notes = []
    if plan.form == DENSE:
        notes.append(
            "tier E0 writes the product of the factors in a tensor of the old shape: it loads "
            "everywhere, and saves no parameter, no memory and no time. sparsity is what the "
            "factors would save; type --set prune.tier=E3 to get them"
        )
    counts = plan.counts or {}
    whole = [site for site in plan.sites if not counts[site.name]]
    if whole:
        names = dict.fromkeys(site.spans[0].linear for site in whole)
        notes.append(f"left dense, as no rank is to go: {', '.join(names)}")
    return tuple(notes)


def ranks_line(plan: Plan) -> str:
    """Return the rank of every kind of linear, blocks of equal ranks joined."""
    if not isinstance(plan.pattern, LowRank) or plan.counts is None:
        return ""
    found: dict[tuple[str, int, tuple[int, int]], list[int]] = {}
    for site in plan.sites:
        if (count := plan.counts[site.name]) and site.shape is not None:
            key = (site.spans[0].linear, site.num_units - count, site.shape)
            found.setdefault(key, []).append(site.block)
    everywhere = list(range(len(plan.groups)))
    return ", ".join(
        f"{name} {rank:,} of {shape[0]:,} x {shape[1]:,}"
        + ("" if blocks == everywhere else f" (blocks {ranges(blocks)})")
        for (name, rank, shape), blocks in found.items()
    )


def ranks_by_block(plan: Plan, counts: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the rank of every linear that becomes two, by its name in its block."""
    return [
        {
            site.spans[0].linear: site.num_units - counts[site.name]
            for group in groups
            for site in group.sites
            if counts[site.name]
        }
        for groups in plan.groups
    ]
