"""Patterns that run through all blocks, `hidden` and `vocabulary`: what one choice leaves.

There is one site, in no block, and nothing to allocate. Of the residual stream the eligible weights
are those of the linears in blocks, as everywhere; of the vocabulary they are the rows of tokens.
Legend: D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.arch.anatomy import EXPERT
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError, UnsupportedModel
from llmprune.catalog import METHODS, Method
from llmprune.engine.budgets import check_share
from llmprune.engine.cost import Survey
from llmprune.engine.shapes import Anatomies, Skipped, count, num_params
from llmprune.hidden.proof import prove_narrowing
from llmprune.hidden.sizes import MULTIPLE, fitting_width, hidden_size
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import Pattern, Units
from llmprune.recipe.targets import amount_of
from llmprune.score import WHOLE_SCORES
from llmprune.score.whole import WholeScore

if TYPE_CHECKING:
    from llmprune.hidden.roles import Blueprint
    from llmprune.recipe.pruning import PruneStep

HIDDEN, VOCABULARY = "hidden", "vocabulary"
ROWS = 64  # kept tokens are a multiple of this many, as products on accelerators want it
TRUNK = -1
PARTS = ("solver", "refine", "repair", "reduce", "sparsities", "min_keep", "skip", "permute")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is left of units that run through all blocks: `kept` of those of its one site.

    `costs` are, block by block, the eligible weights that a unit has there; `num_params` are those
    of the result, of which a head parted from tied embeddings `added` some. `blueprint` says
    who reads and writes the residual stream.
    """

    score: WholeScore
    site: Site
    kept: int
    costs: tuple[int, ...]
    eligible: int
    skipped: tuple[Skipped, ...]
    num_params: int
    added: int = 0
    blueprint: Blueprint | None = None

    @property
    def is_vocabulary(self) -> bool:
        """Tell whether rows of tokens go, so that token counts do not compare."""
        return self.site.kind == VOCABULARY

    @property
    def removed(self) -> int:
        """Return the number of units that go."""
        return self.site.num_units - self.kept

    @property
    def survey(self) -> Survey | None:
        """Return what is read before anything is written, beside the one walk of the text."""
        return Survey(num_reads=1, num_linears=0, forward=False) if self.score.flows else None

    @property
    def statistics_bytes(self) -> int:
        """Return what a Gram matrix of the stream and its axes take up, in float64."""
        return 4 * 8 * self.site.num_units**2 if self.score.rotates else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a reader of the plan may not expect."""
        if self.is_vocabulary:
            return (
                "sparsity is the share of the vocabulary's rows here; perplexity is reported per "
                "byte, as tokens before and after are not the same",
            )
        if not self.added:
            return ()
        return (
            f"embeddings and head, which are tied, become two tensors: {self.added:,} parameters "
            "more than without the rotation",
        )


def compose_whole(step: PruneStep, pattern: Pattern, method: Method) -> Method:
    """Return the method of a step whose units run through all blocks.

    Raises:
        RecipeError: method and pattern do not go together, or something is asked for that one
            choice for the whole model has no place for.
    """
    kinds = pattern.kinds if isinstance(pattern, Units) else ()
    score = WHOLE_SCORES.get(method.score)
    if score is None or kinds != (score.kind,):
        able = [each.name for each in METHODS.values() if step.pattern in each.patterns]
        others = f", or choose among {', '.join(able[:8])}" if able else ""
        raise RecipeError(
            f"prune.pattern: method {method.name} has no rule for {step.pattern}; it is for "
            f"{', '.join(method.patterns)}. Type --pattern {method.pattern}{others}."
        )
    for name in PARTS:
        if (given := getattr(step, name)) not in (None, "none", "zero", False, (), {}):
            raise RecipeError(
                f"prune.{name}: {given!r} is for weights or units of single blocks, and "
                f"{step.pattern} is cut through all of them at once. Leave it out."
            )
    if step.allocation not in (None, "uniform"):
        raise RecipeError(
            f"prune.allocation: {step.allocation} gives blocks shares of their own, and all blocks "
            f"have one {step.pattern} size. Leave it out."
        )
    if step.form == "masked" or step.tier not in ("auto", "E0"):
        key, given = ("form", "masked") if step.form == "masked" else ("tier", step.tier)
        raise RecipeError(
            f"prune.{key}: {given} cannot hold this result: {step.pattern} is cut out of the "
            f"tensors, and the stock class loads what is left. Leave {key} out."
        )
    if wrong := {*(step.target or {})} - {"params", "size"}:
        raise RecipeError(
            f"prune.target: {min(wrong)} is not looked for with pattern {step.pattern}, whose one "
            "size is chosen before anything is read. Give a --sparsity, or --target params=0.8x."
        )
    if step.options:
        raise RecipeError(f"prune.options: {method.title} has none; leave it out.")
    return replace(method, solver="zero", refine=None, repair=None)


class Cut(NamedTuple):
    """How much goes: the whole model's choice, and the weights that were asked for."""

    whole: Whole
    asked: int


