"""The walks before the cut: what an allocation must know of every linear, and what it then decides.

Blocks are opened one at a time and stay as they are. Legend: O outputs, I inputs, N units that an
earlier pruning left, S sequences, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.threshold import Histogram, count_lowest, histogram
from llmprune.allocation.types import Candidate, Evidence, Probe, Profile
from llmprune.arch.types import Site
from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import read_json
from llmprune.engine.amounts import spared
from llmprune.engine.cutting import Learnt, Prior
from llmprune.engine.gates import learn_gates
from llmprune.engine.gradients import Gradients, take_gradients
from llmprune.engine.plan import Plan
from llmprune.engine.probing import Prober
from llmprune.engine.sites import linears_of
from llmprune.engine.solving import EMPTY
from llmprune.engine.target import meet_target
from llmprune.engine.unit_survey import unit_profiles
from llmprune.mask.counts import exact_sparsity, round_half_up
from llmprune.mask.pattern import Tiles, Units, pool_tiles
from llmprune.stats.types import Stats
from llmprune.walk.block import Blocks
from llmprune.walk.forward import Stream
from llmprune.walk.observation import Seen, in_rounds, observe
from llmprune.walk.sharing import ALONE, Others

if TYPE_CHECKING:
    from torch import Tensor

UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a survey walks over.

    `embed` gives fresh hidden states of token ids; blocks stay dense, and so do these. `prior`
    gives the masks of earlier prunings of a block, `gradients` what a backward survey learnt of it;
    `others` are the processes that take part in that.
    `tokens_NT` is absent where no part of the run reads text; `folder` keeps what an interrupted
    search goes on from.
    """

    blocks: Blocks
    progress: Progress
    tokens_NT: Tensor | None = None
    embed: Callable[[Tensor], Stream] | None = None
    share: Callable[[Tensor], Stream] | None = None
    prior: Callable[[int], Prior] = lambda index: {}
    gradients: Callable[[int], Learnt] = lambda index: {}
    folder: Path | None = None
    others: Others = ALONE

    @property
    def parts(self) -> Parts:
        """Return the sequences to learn from, to search with, and to judge on."""
        assert self.tokens_NT is not None
        return set_apart(self.tokens_NT)

    def stream(self, *, apart: bool = False) -> Stream:
        """Return hidden states of all sequences, or of those that are learnt from."""
        assert self.tokens_NT is not None and self.embed is not None
        return self.embed(self.parts.learn_NT if apart else self.tokens_NT)

    def shared(self, *, apart: bool = False) -> Stream:
        """Return the same, shared among the processes of the run: for what is observed alone."""
        return replace(self, embed=self.share or self.embed).stream(apart=apart)


class Parts(NamedTuple):
    """Sequences that a survey learns from, that candidates are compared on, and that the outcome is
    judged on."""

    learn_NT: Tensor
    search_ST: Tensor
    judge_ST: Tensor


