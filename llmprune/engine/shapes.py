"""A model by shape: what is eligible, what stays as it is, and the sizes that decide cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.arch.anatomy import left_out
from llmprune.arch.limits import active_share
from llmprune.arch.types import Site
from llmprune.engine.cost import Shape
from llmprune.engine.sites import Group, is_skipped
from llmprune.walk.observation import statistics_bytes

if TYPE_CHECKING:
    from llmprune.arch.anatomy import Anatomy
    from llmprune.recipe.pruning import PruneStep


@dataclass(frozen=True, kw_only=True)
class Anatomies:
    """A model by shape: every block's anatomy and prefix, and the parameters outside."""

    model_type: str
    prefixes: tuple[str, ...]
    blocks: tuple[Anatomy, ...]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    trunk: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Parameters that stay as they are, and why."""

    what: str
    num_params: int
    reason: str


def what_stays(
    anatomies: Anatomies, step: PruneStep, sites: Sequence[Site]
) -> tuple[tuple[Skipped, ...], int]:
    """Return what is not pruned, and the number of eligible weights."""
    pruned = {(site.block, span.linear) for site in sites for span in site.spans}
    eligible = globbed = 0
    rest: dict[str, tuple[set[str], int]] = {}
    for index, anatomy in enumerate(anatomies.blocks):
        for name, linear in anatomy.linears.items():
            size = linear.shape[0] * linear.shape[1]
            if is_skipped(name, anatomies.prefixes[index], step.skip):
                globbed += size
            else:
                eligible += size
        for param, why in left_out(anatomy, anatomies.shapes[index]).items():
            names, before = rest.get(why, (set(), 0))
            rest[why] = (names | {param}, before + count(anatomies.shapes[index][param]))
    covered = sum(
        anatomies.blocks[index].linears[name].shape[0]
        * anatomies.blocks[index].linears[name].shape[1]
        for index, name in pruned
    )
    rows = [Skipped(what=name, num_params=count(shape), reason="outside the blocks")
            for name, shape in anatomies.trunk.items()]  # fmt: skip
    for why, (names, size) in rest.items():
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        vectors = why.startswith("norm")
        rows.append(
            Skipped(
                what="norms, biases, scales" if vectors else shown,
                num_params=size,
                reason="not a matrix" if vectors else why,
            )
        )
    if globbed:
        rows.append(Skipped(what=", ".join(step.skip), num_params=globbed, reason="prune.skip"))
    if eligible > covered:
        rows.append(
            Skipped(
                what="other linears", num_params=eligible - covered, reason="not in this pattern"
            )
        )
    return tuple(rows), eligible


def num_params(anatomies: Anatomies) -> int:
    """Return the number of parameters of the model."""
    blocks = sum(count(shape) for shapes in anatomies.shapes for shape in shapes.values())
    return blocks + sum(count(shape) for shape in anatomies.trunk.values())


def sizes_of(anatomies: Anatomies, config: Any, stored_bytes: int, storage_itemsize: int) -> Shape:
    """Return the sizes that decide cost: of the largest block, and of the average for time."""
    sizes = [sum(count(shape) for shape in shapes.values()) for shapes in anatomies.shapes]
    linears = [linear for anatomy in anatomies.blocks for linear in anatomy.linears.values()]
    active = active_share(config)
    computed = sum(count(row.shape) * (active if row.expert is not None else 1) for row in linears)
    reader = anatomies.blocks[0].linears[anatomies.blocks[0].taps[0].readers[0]]
    embeddings = [count(shape) for shape in anatomies.trunk.values()]
    text = config.get_text_config()
    eager = getattr(config, "_attn_implementation", None) == "eager"  # holds scores of all pairs
    vocab = max((shape[0] for shape in anatomies.trunk.values() if len(shape) == 2), default=1)
    return Shape(
        num_blocks=len(sizes),
        block_params=max(sizes),
        linear_params=round(computed / len(sizes)),
        largest_linear=max(count(row.shape) for row in linears),
        entrance_params=max(embeddings, default=0),
        exit_params=max(embeddings, default=0),
        hidden_size=getattr(text, "hidden_size", None) or reader.shape[1],
        widest=max(max(row.shape) for row in linears),
        eager_heads=(getattr(text, "num_attention_heads", None) or 0) if eager else 0,
        vocab_size=vocab,
        stored_bytes=stored_bytes,
        largest_shard=max([*sizes]) * storage_itemsize,
    )


def most_statistics(
    anatomies: Anatomies, groups: Sequence[Sequence[Group]], needs: Collection[str]
) -> int:
    """Return what the statistics of the block that needs most take up."""
    return max(
        statistics_bytes(
            anatomy,
            {tap: tuple(needs) for group in here for tap in (group.tap, *group.around) if tap},
        )
        for anatomy, here in zip(anatomies.blocks, groups, strict=True)
    )


def count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
