"""What a run will do, decided from config, index and shapes before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.projector import default_multiple, project
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.catalog import METHODS, Method
from llmprune.engine.cost import Estimate, Shape, estimate, measure_rate
from llmprune.engine.sites import Group, all_sites, groups_of, is_skipped
from llmprune.engine.solving import Cutter
from llmprune.mask.counts import exact_sparsity
from llmprune.mask.pattern import Channels, NofM, Pattern, parse_pattern
from llmprune.score import SCORES
from llmprune.solver import SOLVERS

if TYPE_CHECKING:
    import torch

    from llmprune.arch.anatomy import Anatomy
    from llmprune.recipe import Recipe
    from llmprune.recipe.models import PruneStep

MAX_SEQ_LEN = 2048
EVAL_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Parameters that stay as they are, and why."""

    what: str
    num_params: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Anatomies:
    """A model by shape: every block's anatomy and prefix, and the parameters outside."""

    model_type: str
    prefixes: tuple[str, ...]
    blocks: tuple[Anatomy, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    trunk: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A run that is fully decided; its repr is the table of --dry-run."""

    recipe: Recipe
    source_name: str
    out: str | None
    method: Method
    pattern: Pattern
    group: Literal["row", "matrix"]
    form: str
    tier: str
    groups: tuple[tuple[Group, ...], ...]
    prefixes: tuple[str, ...]
    counts: Mapping[str, int]
    eligible: int
    num_params: int
    skipped: tuple[Skipped, ...]
    cut_needs: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    num_samples: int
    eval_windows: int
    config_changes: Mapping[str, int]
    estimate: Estimate
    notes: tuple[str, ...] = field(default=())

    @property
    def prune(self) -> PruneStep:
        return self.recipe.prune

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def forward(self) -> bool:
        """Tell whether tokens flow: not for methods that look at weights alone."""
        return bool(self.cut_needs)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(all_sites(self.groups))

    @property
    def removed(self) -> int:
        """Return the number of weights that will be removed."""
        return sum(self.counts[site.name] * site.unit_cost for site in self.sites)

    @property
    def sparsity(self) -> float:
        """Return the share of the eligible weights that will be removed."""
        return self.removed / self.eligible

    def needs(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return the statistics that each tap of a block must give."""
        return {group.tap: self.cut_needs for group in self.groups[index]} if self.forward else {}

    def cutter(self) -> Cutter:
        """Return what decides each group."""
        return Cutter(
            method=self.method,
            pattern=self.pattern,
            group=self.group,
            shrink=self.form == "shrunk",
            counts=self.counts,
        )

    def __repr__(self) -> str:
        from llmprune.engine.plan_table import plan_text

        return plan_text(self)


def make_plan(
    recipe: Recipe,
    anatomies: Anatomies,
    *,
    source_name: str,
    out: str | None,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    stored_bytes: int,
    storage_itemsize: int,
    converted_params: int = 0,
    may_evaluate: bool = True,
) -> Plan:
    """Decide a run.

    Raises:
        RecipeError: the wish does not fit the model.
        TooLarge: it does not fit the memory.
    """
    import torch

    step = recipe.prune
    method = METHODS[step.method]
    pattern = parse_pattern(step.pattern)
    form = decide_form(step, pattern)
    cut_needs = tuple(dict.fromkeys(SCORES[method.score].needs + SOLVERS[method.solver].needs))
    groups = tuple(
        groups_of(pattern, anatomy, block=index, prefix=prefix, skip=step.skip)
        for index, (anatomy, prefix) in enumerate(
            zip(anatomies.blocks, anatomies.prefixes, strict=True)
        )
    )
    sites = all_sites(groups)
    check_globs(step.skip, anatomies)
    skipped, eligible = _skipped(anatomies, step, sites)
    if not sites:
        raise RecipeError(f"prune.skip: {list(step.skip)} leaves nothing to prune; skip less.")
    counts = allocate(step, method, pattern, sites, eligible)
    num_samples = recipe.calibration.num_samples
    seq_len = sequence_length(recipe, config)
    forward = bool(cut_needs)
    removed = sum(counts[site.name] * site.unit_cost for site in sites)
    shape = _shape(anatomies, config, stored_bytes, storage_itemsize)
    itemsize = torch.empty((), dtype=dtype).element_size() if forward else storage_itemsize
    wants = recipe.evaluate if may_evaluate else None
    windows = wants.num_windows if wants else 0
    cost = estimate(
        shape,
        recipe=recipe,
        device=device,
        itemsize=itemsize,
        num_samples=num_samples,
        seq_len=seq_len,
        eval_tokens=windows * seq_len,
        forward=forward,
        removed_bytes=removed * storage_itemsize if form == "shrunk" else 0,
        converted_params=converted_params,
        rate=measure_rate(device, dtype),
    )
    return Plan(
        recipe=recipe,
        source_name=source_name,
        out=out,
        method=method,
        pattern=pattern,
        group=step.group or method.group,
        form=form,
        tier="E0",
        groups=groups,
        prefixes=anatomies.prefixes,
        counts=counts,
        eligible=eligible,
        num_params=_num_params(anatomies),
        skipped=skipped,
        cut_needs=cut_needs,
        device=device,
        dtype=dtype,
        seq_len=seq_len,
        num_samples=num_samples,
        eval_windows=_windows(wants.perplexity if wants else False, windows, cost),
        config_changes=_config_changes(groups, counts) if form == "shrunk" else {},
        estimate=cost,
    )


def check_globs(skip: Sequence[str], anatomies: Anatomies) -> None:
    """Check that every glob names a linear.

    Raises:
        RecipeError: one names none; says which linears there are.
    """
    pairs = list(zip(anatomies.prefixes, anatomies.blocks, strict=True))
    for glob in skip:
        if not any(is_skipped(name, p, [glob]) for p, block in pairs for name in block.linears):
            known = ", ".join(sorted(anatomies.blocks[0].linears)[:8])
            raise RecipeError(
                f"prune.skip: {glob!r} names no linear. The first block has {known}; type '*' for "
                "any characters, as in '*down_proj'."
            )


def decide_form(step: PruneStep, pattern: Pattern) -> str:
    """Return how the result is stored: shrunk for whole units unless asked otherwise.

    Raises:
        RecipeError: single weights cannot be cut out of a dense matrix.
    """
    if isinstance(pattern, Channels):
        return "shrunk" if step.form == "auto" else step.form
    if step.form == "shrunk":
        raise RecipeError(
            f"prune.form: pattern {step.pattern!r} removes single weights, which a dense matrix "
            "cannot leave out. Use form masked, or pattern ffn-channels for smaller tensors."
        )
    return "masked"


def allocate(
    step: PruneStep, method: Method, pattern: Pattern, sites: Sequence[Site], eligible: int
) -> dict[str, int]:
    """Return how many units each site loses.

    Raises:
        RecipeError: the asked share cannot be reached.
    """
    target = exact_sparsity(step.sparsity)
    if isinstance(pattern, NofM):
        target = pattern.sparsity or target
        return {site.name: int(site.num_units * target) for site in sites}
    units = {site.name: site.num_units for site in sites}
    costs = {site.name: site.unit_cost for site in sites}
    spread = ALLOCATIONS[method.allocation].fn
    if not isinstance(pattern, Channels):
        return project(spread(dict.fromkeys(units), target, None), units, costs, budget=target)
    share = Fraction(target * eligible, sum(site.num_weights for site in sites))
    if share >= 1:
        most = sum(site.num_weights for site in sites) / eligible
        raise RecipeError(
            f"prune.sparsity: {step.sparsity:g} of the eligible weights is more than "
            f"{step.pattern} holds ({most:.3f} of them). Ask for less, or leave the others out of "
            "the count with --set 'prune.skip=[\"*self_attn*\"]'."
        )
    return project(
        spread(dict.fromkeys(units), share, None),
        units,
        costs,
        budget=share,
        ties=[list(units)],
        multiple=step.multiple or default_multiple(min(units.values())),
    )


def max_seq_len(config: Any) -> int | None:
    """Return the longest sequence that a model takes, where its config says so."""
    text = config.get_text_config()
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found or getattr(text, "n_positions", None)


def sequence_length(recipe: Recipe, config: Any) -> int:
    """Return the tokens per sequence: asked, or 2048 and no more than the model takes.

    Raises:
        RecipeError: longer than the model's maximum.
    """
    most = max_seq_len(config)
    asked = recipe.calibration.seq_len
    if asked is None:
        return min(MAX_SEQ_LEN, most or MAX_SEQ_LEN)
    if most and asked > most:
        raise RecipeError(
            f"calibration.seq_len: {asked} is longer than the {most} tokens that this model takes. "
            f"Type --seq-len {most} or less."
        )
    return asked


def _skipped(
    anatomies: Anatomies, step: PruneStep, sites: Sequence[Site]
) -> tuple[tuple[Skipped, ...], int]:
    """Return what is not pruned, and the number of eligible weights."""
    pruned = {(site.block, span.linear) for site in sites for span in site.spans}
    eligible = others = globbed = 0
    for index, anatomy in enumerate(anatomies.blocks):
        in_linears: dict[str, int] = {}
        for name, linear in anatomy.linears.items():
            size = linear.shape[0] * linear.shape[1]
            in_linears[linear.param] = in_linears.get(linear.param, 0) + size
            if is_skipped(name, anatomies.prefixes[index], step.skip):
                globbed += size
            else:
                eligible += size
        for param, shape in anatomies.shapes[index].items():
            others += 0 if param in in_linears else _count(shape)
    covered = sum(site.num_weights for site in sites)
    if not pruned:
        covered = 0
    rows = [Skipped(what=name, num_params=_count(shape), reason="outside the blocks")
            for name, shape in anatomies.trunk.items()]  # fmt: skip
    rows.append(Skipped(what="norms, biases, routers", num_params=others, reason="not a linear"))
    if globbed:
        rows.append(Skipped(what=", ".join(step.skip), num_params=globbed, reason="prune.skip"))
    if eligible > covered:
        rows.append(
            Skipped(
                what="other linears", num_params=eligible - covered, reason="not in this pattern"
            )
        )
    return tuple(rows), eligible


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _num_params(anatomies: Anatomies) -> int:
    """Return the number of parameters of the model."""
    blocks = sum(_count(shape) for shapes in anatomies.shapes for shape in shapes.values())
    return blocks + sum(_count(shape) for shape in anatomies.trunk.values())


def _shape(anatomies: Anatomies, config: Any, stored_bytes: int, storage_itemsize: int) -> Shape:
    """Return the sizes that decide cost, from the largest block."""
    sizes = [sum(_count(shape) for shape in shapes.values()) for shapes in anatomies.shapes]
    linears = [
        linear.shape[0] * linear.shape[1]
        for anatomy in anatomies.blocks[:1]
        for linear in anatomy.linears.values()
    ]
    first = anatomies.blocks[0].linears
    embeddings = [_count(shape) for shape in anatomies.trunk.values()]
    reader = first[anatomies.blocks[0].taps[0].readers[0]]
    widths = [max(linear.shape) for linear in first.values()]
    text = config.get_text_config()
    eager = getattr(config, "_attn_implementation", None) == "eager"  # holds scores of all pairs
    vocab = max((shape[0] for shape in anatomies.trunk.values() if len(shape) == 2), default=1)
    return Shape(
        num_blocks=len(sizes),
        block_params=max(sizes),
        linear_params=sum(linears),
        largest_linear=max(linears),
        entrance_params=max(embeddings, default=0),
        exit_params=max(embeddings, default=0),
        hidden_size=reader.shape[1],
        widest=max(widths),
        eager_heads=text.num_attention_heads if eager else 0,
        vocab_size=vocab,
        stored_bytes=stored_bytes,
        largest_shard=max([*sizes]) * storage_itemsize,
    )


def _windows(asked: bool | str, windows: int, cost: Estimate) -> int:
    """Return how many windows are scored: by default only where that adds little to the cut."""
    if asked == "auto":
        return windows if cost.evaluate_seconds <= EVAL_SHARE * cost.cut_seconds else 0
    return windows if asked else 0


def _config_changes(groups: Sequence[Sequence[Group]], counts: Mapping[str, int]) -> dict[str, int]:
    """Return the config keys that count units, with their new values."""
    changes: dict[str, int] = {}
    for block in groups:
        for group in block:
            if group.coupling is not None:
                (site,) = group.sites
                changes[group.coupling.config_key] = site.num_units - counts[site.name]
    return changes