def set_apart(tokens_NT: Tensor) -> Parts:
    """Return sequences for learning, searching and judging: an eighth, 16 at most, for each of the
    last two. Fewer than three sequences have to serve for more than one.

    >>> [len(part) for part in set_apart(torch.zeros(128, 4))]
    [96, 16, 16]
    """
    num = min(16, max(1, len(tokens_NT) // 8))
    rest_NT = tokens_NT[: max(1, len(tokens_NT) - num)]
    return Parts(rest_NT[: max(1, len(rest_NT) - num)], rest_NT[-num:], tokens_NT[-num:])


def take_survey(plan: Plan, around: Surroundings, *, record: Path | None = None) -> Plan:
    """Read all linears and return the plan with the counts that follow.

    A ranking may look twice, the second time more closely at what lies at the threshold. A judged
    allocation is compared with equal shares on sequences set apart, and gives way to them where it
    is no better. The counts are written to `record`; where it exists already they are read from
    there, and nothing else is.

    Raises:
        NumericalError: a weight or an activation is not finite; names it.
        CheckpointError: the record is of another run.
    """
    if record is not None and record.exists():
        return _recorded(plan, record)
    profiles, statistics = _profiles(plan, around)
    row = ALLOCATIONS[plan.allocation]
    probe = _prober(plan, around, statistics, "search") if "probe" in row.needs else None
    again = None
    if "remeasure" in row.needs:
        again = _prober(plan, around, statistics, "search").remeasure
    plan = plan.with_profiles(profiles, probe, again)
    if row.judged:
        judge = _prober(plan, around, statistics, "verdict")
        plan = _judged(plan, judge, around.progress)
    if record is not None and plan.counts is not None:
        found = {"allocation": plan.allocation, "removed": dict(plan.counts)}
        found |= {"facts": dict(plan.facts)} if plan.facts else {}
        write_json(record, found | ({"verdict": dict(plan.verdict)} if plan.verdict else {}))
    return plan


def _recorded(plan: Plan, record: Path) -> Plan:
    """Return the plan with the counts of an earlier survey.

    Raises:
        CheckpointError: they are of other linears.
    """
    found = read_json(record)
    counts = found.get("removed", {})
    if counts.keys() != {site.name for site in plan.sites}:
        raise CheckpointError(
            f"{record} does not hold the counts of this run's linears. Begin again with "
            "--overwrite."
        )
    facts = found.get("facts", {})
    return replace(plan, counts=counts, verdict=found.get("verdict"), facts=facts)


def _judged(plan: Plan, probe: Probe, progress: Progress) -> Plan:
    """Return the plan with the better of its counts and equal shares, by what the prober says."""
    assert plan.counts is not None
    units = {site.name: site.num_units for site in plan.sites}
    own = {name: Fraction(count, units[name]) for name, count in plan.counts.items()}
    even = plan.with_allocation(UNIFORM)
    assert even.counts is not None
    same = {name: Fraction(count, units[name]) for name, count in even.counts.items()}
    theirs, ours = probe([Candidate(shares=same), Candidate(shares=own)])
    adopted = ours.kl < theirs.kl or plan.prune.adopt == "always"
    verdict: dict[str, Any] = {
        "allocation": plan.allocation,
        "kl": {UNIFORM: theirs.kl, plan.allocation: ours.kl},
        "adopted": adopted,
        "sequences": len(ours.kl_S),
    }
    num = len(ours.kl_S)
    progress.note(
        f"allocation: KL to the dense model {ours.kl:.4g} with {plan.allocation}, {theirs.kl:.4g} "
        f"with uniform, on {num} sequence{'' if num == 1 else 's'} set apart; "
        + (plan.allocation if adopted else UNIFORM)
        + " is used"
    )
    return replace(plan if adopted else replace(plan, counts=even.counts), verdict=verdict)


def _need(embed: Callable[[Tensor], Stream] | None) -> Callable[[Tensor], Stream]:
    assert embed is not None
    return embed


def _prober(
    plan: Plan, around: Surroundings, statistics: Mapping[int, Mapping[str, Stats]], name: str
) -> Prober:
    assert around.tokens_NT is not None
    return Prober(
        plan=plan,
        blocks=around.blocks,
        cutter=plan.masker(),
        tokens_ST=around.parts.search_ST if name == "search" else around.parts.judge_ST,
        embed=_need(around.embed),
        progress=around.progress,
        statistics=lambda index: statistics.get(index, {}),
        gradients=around.gradients,
        prior=around.prior,
        at_once=plan.estimate.probe_at_once,
        log=around.folder / f"{name}.jsonl" if around.folder else None,
    )


def _profiles(
    plan: Plan, around: Surroundings
) -> tuple[dict[str, Tensor], dict[int, Mapping[str, Stats]]]:
    """Return every site's profile, and the statistics that candidates are masked by.

    A profile is what the row's function says, or how many of a site's units rank lowest of all.
    """
    row = ALLOCATIONS[plan.allocation]
    profile = row.profile
    if isinstance(plan.pattern, Units):
        profiles, units = unit_profiles(plan, around)
        return profiles, dict(units)
    if profile is not None and profile.ranked:
        return _lowest(plan, around, profile), {}
    masks_by = plan.probe_needs
    needs = (*dict.fromkeys((*(profile.needs if profile else ()), *masks_by)),)
    found: dict[str, Tensor] = {}
    statistics: dict[int, dict[str, Stats]] = {}
    for index, stats, evidence in _visit(plan, around, needs, "survey"):
        statistics.setdefault(index, {}).update(
            (tap, replace(each, values={n: each[n].cpu() for n in masks_by if n in each.values}))
            for tap, each in stats.items()
        )
        if profile is not None:
            found |= _profile(plan, profile, evidence)
        del stats, evidence  # before those of the next block
    return found, dict(statistics)


def _with_influence(seen: Seen) -> Mapping[str, Stats]:
    """Return the statistics of taps, each with how much its block adds to what passes through."""
    value = torch.tensor(seen.influence, dtype=torch.float64)
    return {
        tap: replace(each, values={**each.values, "influence": value})
        for tap, each in seen.stats.items()
    }


def _profile(
    plan: Plan, profile: Profile, evidence: Mapping[str, Evidence]
) -> Mapping[str, Tensor]:
    """Return the profiles of some sites of a block."""
    known = plan.options_of(ALLOCATIONS[plan.allocation].options)
    options = {name: known[name] for name in profile.options}
    found: Any
    if profile.level == "block":
        found = profile.fn(evidence, **options)
    else:
        found = {name: profile.fn(*each, **options) for name, each in evidence.items()}
    return dict(found)


def _lowest(plan: Plan, around: Surroundings, profile: Profile) -> dict[str, Tensor]:
    """Return how many of every site's units are among the lowest of the whole model."""

    def look(within: int | None) -> Iterator[tuple[str, Histogram]]:
        name = "survey" if within is None else "second look"
        for _, _, evidence in _visit(plan, around, profile.needs, name):
            for site, each in evidence.items():
                yield site, _ranked(plan, profile, *each, within)

    floor = spared(plan.prune, plan.allocation, plan.sites)
    classes: dict[str, list[Site]] = {}
    for site in plan.sites:
        name = profile.among(site.spans[0].linear) if profile.among else ""
        classes.setdefault(name, []).append(site)
    first = dict(look(None)) if len(classes) > 1 else {}
    counts: dict[str, int] = {}
    passed = wanted = 0
    for sites in classes.values():
        names = {site.name for site in sites}

        def own(within: int | None, names: set[str] = names) -> Iterator[tuple[str, Histogram]]:
            found = first.items() if first and within is None else look(within)
            return ((site, each) for site, each in found if site in names)

        passed += sum(site.num_units for site in sites)
        due = round_half_up(exact_sparsity(plan.prune.sparsity) * passed) - wanted
        wanted += due
        counts |= count_lowest(own, due, floor)
    return {site: torch.tensor([count]) for site, count in counts.items()}


def _visit(
    plan: Plan, around: Surroundings, needs: tuple[str, ...], name: str
) -> Iterator[tuple[int, Mapping[str, Stats], Mapping[str, Evidence]]]:
    """Yield blocks in order with the statistics of their taps and what there is of every linear.

    A block whose statistics do not fit at once is yielded in parts, unless it is looked at whole.
    """
    row = ALLOCATIONS[plan.allocation]
    stream = around.shared(apart=row.judged or "probe" in row.needs) if needs else None
    blocks, room = around.blocks, plan.estimate.statistics_bytes
    profile = ALLOCATIONS[plan.allocation].profile
    if profile is not None and profile.level == "block":
        room = sys.maxsize
    with around.progress.stage(name, len(blocks)) as stage:
        for index, groups in enumerate(plan.groups):
            with blocks.open(index) as block:
                masks = around.prior(index)
                for group in groups:
                    for site in group.sites:
                        block.check_finite(site.spans[0].linear)
                wanted = {group.tap: needs for group in groups}
                rounds = in_rounds(block.anatomy, wanted, room) if needs else [{}]
                for part in rounds:
                    stats: Mapping[str, Stats] = {}
                    if stream is not None:
                        seen = observe(block, stream, part, dense=part is rounds[-1])
                        stats = _with_influence(seen)
                        del seen
                    evidence = {
                        site.name: Evidence(
                            block.weight(site.spans[0].linear),
                            stats.get(group.tap, EMPTY),
                            masks.get(site.name),
                        )
                        for group in groups
                        if not needs or group.tap in part
                        for site in group.sites
                    }
                    yield index, stats, evidence
                    del stats, evidence  # one round's at a time
            stage.advance(f"block {index}")
    if stream:
        stream.hidden.close()


def _ranked(
    plan: Plan,
    profile: Profile,
    weight_OI: Tensor,
    stats: Stats,
    keep_OI: Tensor | None,
    within: int | None,
) -> Histogram:
    """Return the histogram of a linear's units; what an earlier pruning removed is below all."""
    score_OI: Any = profile.fn(weight_OI, stats, keep_OI)
    if keep_OI is not None:
        score_OI.masked_fill_(~keep_OI.to(score_OI.device), -torch.inf)
    if isinstance(plan.pattern, Tiles):
        score_OI = pool_tiles(score_OI, plan.pattern, plan.method.pool)
    score_N = score_OI.reshape(-1)
    if keep_OI is not None:
        score_N = score_N[score_N != -torch.inf]
    num_removed = score_OI.numel() - len(score_N)
    if profile.normalise is not None:
        score_N = profile.normalise(score_N)
    return histogram(score_N, num_removed=num_removed, within=within)


def before_the_cut(
    plan: Plan,
    around: Surroundings,
    *,
    question_NT: Tensor | None = None,
    record: Path | None = None,
) -> tuple[Plan, Callable[[int], Learnt]]:
    """Take the surveys that a plan needs; return it with all counts, and every block's gradients.

    `question_NT` are the windows whose perplexity a target is about.

    Raises:
        LlmpruneError: a survey failed, or a target cannot be met.
    """
    if around.folder is not None and plan.parts.tokens:
        around.folder.mkdir(parents=True, exist_ok=True)
    if plan.parts.backward:
        around = replace(around, gradients=_gradients(plan, around).of)
    if plan.parts.gates:
        around = replace(around, gradients=_gates(plan, around))
    if plan.searches:
        if question_NT is None:
            raise RecipeError(
                "prune.target: there is no text to measure perplexity on. The recipe must have a "
                "step `evaluate` whose text can be read; type --set evaluate.data=demo."
            )
        plan, found = meet_target(plan, _searcher(plan, around, question_NT))
        plan = replace(plan, target=found)
    if plan.counts is None:
        plan = take_survey(plan, around, record=record)
    return plan, around.gradients


def _gates(plan: Plan, around: Surroundings) -> Callable[[int], Learnt]:
    """Learn a gate for every unit, or take those that an interrupted run has learnt."""
    assert around.tokens_NT is not None
    return learn_gates(
        around.blocks,
        plan.groups,
        around.tokens_NT,
        target=plan.asked / sum(site.num_weights for site in plan.sites),
        steps=plan.parts.gates,
        progress=around.progress,
        file=around.folder / "gates.safetensors" if around.folder else None,
    )


def _gradients(plan: Plan, around: Surroundings) -> Gradients:
    """Take the backward survey, or what is missing of it."""
    assert around.tokens_NT is not None
    return take_gradients(
        around.blocks,
        around.tokens_NT,
        plan.parts.backward,
        [linears_of(groups) for groups in plan.groups],
        folder=around.folder,
        room=plan.estimate.gradient_bytes,
        progress=around.progress,
        place=plan.estimate.gradient_place if around.folder is not None else "host",
        others=around.others,
    )


def _searcher(plan: Plan, around: Surroundings, tokens_ST: Tensor) -> Prober:
    """Return what cuts candidates as the run will, with statistics of the dense model."""
    return Prober(
        plan=plan,
        blocks=around.blocks,
        cutter=plan.masker() if plan.parts.regional else plan.cutter(),
        tokens_ST=tokens_ST,
        embed=_need(around.embed),
        progress=around.progress,
        learn=around.stream if plan.parts.cut else None,
        gradients=around.gradients,
        prior=around.prior,
        at_once=max(1, plan.estimate.probe_at_once),
        log=around.folder / "target.jsonl" if around.folder else None,
    )
