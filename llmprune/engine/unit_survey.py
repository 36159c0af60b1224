"""What is learnt of whole units before the first cut: scores of all units, and what masks
candidates.

Blocks are opened one at a time and stay as they are. Legend: U units of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmprune.allocation import ALLOCATIONS
from llmprune.arch.couplings import EXPERTS
from llmprune.engine.units import EMPTY, is_deep, members_of, unit_scores
from llmprune.score import score_row
from llmprune.score.noise import seed_of
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream
from llmprune.walk.observation import observe
from llmprune.walk.routing import observe_routing

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.engine.plan import Plan
    from llmprune.engine.survey import Surroundings

Found = tuple[dict[str, "Tensor"], dict[int, dict[str, Stats]]]


def unit_profiles(plan: Plan, around: Surroundings) -> Found:
    """Return every site's profile, and the statistics of taps by block that mask candidates.

    A profile is what the allocation's row makes of the scores that the method gives a site's units,
    or how far the site's block moves what passes through it.
    """
    profile = ALLOCATIONS[plan.allocation].profile
    profiles: dict[str, Tensor] = {}
    statistics: dict[int, dict[str, Stats]] = {}
    if profile is None and not plan.probe_needs:
        return profiles, statistics
    embed = around.stream if plan.parts.routing else around.shared
    stream = embed(apart="probe" in ALLOCATIONS[plan.allocation].needs)
    with around.progress.stage("survey", len(plan.groups)) as stage:
        for index, groups in enumerate(plan.groups):
            with around.blocks.open(index) as block:
                for site in (site for group in groups for site in group.sites):
                    for span in site.spans:
                        block.check_finite(span.linear)
                routed = routing_of(plan, block, stream)
                seen = observe(block, stream, plan.needs(index), dense=True)
                known = beside(seen.stats, seen.residual, routed)
                learnt = around.gradients(index)
                for group in groups if profile is not None else ():
                    (site,) = group.sites
                    if profile is not None and profile.level == "residual":
                        assert seen.residual is not None
                        profiles[site.name] = seen.residual["residual"]
                        continue
                    if is_deep(site) and not _judges_depth(plan):
                        continue
                    members = members_of(group, block, known, learnt)
                    options = plan.options_of(score_row(plan.method.score).options)
                    score_U = unit_scores(
                        *(plan.method, members, site, options),
                        draw=lambda linear, b=block: seed_of(plan.recipe.seed, b.prefix + linear),
                    )
                    assert profile is not None
                    found: Any = profile.fn(score_U)
                    profiles[site.name] = found.cpu()
                masks_by = (*plan.probe_needs, *_others(known))
                statistics[index] = {
                    tap: replace(
                        s, values={n: v.cpu() for n, v in s.values.items() if n in masks_by}
                    )
                    for tap, s in known.items()
                }
            stage.advance(f"block {index}")
    stream.hidden.close()
    return profiles, statistics


def routing_of(plan: Plan, block: Block, stream: Stream | None) -> Stats | None:
    """Return what a block's experts are given and answer, where the plan asks for it and there are
    any."""
    kinds = {site.kind for group in plan.groups[block.index] for site in group.sites}
    if not plan.parts.routing or EXPERTS not in kinds or stream is None:
        return None
    return observe_routing(block, stream, plan.parts.routing)


def beside(
    stats: Mapping[str, Stats], residual: Stats | None, routed: Stats | None
) -> dict[str, Stats]:
    """Return the statistics of taps with what is known of the whole block in each, and under ""."""
    extra: dict[str, Tensor] = {}
    tokens = 0
    for each in (residual, routed):
        if each is not None:
            extra |= each.values
            tokens = max(tokens, each.num_tokens)
    found = {tap: replace(s, values={**s.values, **extra}) for tap, s in stats.items()}
    return found | ({"": replace(EMPTY, num_tokens=tokens, values=extra)} if extra else {})


def _only(names: tuple[str, ...], stats: Stats) -> Stats:
    """Return some of the statistics of a tap, on the host."""
    return replace(stats, values={n: v.cpu() for n, v in stats.values.items() if n in names})


def _others(known: Mapping[str, Stats]) -> tuple[str, ...]:
    return tuple(known[""].values) if "" in known else ()


def _judges_depth(plan: Plan) -> bool:
    """Tell whether the method's score says something of a whole half or block."""
    return "residual" in score_row(plan.method.score).learnt
