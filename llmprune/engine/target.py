"""The highest sparsity that keeps perplexity within a target, found before the cut.

Each round cuts candidates of eight sparsities in one walk, and the next looks between the last that
stayed within the target and the first that did not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from llmprune.allocation.types import Candidate
from llmprune.base.errors import RecipeError
from llmprune.engine.probing import Prober
from llmprune.mask.counts import exact_sparsity
from llmprune.recipe.pruning import allowed_loss

if TYPE_CHECKING:
    from llmprune.engine.plan import Plan

SPLITS, ROUNDS = 8, 3  # sparsities of a round, rounds: 1/512 of the most is told apart
UNIFORM = "uniform"


def meet_target(plan: Plan, probe: Prober) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with the sparsity found, and what the report says of the search.

    Candidates lose equal shares, with the plan's own score and solver, from statistics of the dense
    model; repairs, and allocations that look at the model, come on top in the cut.

    Raises:
        RecipeError: even the lowest sparsity looked at is outside the target.
    """
    (asked,) = (plan.prune.target or {}).values()
    kind, amount = allowed_loss(asked) or ("rise", 0.0)
    most = exact_sparsity(plan.prune.sparsity)
    (dense,) = (float(each.loss_S.mean()) for each in probe([Candidate()]))
    limit = dense + math.log1p(amount) if kind == "rise" else math.log(amount)
    low, high = Fraction(0), most
    seen: dict[Fraction, float] = {}
    for _ in range(ROUNDS):
        step = (high - low) / SPLITS
        wished = [low + step * (index + 1) for index in range(SPLITS)]
        for share, loss in zip(wished, _losses(plan, probe, wished), strict=True):
            seen[share] = loss
        within = [low, *wished]
        place = next((i for i, s in enumerate(within) if i and seen[s] > limit), len(within))
        low = within[place - 1]
        if place == len(within):
            break
        high = within[place]
    if not low:
        raise RecipeError(
            f"prune.target: ppl={asked} allows {math.exp(limit):.4g}, the dense model has "
            f"{math.exp(dense):.4g}, and a sparsity of {float(high):.4f} already gives "
            f"{math.exp(seen[high]):.4g}. Allow more, as in --target ppl=+10%, or choose a "
            "stronger method with --effort best."
        )
    found = math.floor(low * 10_000) / 10_000
    return _at(plan, found), {
        "asked": {"ppl": asked},
        "sparsity": found,
        "limit": math.exp(limit),
        "dense": math.exp(dense),
        "expected": math.exp(seen[low]),
        "looked_at": {f"{float(share):.4f}": math.exp(seen[share]) for share in sorted(seen)},
    }


def reached(found: Mapping[str, Any], perplexity: float) -> dict[str, Any]:
    """Return what the report says of a target once the result was measured."""
    return {**found, "reached": perplexity, "met": perplexity <= found["limit"]}


def _losses(plan: Plan, probe: Prober, wished: list[Fraction]) -> list[float]:
    """Return the mean loss of the model at each sparsity."""
    candidates = []
    for share in wished:
        counts = _at(plan, float(share)).with_allocation(UNIFORM).counts or {}
        units = {site.name: site.num_units for site in plan.sites}
        candidates.append(
            Candidate(shares={name: Fraction(num, units[name]) for name, num in counts.items()})
        )
    return [float(each.loss_S.mean()) for each in probe(candidates)]


def _at(plan: Plan, sparsity: float) -> Plan:
    """Return the plan of the same recipe with another sparsity; counts may await a survey."""
    step = plan.prune.model_copy(update={"sparsity": sparsity})
    steps = tuple(
        each.model_copy(update={"prune": step}) if each.prune else each
        for each in plan.recipe.steps
    )
    changed = replace(plan, recipe=plan.recipe.model_copy(update={"steps": steps}))
    return changed.recounted()