def plan_whole(
    step: PruneStep,
    method: Method,
    anatomies: Anatomies,
    config: Any,
    *,
    in_memory: bool,
    itemsize: int,
    trust_remote_code: bool = False,
) -> Cut:
    """Decide how many units go; nothing is read.

    Raises:
        RecipeError: no such size is left, or the result would be larger than the source.
        UnsupportedModel: the family's stream or vocabulary cannot be cut exactly; says why.
    """
    if in_memory:
        raise RecipeError(
            f"prune.pattern: {step.pattern} changes embeddings and config, which a model in memory "
            "would not survive halfway. Save it with model.save_pretrained(DIR) and prune DIR."
        )
    score = WHOLE_SCORES[method.score]
    if score.kind == VOCABULARY:
        return _plan_vocabulary(step, score, anatomies, config, itemsize)
    blueprint = prove_narrowing(config, trust_remote_code=trust_remote_code)
    return _plan_hidden(step, score, anatomies, config, blueprint, itemsize)


def _plan_hidden(
    step: PruneStep,
    score: WholeScore,
    anatomies: Anatomies,
    config: Any,
    blueprint: Blueprint,
    itemsize: int,
) -> Cut:
    width = hidden_size(config)
    axes = [blueprint.block(shapes, width).axes for shapes in anatomies.shapes]
    costs = tuple(
        sum(count(row.shape) for row in anatomy.linears.values() if row.param in own) // width
        for anatomy, own in zip(anatomies.blocks, axes, strict=True)
    )
    pairs = list(zip(anatomies.shapes, axes, strict=True))
    sizes = [count(shapes[name]) for shapes, own in pairs for name in own]
    trunk = [name for name in blueprint.trunk(width).axes if name in anatomies.trunk]
    per_unit = (sum(sizes) + sum(count(anatomies.trunk[name]) for name in trunk)) // width
    parted = score.rotates and blueprint.head not in anatomies.trunk
    num_rows = anatomies.trunk[blueprint.embedding][0] if parted else 0
    eligible = sum(count(row.shape) for a in anatomies.blocks for row in a.linears.values())
    before = num_params(anatomies)
    whole = before + num_rows * width
    units, asked = _asked(step, eligible, sum(costs), whole, per_unit + num_rows, itemsize)
    _check_left(step, units, width)
    kept = fitting_width(config, units / width, multiple=step.multiple or MULTIPLE)
    after = whole - (width - kept) * (per_unit + num_rows)
    if parted and after >= before:
        raise RecipeError(
            f"prune.method: {step.method} parts embeddings and head, which this model ties, and "
            f"with hidden size {kept} the result would have {after:,} parameters, where the source "
            f"has {before:,}. Type --method hidden-channels, which keeps them tied, or remove more."
        )
    found = Whole(
        score=score,
        site=_site(HIDDEN, width, sum(costs)),
        kept=kept,
        costs=costs,
        eligible=eligible,
        skipped=_skipped(pairs),
        num_params=after,
        added=num_rows * kept,
        blueprint=blueprint,
    )
    return Cut(found, asked)


