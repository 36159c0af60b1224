"""Candidates walked together: every one is compared with the dense model on text set aside.

A walk opens each block once for all candidates of a round. Candidates that agree up to a block
share their hidden states up to there. Legend: S sequences, T tokens, B sequences of a micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.types import Candidate, Measured
from llmprune.base.progress import Progress
from llmprune.calibration.replay import call
from llmprune.checkpoint.sink import append_line
from llmprune.engine.outcome import Outcome
from llmprune.engine.solving import Cutter
from llmprune.evaluation.divergence import distances
from llmprune.mask.counts import round_half_up
from llmprune.score.noise import seed_of
from llmprune.stats.types import Stats
from llmprune.walk.block import Block, Blocks
from llmprune.walk.forward import Stream
from llmprune.walk.observation import observe

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.engine.plan import Plan

Change = tuple[str, str, str]
"""(site, "share" or "noise", how much): one change of one linear."""
State = tuple[tuple[Change, ...], ...]
"""The changes of all blocks passed so far: candidates of one state share hidden states."""


@dataclass(frozen=True, kw_only=True)
class Prober:
    """Answers candidates by one walk for as many as `at_once` says.

    Candidates are cut by `cutter` (its counts are theirs) with the statistics of the dense model:
    those that `statistics` holds, or, with `learn`, collected on that stream as the walk goes.
    Every answer is appended to `log`, if given, from which an interrupted search is answered again.
    """

    plan: Plan
    blocks: Blocks
    cutter: Cutter
    tokens_ST: Tensor
    embed: Callable[[Tensor], Stream]
    progress: Progress
    statistics: Callable[[int], Mapping[str, Stats]] = lambda index: {}
    learn: Callable[[], Stream] | None = None
    gradients: Callable[[int], Mapping[str, Stats]] = lambda index: {}
    prior: Callable[[int], Mapping[str, Tensor]] = lambda index: {}
    at_once: int = 16
    log: Path | None = None
    _known: dict[str, list[list[list[float]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.log is not None and self.log.exists():
            content = self.log.read_bytes()
            end = content.rfind(b"\n") + 1
            for line in content[:end].splitlines():
                row = json.loads(line)
                self._known[row["round"]] = row["answers"]
            if end < len(content):  # the line that an interruption cut short
                os.truncate(self.log, end)

    def __call__(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """Return what each candidate's next-token distributions are like, in order."""
        return [
            answer
            for start in range(0, len(candidates), self.at_once)
            for answer in self._round(candidates[start : start + self.at_once])
        ]

    @property
    def distances(self) -> tuple[str, ...]:
        """Return the distances that the allocation asks for besides KL."""
        return ALLOCATIONS[self.plan.allocation].distances

    def _round(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """Answer what one walk can; from the log where it was answered before."""
        key = _digest(candidates, self.distances)
        if key not in self._known:
            found = self._walk(candidates)
            self._known[key] = [
                [each_S.tolist() for each_S in (each.kl_S, each.loss_S, *each.others.values())]
                for each in found
            ]
            if self.log is not None:
                append_line(self.log, json.dumps({"round": key, "answers": self._known[key]}))
        answers = [
            [torch.tensor(values, dtype=torch.float64) for values in answer]
            for answer in self._known[key]
        ]
        return [
            Measured(kl_S, loss_S, dict(zip(self.distances, others, strict=True)))
            for kl_S, loss_S, *others in answers
        ]

    def _walk(self, candidates: Sequence[Candidate]) -> list[Measured]:
        """Walk the dense model and all candidates, block by block."""
        blocks = self.blocks
        stream = self.embed(self.tokens_ST)
        first = [stream.hidden.get(batch, blocks.device).clone() for batch in range(len(stream))]
        stream.hidden.close()  # what is on disk gives way to the stream that is learnt from
        learn = self.learn() if self.learn is not None else None
        states: dict[State, list[Tensor]] = {(): first}
        at: list[State] = [() for _ in candidates]
        with self.progress.stage("probe", len(blocks)) as stage, torch.no_grad():
            for index in range(len(blocks)):
                with blocks.open(index) as block:
                    sites = {s.name: s for g in self.plan.groups[index] for s in g.sites}
                    changes = [_changes(candidate, sites) for candidate in candidates]
                    wanted = {((), ()), *zip(at, changes, strict=True)}
                    states = self._advance(block, stream, learn, states, wanted)
                at = [_after(s, change) for s, change in zip(at, changes, strict=True)]
                stage.advance(f"{len(states)} states")
        if learn is not None:
            learn.hidden.close()
        return self._compare(states, at)

    def remeasure(self, shares: Mapping[str, Fraction]) -> dict[int, Tensor]:
        """Return how far every block moves what passes it, once sites have lost some shares.

        One walk of the model that is left, on the sequences that candidates are compared on.
        """
        candidate = Candidate(shares=shares)
        stream = self.embed(self.tokens_ST)
        found: dict[int, Tensor] = {}
        with self.progress.stage("measure", len(self.blocks)) as stage:
            for index in range(len(self.blocks)):
                with self.blocks.open(index) as block:
                    sites = {s.name: s for g in self.plan.groups[index] for s in g.sites}
                    changing = _Changing(prober=self, block=block, stats=self.statistics(index))
                    with changing.changed(_changes(candidate, sites)):
                        seen = observe(block, stream, {}, dense=True)
                    assert seen.residual is not None
                    found[index] = seen.residual["residual"]
                stage.advance(f"block {index}")
        stream.hidden.close()
        return found

    def _advance(
        self,
        block: Block,
        stream: Stream,
        learn: Stream | None,
        states: dict[State, list[Tensor]],
        wanted: set[tuple[State, tuple[Change, ...]]],
    ) -> dict[State, list[Tensor]]:
        """Return the hidden states after a block, for every state and every change of the block."""
        after: dict[State, list[Tensor]] = {}
        stats = self.statistics(block.index)
        if learn is not None:
            stats = observe(block, learn, self.plan.needs(block.index), dense=True).stats
        changing = _Changing(prober=self, block=block, stats=stats)
        for change in sorted({change for _, change in wanted}):
            with changing.changed(change):
                for state in sorted({state for state, each in wanted if each == change}):
                    after[_after(state, change)] = [
                        call(block.module, hidden, stream.arguments[batch][block.index])
                        for batch, hidden in enumerate(states[state])
                    ]
        return after

    def _compare(self, states: Mapping[State, list[Tensor]], at: Sequence[State]) -> list[Measured]:
        """Return the distances of every candidate; equal ones are measured once."""
        order = sorted(set(at))
        rows: dict[State, list[Any]] = {state: [] for state in order}
        sizes = [hidden.shape[:-2].numel() for hidden in states[()]]
        num_predicted = self.tokens_ST.shape[1] - 1
        with torch.no_grad(), self.blocks.trunk(head=True):
            for batch, ids_BT in enumerate(self.tokens_ST.split(sizes)):
                others = [states[state][batch] for state in order]
                found = distances(self.blocks, states[()][batch], others, ids_BT, self.distances)
                for state, each in zip(order, found, strict=True):
                    rows[state].append(each)
        answers = {
            state: Measured(
                torch.cat([each.kl_B for each in found]) / num_predicted,
                torch.cat([each.loss_B for each in found]) / num_predicted,
                {n: torch.cat([each.means[n] for each in found]) for n in self.distances},
            )
            for state, found in rows.items()
        }
        return [answers[state] for state in at]


@dataclass(frozen=True, kw_only=True)
class _Changing:
    """One open block, and what its linears are cut by."""

    prober: Prober
    block: Block
    stats: Mapping[str, Stats]

    @contextmanager
    def changed(self, changes: tuple[Change, ...]) -> Iterator[None]:
        """Change linears of the block within a `with` body."""
        sites = {s.name: s for g in self.prober.plan.groups[self.block.index] for s in g.sites}
        linears = {name: [span.linear for span in sites[name].spans] for name, _, _ in changes}
        names = {name for names in linears.values() for name in names}
        before = {name: self.block.weight(name).clone() for name in sorted(names)}
        biases = self.block.biases_of(names)
        shares = {name: Fraction(amount) for name, kind, amount in changes if kind == "share"}
        self._cut({name: round_half_up(s * sites[name].num_units) for name, s in shares.items()})
        for name, kind, amount in changes:
            if kind == "noise":
                for linear in linears[name]:
                    self._disturb(name, linear, float(amount))
        try:
            yield
        finally:
            for linear, weight_OI in before.items():
                self.block.replace(linear, weight_OI)
            for param, bias in biases.items():
                self.block.module.get_parameter(param).data.copy_(bias)

    def _cut(self, counts: Mapping[str, int]) -> None:
        """Cut the linears that a candidate names, all others stay."""
        prober, index = self.prober, self.block.index
        cutter = replace(prober.cutter, counts=counts, shrink=False)
        learnt, prior, outcome = prober.gradients(index), prober.prior(index), Outcome()
        for group in prober.plan.groups[index]:
            named = tuple(site for site in group.sites if site.name in counts)
            if named:
                part = replace(group, sites=named)
                cutter.cut(part, self.block, self.stats, prior, outcome, learnt)
        cutter.finish(self.block, outcome, {})

    def _disturb(self, name: str, linear: str, scale: float) -> None:
        """Add noise that follows from the seed and the linear's name."""
        seed = int(seed_of(self.prober.plan.recipe.seed, name))
        weight_OI = self.block.weight(linear)
        generator = torch.Generator().manual_seed(seed)
        noise_OI = torch.randn(weight_OI.shape, generator=generator).to(weight_OI)
        self.block.replace(linear, weight_OI + scale * noise_OI)


def _changes(candidate: Candidate, sites: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return what a candidate changes in one block; a share of 0 changes nothing."""
    shares = [(name, "share", str(share)) for name, share in candidate.shares.items() if share]
    noise = [(name, "noise", repr(scale)) for name, scale in candidate.noise.items() if scale]
    return tuple(sorted(change for change in shares + noise if change[0] in sites))


def _after(state: State, change: tuple[Change, ...]) -> State:
    """Return the state after a block: the dense one where nothing was changed so far."""
    return (*state, change) if change else state


def _digest(candidates: Sequence[Candidate], distances: Sequence[str] = ()) -> str:
    """Return a name for a round and what is measured in it."""
    data = [
        [sorted((k, str(v)) for k, v in c.shares.items()), sorted(c.noise.items())]
        for c in candidates
    ]
    asked = json.dumps([data, *distances] if distances else data)
    return hashlib.sha256(asked.encode()).hexdigest()[:32]
