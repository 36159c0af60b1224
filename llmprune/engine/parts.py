"""Which parts a run is made of: the method's row with what the recipe changes, and their needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.fitting import in_range
from llmprune.arch.couplings import DEPTHS, EXPERTS
from llmprune.base.errors import RecipeError
from llmprune.catalog import METHODS, Method
from llmprune.engine.ranks import compose_ranks
from llmprune.engine.whole import compose_whole
from llmprune.mask.pattern import LowRank, NofM, Pattern, Tiles, Units
from llmprune.recipe.targets import LATENCY
from llmprune.repair import REPAIRS
from llmprune.score import RANK_SCORES, SCORES, UNIT_SCORES, WHOLE_SCORES, score_row
from llmprune.score.members import UnitScore
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS
from llmprune.stats import STATISTICS

if TYPE_CHECKING:
    from llmprune.recipe.pruning import PruneStep

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What the parts of a run must know, by where it is learnt.

    `cut` are statistics of taps while a block is cut (`around` those of all linears of a unit, not
    only of the one that reads it), `regional` gradients of the block's own output then;
    `survey` statistics of taps before the first cut, `backward` gradients of the loss before it.
    `routing` are those of what experts are given and answer, `gates` says that gates of units are
    learnt before the first cut, and in how many steps, `inputs` that a block's inputs are needed
    though no statistic is, `dense` that the dense model is walked alongside, and `probes` that
    candidates are walked and compared with it. `whole` is learnt of the text for one choice in the
    whole model, by a walk of its own where it `flows`, else without the model. With `given` the
    statistics of taps were collected before, and no text is read.
    """

    cut: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    regional: tuple[str, ...] = ()
    survey: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    routing: tuple[str, ...] = ()
    gates: int = 0
    inputs: bool = False
    dense: bool = False
    probes: bool = False
    whole: tuple[str, ...] = ()
    flows: bool = True
    given: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return all statistics that are learnt."""
        before = (*self.survey, *self.backward, *(("gate",) if self.gates else ()))
        cut = (*self.cut, *self.regional, *self.routing)
        return tuple(dict.fromkeys((*before, *cut, *self.whole)))

    @property
    def cut_tokens(self) -> bool:
        """Tell whether tokens flow while blocks are cut."""
        learnt = self.regional or self.inputs or self.routing
        return bool(learnt or (self.cut and not self.given))

    @property
    def cut_walks(self) -> bool:
        """Tell whether the cut is, or goes with, a walk of tokens; else it passes the weights."""
        return self.cut_tokens or bool(self.whole and self.flows)

    @property
    def sums(self) -> bool:
        """Tell whether all that is learnt while blocks are cut are sums over micro-batches, which
        several processes can share. Repairs, regional gradients and routing are not."""
        return not (self.regional or self.inputs or self.routing)

    @property
    def tokens(self) -> bool:
        """Tell whether text is read at all: not for methods that look at weights alone."""
        learnt = self.cut_tokens or self.survey or self.backward or self.probes
        return bool(learnt or self.whole or self.gates)

    @property
    def walks(self) -> bool:
        """Tell whether tokens flow through the model."""
        return self.tokens and self.flows


def compose(step: PruneStep, pattern: Pattern) -> Method:
    """Return the method of a step, with the solver, refinement and repair that it asks for.

    Raises:
        UnknownName: no part has this name.
        RecipeError: the parts do not go together; says why.
    """
    method = METHODS[step.method]
    if method.score in WHOLE_SCORES or (isinstance(pattern, Units) and pattern.whole):
        return compose_whole(step, pattern, method)
    if method.score in RANK_SCORES or isinstance(pattern, LowRank):
        return compose_ranks(step, pattern, method)
    solver = "zero" if step.solver == NONE else step.solver or method.solver
    if isinstance(pattern, Units):
        return _compose_units(step, pattern, method, solver)
    if method.score in UNIT_SCORES or solver in COMPENSATIONS.keys() - SOLVERS.keys():
        raise RecipeError(
            f"prune.pattern: {method.name} with solver {solver} judges whole units, and pattern is "
            f"{step.pattern}. Type --pattern {method.pattern}, or choose another method."
        )
    refine = None if step.refine == NONE else step.refine or method.refine
    repair = None if step.repair == NONE else step.repair or method.repair
    updates = SOLVERS[solver].updates
    if refine is not None:
        REFINEMENTS[refine]
    if repair is not None:
        REPAIRS[repair]
    if SCORES[method.score].adaptive and not updates:
        raise RecipeError(
            f"prune.solver: the score of {method.name} judges weights while others are updated, "
            f"which solver {solver} does not do. Use solver columnwise or least-squares, or "
            "--method wanda."
        )
    if refine is not None and isinstance(pattern, Tiles):
        raise RecipeError(
            f"prune.refine: {refine} exchanges single weights, which {step.pattern} tiles do not "
            "have. Type --set prune.refine=none, or choose pattern unstructured or N:M."
        )
    if repair is not None and REPAIRS[repair].swaps and isinstance(pattern, Tiles):
        raise RecipeError(
            f"prune.repair: {repair} exchanges single weights, which {step.pattern} tiles do not "
            "have. Type --set prune.repair=halves, or choose pattern unstructured or N:M."
        )
    if step.permute and not isinstance(pattern, NofM):
        raise RecipeError(
            f"prune.permute: channels are put in order for N:M patterns, and pattern is "
            f"{step.pattern}. Type --pattern 2:4, or leave permute out."
        )
    if repair is not None and step.propagate == "dense":
        raise RecipeError(
            f"prune.propagate: repair {repair} learns from what reaches a block in the pruned "
            "model, so it needs `propagate: pruned`."
        )
    composed = replace(method, solver=solver, refine=refine, repair=repair)
    _check_options(step, composed)
    return composed


def _compose_units(step: PruneStep, pattern: Units, method: Method, solver: str) -> Method:
    """Return the method of a step that removes whole units.

    Raises:
        UnknownName: no compensation has this name.
        RecipeError: the parts are for single weights.
    """
    if solver in SOLVERS.keys() - COMPENSATIONS.keys() - {"zero"}:
        raise RecipeError(
            f"prune.pattern: {step.pattern} removes whole units, and solver {solver} is for "
            "weights that stay in their place. Type --set prune.solver=least-squares, or choose "
            "pattern unstructured or N:M."
        )
    if solver != "zero":
        COMPENSATIONS[solver]
    others = {"refine": step.refine or method.refine, "repair": step.repair or method.repair}
    for key, name in others.items():
        if name not in (None, NONE):
            raise RecipeError(
                f"prune.{key}: {name} is for single weights, and {step.pattern} removes whole "
                f"units. Type --set prune.{key}=none, or choose pattern unstructured or N:M."
            )
    if step.permute:
        raise RecipeError(
            f"prune.permute: channels are put in order for N:M patterns, and pattern is "
            f"{step.pattern}. Type --pattern 2:4, or leave permute out."
        )
    if method.score in SCORES and SCORES[method.score].adaptive:
        raise RecipeError(
            f"prune.method: {method.name} judges weights while others are updated, which has no "
            f"meaning for whole units. Type --method flap, or another method for {step.pattern}."
        )
    if "ppl" in (step.target or {}) and EXPERTS in pattern.kinds:
        raise RecipeError(
            "prune.target: candidates for a perplexity are masked, and no weight that is zero "
            "keeps a router from choosing an expert. Give a --sparsity instead of the target, or "
            "choose --pattern expert-channels."
        )
    if "ppl" in (step.target or {}) and step.form != "masked":
        raise RecipeError(
            f"prune.target: {step.pattern} are cut out of the tensors, whose sizes must be known "
            "before a sparsity is looked for. Type --set prune.form=masked, or give a --sparsity "
            "instead of the target."
        )
    deep = all(kind in DEPTHS for kind in pattern.kinds)
    reduce = step.reduce or method.reduce
    if step.reduce and method.score in UNIT_SCORES:
        raise RecipeError(
            f"prune.reduce: {method.name} scores units, not weights, so there is nothing to put "
            "together. Leave it out, or use --method spa."
        )
    composed = replace(
        method, solver="zero" if deep else solver, refine=None, repair=None, reduce=reduce
    )
    _check_options(step, composed)
    return composed


def needs_of(
    method: Method,
    allocation: str,
    *,
    searches: bool = False,
    pattern: Pattern | None = None,
    options: Mapping[str, float] | None = None,
) -> Needs:
    """Return what the parts of a run must know; `searches` says that a sparsity is looked for.

    `options` are the numbers that a recipe gives for parts.
    """
    if method.score in WHOLE_SCORES:
        whole = WHOLE_SCORES[method.score]
        return Needs(whole=whole.needs, flows=whole.flows)
    if method.score in RANK_SCORES:
        return Needs(cut=RANK_SCORES[method.score].needs)
    if isinstance(pattern, Units):
        return _needs_of_units(method, allocation, pattern, options or {}, searches=searches)
    score, solver = SCORES[method.score], SOLVERS[method.solver]
    learnt = (*score.learnt, *solver.needs)
    if method.refine is not None:
        learnt += REFINEMENTS[method.refine].needs
    if solver.updates:
        learnt += ("gram",)  # what an update is judged by
    row = ALLOCATIONS[allocation]
    backward = [name for name in learnt if STATISTICS[name].observe == "backward"]
    return Needs(
        cut=_at("tap", learnt),
        regional=_at("block_gradient", learnt),
        survey=row.profile.needs if row.profile else (),
        backward=tuple(dict.fromkeys(backward)),
        inputs=method.repair is not None,
        dense=method.repair is not None and REPAIRS[method.repair].dense,
        probes=searches or row.judged or "probe" in row.needs,
    )


def _needs_of_units(
    method: Method,
    allocation: str,
    pattern: Units,
    options: Mapping[str, float],
    *,
    searches: bool,
) -> Needs:
    """Return what the parts of a run that removes whole units must know."""
    score = score_row(method.score)
    row = ALLOCATIONS[allocation]
    deep = all(kind in DEPTHS for kind in pattern.kinds)
    judged = () if deep else score.learnt
    everywhere = method.reduce != "reader" or getattr(score, "everywhere", False)
    solver = COMPENSATIONS[method.solver].needs if method.solver != "zero" else ()
    profiled = row.profile.needs if row.profile else ()
    surveyed = row.profile is not None or "probe" in row.needs
    trained = not deep and isinstance(score, UnitScore) and score.trained
    return Needs(
        cut=_at("tap", (*judged, *solver)),
        around=_at("tap", judged) if everywhere else (),
        regional=_at("block_gradient", judged),
        survey=tuple(dict.fromkeys((*profiled, *score.learnt))) if surveyed else (),
        backward=_at("backward", judged),
        routing=_at("routing", judged),
        gates=int(options_for(options, score.options)["steps"]) if trained else 0,
        probes=searches or row.judged or "probe" in row.needs,
    )


def options_for(given: Mapping[str, float], defaults: Mapping[str, float]) -> dict[str, float]:
    """Return a part's numbers: those of the recipe, else its defaults."""
    return {name: given.get(name, default) for name, default in defaults.items()}