def _plan_vocabulary(
    step: PruneStep, score: WholeScore, anatomies: Anatomies, config: Any, itemsize: int
) -> Cut:
    num_rows = int(config.get_text_config(decoder=True).vocab_size)
    owned = {name: shape for name, shape in anatomies.trunk.items() if num_rows in shape}
    if not owned:
        raise UnsupportedModel(
            f"no tensor of this {anatomies.model_type} model outside its blocks has {num_rows} "
            "rows, so there is no vocabulary to cut. Leave it as it is."
        )
    per_row = sum(map(count, owned.values())) // num_rows
    before = num_params(anatomies)
    units, asked = _asked(step, num_rows * per_row, per_row, before, per_row, itemsize)
    multiple = step.multiple or ROWS
    kept = (num_rows - units) // multiple * multiple if units else num_rows
    _check_left(step, num_rows - kept, num_rows)
    blocks = sum(count(shape) for shapes in anatomies.shapes for shape in shapes.values())
    others = [
        Skipped(what=name, num_params=count(shape), reason="no row per token")
        for name, shape in anatomies.trunk.items()
        if name not in owned
    ]
    found = Whole(
        score=score,
        site=_site(VOCABULARY, num_rows, per_row),
        kept=kept,
        costs=(),
        eligible=num_rows * per_row,
        skipped=(
            Skipped(what="all blocks", num_params=blocks, reason="not in this pattern"),
            *others,
        ),
        num_params=before - (num_rows - kept) * per_row,
    )
    return Cut(found, asked)


def _site(kind: str, num_units: int, cost: int) -> Site:
    return Site(name=kind, block=TRUNK, spans=(), num_units=num_units, unit_cost=cost, kind=kind)


def _asked(
    step: PruneStep, eligible: int, cost: int, whole: int, per_unit: int, itemsize: int
) -> tuple[int, int]:
    """Return how many units must go at least, and the eligible weights that are asked for.

    `whole` parameters are there with all units, `per_unit` of them in each.
    """
    if not step.target:
        asked = math.ceil(exact_sparsity(step.sparsity) * eligible)
        return -(-asked // cost), asked
    ((key, text),) = step.target.items()
    kind, amount = amount_of(key, text)
    size = itemsize if key == "size" else 1
    most = amount * whole if kind == "times" else amount / size
    units = max(0, math.ceil((whole - most) / per_unit))
    check_share(step, units * cost / eligible)
    return units, units * cost


def _check_left(step: PruneStep, units: int, num_units: int) -> None:
    """Check that something stays.

    Raises:
        RecipeError: nothing does.
    """
    if units >= num_units:
        wish = next(iter((step.target or {}).items()), ("sparsity", f"{step.sparsity:g}"))
        raise RecipeError(
            f"prune.{'target' if step.target else 'sparsity'}: {'='.join(wish)} leaves none of "
            f"{num_units:,} units of {step.pattern}. Ask for less to go, or for a smaller "
            "--set prune.multiple."
        )


def _skipped(
    pairs: Sequence[tuple[Mapping[str, tuple[int, ...]], Mapping[str, int]]],
) -> tuple[Skipped, ...]:
    """Return the parameters of blocks that have no axis of the residual stream."""
    sizes: dict[str, int] = {}
    for shapes, own in pairs:
        for name in shapes.keys() - own.keys():
            known = EXPERT.sub("experts.*", name)
            sizes[known] = sizes.get(known, 0) + count(shapes[name])
    return tuple(
        Skipped(what=name, num_params=size, reason="has no channel of the residual stream")
        for name, size in sorted(sizes.items())
    )
