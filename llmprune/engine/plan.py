"""What a run will do, decided from config, index and shapes before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmprune.allocation import ALLOCATIONS
from llmprune.arch.types import Site
from llmprune.catalog import Method
from llmprune.engine.amounts import (
    allocate,
    num_pruned,
)
from llmprune.engine.budgets import Budget
from llmprune.engine.collected import Collected
from llmprune.engine.cost import Estimate
from llmprune.engine.parts import (
    Needs,
    options_for,
    stand_in,
)
from llmprune.engine.shapes import (
    Skipped,
)
from llmprune.engine.shipment import Shipment, gone_of, is_gone
from llmprune.engine.sites import (
    Group,
    all_sites,
)
from llmprune.engine.solving import Cutter
from llmprune.engine.whole import Whole
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import (
    GroupName,
    Pattern,
    Units,
)
from llmprune.score import SCORES, score_row
from llmprune.solver.types import Settings
from llmprune.stats import STATISTICS

if TYPE_CHECKING:
    import torch

    from llmprune.allocation.types import Probe, Remeasure
    from llmprune.recipe import Recipe
    from llmprune.recipe.pruning import PruneStep


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A run that is fully decided; its repr is the table of --dry-run.

    `facts` are numbers that its allocation says of itself. `counts` is None where they follow from
    a survey, which `with_profiles` completes the plan by; `verdict` is what the survey's judgement
    of the allocation was, `target` how the sparsity was found, and `whole` what is left of units
    that run through all blocks. `budget` says what is to go at least, and `cache` what a token
    leaves in every block's key/value cache, where that is known. `given` are statistics of the
    dense model that were collected before.
    """

    recipe: Recipe
    source_name: str
    out: str | None
    method: Method
    pattern: Pattern
    group: GroupName
    allocation: str
    form: str
    groups: tuple[tuple[Group, ...], ...]
    prefixes: tuple[str, ...]
    counts: Mapping[str, int] | None
    eligible: int
    num_params: int
    skipped: tuple[Skipped, ...]
    parts: Needs
    device: torch.device
    dtype: torch.dtype
    stored: torch.dtype
    budget: Budget
    stored_bytes: int
    cache: tuple[int, ...] | None
    seq_len: int
    num_samples: int
    eval_windows: int
    estimate: Estimate
    notes: tuple[str, ...] = field(default=())
    verdict: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    shipment: Shipment | None = None
    whole: Whole | None = None
    given: Collected | None = None

    @property
    def prune(self) -> PruneStep:
        return self.recipe.prune

    @property
    def asked(self) -> int:
        """Return the weights that are asked for, as far as it can be told beforehand."""
        return self.budget.weights

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def forward(self) -> bool:
        """Tell whether text is read: not for methods that look at weights alone."""
        return self.parts.tokens

    @property
    def surveys(self) -> bool:
        """Tell whether the model is looked at before the first cut."""
        learns = self.parts.backward or self.parts.gates
        return bool(self.counts is None or learns or self.searches)

    @property
    def searches(self) -> bool:
        """Tell whether a sparsity is looked for that keeps perplexity within a target."""
        return "ppl" in (self.prune.target or {})

    @property
    def draws(self) -> bool:
        """Tell whether masks follow from the seed, also where no text is drawn with it."""
        score = SCORES.get(self.method.score)
        return score is not None and "seed" in score.needs

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(all_sites(self.groups)) if self.whole is None else (self.whole.site,)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Return what of the config differs from the source's: numbers, and the model's type."""
        if self.shipment is None or self.form == "masked":
            return {}
        before, after = self.shipment.before, self.shipment.config
        told = {k: v for k, v in after.items() if isinstance(v, int) or k == "model_type"}
        return {key: value for key, value in told.items() if before.get(key) != value}

    @property
    def asked_share(self) -> float:
        """Return the share of the eligible weights that is asked for."""
        return self.asked / self.eligible

    @property
    def removed(self) -> int:
        """Return the number of weights that will be removed."""
        sites = self.sites
        if self.counts is None:
            units = isinstance(self.pattern, Units)
            return self.asked if units else num_pruned(self.prune, sites) * sites[0].unit_cost
        return sum(site.freed(self.counts[site.name]) for site in sites)

    @property
    def sparsity(self) -> float:
        """Return the share of the eligible weights that will be removed."""
        return self.removed / self.eligible

    def needs(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return the statistics that each tap of a block must give."""
        cut, around = self.parts.cut, self.parts.around
        found: dict[str, tuple[str, ...]] = {}
        for group in self.groups[index] if cut else ():
            if self._idle(index, group):
                continue
            for tap in group.around if around else ():
                found.setdefault(tap, around)
            if group.tap:
                found[group.tap] = cut
        return found

    def _idle(self, index: int, group: Group) -> bool:
        """Tell whether whole units could go of a group, but none do, or more than these."""
        if group.coupling is None or self.counts is None:
            return False
        (site,) = group.sites
        gone = gone_of(self.groups[index], self.counts)
        return not self.counts[site.name] or is_gone(site, gone)

    def options_of(self, defaults: Mapping[str, float]) -> dict[str, float]:
        """Return the numbers of one part of the run."""
        return options_for(self.prune.options, defaults)

    @property
    def probe_needs(self) -> tuple[str, ...]:
        """Return the statistics of taps that candidates are masked by, where any are probed."""
        if not (self.parts.probes or "remeasure" in ALLOCATIONS[self.allocation].needs):
            return ()
        name = stand_in(self.method.score)
        needs = score_row(name).learnt
        return tuple(name for name in needs if STATISTICS[name].observe == "tap")

    def with_profiles(
        self,
        profiles: Mapping[str, torch.Tensor],
        probe: Probe | None = None,
        remeasure: Remeasure | None = None,
    ) -> Plan:
        """Return the plan with the counts that follow from a survey."""
        return self._allocated(self.allocation, profiles, probe, remeasure)

    def with_allocation(self, name: str) -> Plan:
        """Return the plan with the counts of an allocation that needs no survey."""
        return self._allocated(name, {}, None)

    def recounted(self) -> Plan:
        """Return the plan with the counts of its recipe as it is now; None awaits a survey."""
        asked = math.ceil(exact_sparsity(self.prune.sparsity) * self.eligible)
        return self.with_budget(Budget(asked=asked, weights=asked))

    def with_budget(self, budget: Budget) -> Plan:
        """Return the plan with another budget, and its counts; None where they await a survey."""
        wish = (self.prune, self.allocation, self.pattern, self.sites, self.eligible)
        return replace(self, counts=allocate(*wish, budget=budget), budget=budget)

    def _allocated(
        self,
        name: str,
        profiles: Mapping[str, torch.Tensor],
        probe: Probe | None,
        remeasure: Remeasure | None = None,
    ) -> Plan:
        facts: dict[str, float] = {}
        counts = allocate(
            self.prune,
            name,
            self.pattern,
            self.sites,
            self.eligible,
            profiles=profiles,
            probe=probe,
            seed=self.recipe.seed,
            surveyed=True,
            budget=self.budget,
            remeasure=remeasure,
            facts=facts,
        )
        return replace(self, counts=counts, facts=facts)

    def masker(self) -> Cutter:
        """Return what candidates are cut by: masks alone, without updates, on dense statistics."""
        score = stand_in(self.method.score)
        method = replace(self.method, score=score, solver="zero", refine=None, repair=None)
        group = self.group if score == self.method.score else "row"
        options = self.options_of(score_row(score).options)
        return replace(self.cutter(), method=method, group=group, options=options, permute=False)

    def cutter(self) -> Cutter:
        """Return what decides each group."""
        return Cutter(
            method=self.method,
            pattern=self.pattern,
            group=self.group,
            shrink=self.form == "shrunk",
            counts=self.counts or {},
            stored=self.stored,
            seed=self.recipe.seed,
            settings=Settings(damping=self.prune.damping, damp=self.prune.damp),
            options=self.options_of(score_row(self.method.score).options),
            permute=self.prune.permute,
            widths=self.shipment.widths if self.shipment else {},
        )

    def __repr__(self) -> str:
        from llmprune.engine.plan_table import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from llmprune.engine.plan_table import plan_html

        return plan_html(self)