def allocation_of(step: PruneStep, method: Method) -> str:
    """Return the name of the allocation: asked for, implied by named shares, or the method's."""
    return step.allocation or ("manual" if step.sparsities else method.allocation)


def sequences_at_most(method: Method, parts: Needs, given: Mapping[str, float]) -> int | None:
    """Return the most sequences of a micro-batch: those of one step, where blocks are trained."""
    if parts.regional:
        return 1
    defaults = REPAIRS[method.repair].options if method.repair else {}
    steps = options_for(given, defaults).get("sequences")
    return None if steps is None else max(1, int(steps))


def repair_passes(method: Method, given: Mapping[str, float]) -> float:
    """Return what the repair of a block costs, in forwards of the calibration tokens."""
    if method.repair is None:
        return 0.0
    repair = REPAIRS[method.repair]
    return repair.passes(options_for(given, repair.options))


def stand_in(score: str) -> str:
    """Return the score that masks candidates: it needs neither a solver nor a block's graph."""
    if score in UNIT_SCORES:
        return score
    row = SCORES[score]
    return "wanda" if row.adaptive or _at("block_gradient", row.learnt) else score


def _at(place: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if STATISTICS[name].observe == place))


def _check_options(step: PruneStep, method: Method) -> None:
    """Raise where a recipe gives a number that no part of the run takes, or no steps to train."""
    score = score_row(method.score)
    known = dict(score.options)
    if isinstance(score, UnitScore) and score.trained:
        steps = options_for(step.options, score.options)["steps"]
        in_range("steps", steps, least=1)
    known |= ALLOCATIONS[allocation_of(step, method)].options
    known |= REPAIRS[method.repair].options if method.repair else {}
    known |= LATENCY if "latency" in (step.target or {}) else {}
    for name in step.options:
        if name not in known:
            some = ", ".join(f"{key} ({value:g})" for key, value in known.items())
            raise RecipeError(
                f"prune.options: no part of this run takes {name!r}. "
                + (f"There are: {some}." if some else f"{method.title} has none; leave it out.")
            )
