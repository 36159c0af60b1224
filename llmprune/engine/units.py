"""One kind of unit of one block: score its units, choose, make up for those that go.

The block keeps its shapes until all its groups are decided; then `finish` cuts the units out, or
sets them to zero. Legend: O outputs, I inputs of the linear that reads the units, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.couplings import DEPTHS, EXPERTS
from llmprune.arch.experts import experts_of
from llmprune.arch.types import Coupling, Site
from llmprune.checkpoint.shrink import linear_axes, take
from llmprune.engine.sites import Group
from llmprune.mask.apply import masked
from llmprune.mask.rank import keep_highest
from llmprune.score import SCORES, UNIT_SCORES
from llmprune.score.members import Member
from llmprune.score.reduction import reduce_scores
from llmprune.solver import COMPENSATIONS
from llmprune.solver.acceptance import accept
from llmprune.solver.errors import relative, row_errors
from llmprune.solver.types import Settings, Solved
from llmprune.stats.types import Stats
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.catalog import Method

EMPTY = Stats(num_tokens=0, values={})
NO_TOKENS = "magnitude (no token reached it)"
Seen = Mapping[str, Stats]


def members_of(group: Group, block: Block, seen: Seen, learnt: Seen) -> list[Member]:
    """Return the linears of a site with what is known of each: its tap, and its gradients."""
    found = []
    for span in group.sites[0].spans:
        stats = seen.get(block.anatomy.tap_of(span.linear).name, seen.get("", EMPTY))
        known = with_diagonal(join(stats, learnt.get(span.linear)))
        found.append(Member(span, block.weight(span.linear), known))
    return found


def unit_scores(
    method: Method,
    members: list[Member],
    site: Site,
    options: Mapping[str, float],
    draw: Any = None,
) -> Tensor:
    """Return unit_score_U of a site: by a score of units, or of weights put together."""
    if method.score in UNIT_SCORES:
        row = UNIT_SCORES[method.score]
        own = {name: options[name] for name in row.options}
        found: Tensor = row.fn(members, site.num_units, **own)
        return found
    score, defaults = SCORES[method.score], SCORES[method.score].options
    chosen = members
    if method.reduce == "reader":
        chosen = [member for member in members if member.reads_units]
    scores = []
    for member in chosen:
        stats = member.stats
        if "seed" in score.needs:
            seeded = {**stats.values, "seed": draw(member.span.linear)}
            stats = replace(stats, values=seeded)
        own = {name: options[name] for name in defaults}
        scores.append(score.fn(member.weight_OI, stats, **own))
    return reduce_scores(chosen, scores, site.num_units, method.reduce, method.pool)


def choose_units(unit_score_U: Tensor, count: int, num_groups: int) -> Tensor:
    """Return keep_U without the `count` units of lowest score, as many of each group.

    >>> choose_units(torch.tensor([3.0, 1.0, 2.0, 4.0]), 2, 2)
    tensor([ True, False, False,  True])
    """
    score_GU = unit_score_U.float().reshape(num_groups, -1)
    each_G = torch.full((num_groups,), count // num_groups)
    return keep_highest(score_GU, each_G).reshape(-1)


def columns_kept(coupling: Coupling, keep_U: Tensor, num_columns: int) -> Tensor:
    """Return keep_I of the linear that reads the units: columns of units that stay, and all others.

    >>> from llmprune.arch.types import Span
    >>> row = Coupling(name="x", spans=(Span(linear="o", axis="in", width=2),), num_units=2)
    >>> columns_kept(row, torch.tensor([True, False]), 5)
    tensor([ True,  True, False, False,  True])
    """
    span = next(span for span in coupling.spans if span.axis == "in")
    keep_I = torch.ones(num_columns, dtype=torch.bool)
    wide = keep_U.cpu().repeat_interleave(span.width)
    keep_I[span.offset : span.offset + len(wide)] = wide
    return keep_I


def compensate(
    solver: str,
    coupling: Coupling,
    block: Block,
    stats: Stats,
    keep_I: Tensor,
    settings: Settings,
    stored: torch.dtype,
) -> tuple[dict[str, Any], set[str]]:
    """Change what reads the units so that it gives nearly what it gave with all of them.

    A row of the weight (with its bias) is changed only where that is better than zeros, on the bits
    that are stored. Returns facts for the report, and the parameters that changed.
    """
    row, linear = COMPENSATIONS[solver], str(coupling.reader)
    weight_OI = block.weight(linear)
    keep_I = keep_I.to(weight_OI.device)
    found = row.fn(weight_OI, stats, keep_I, settings)
    facts: dict[str, Any] = {"solver": solver}
    result_OI, bias_O = found
    if "gram" in stats.values:
        dense_OI, gram_II = weight_OI, stats["gram"]
        keep_OI = keep_I.expand_as(weight_OI)
        if bias_O is not None:  # the bias is the weight of an input that is always one
            sums_I = stats["col_mean"] * stats.num_tokens
            gram_II = _with_ones(gram_II, sums_I, stats.num_tokens)
            dense_OI = _beside(weight_OI, torch.zeros(len(weight_OI)))
            result_OI = _beside(result_OI, bias_O)
            keep_OI = _beside(keep_OI, torch.ones(len(weight_OI)))
        accepted = accept(dense_OI, Solved(result_OI, keep_OI), gram_II, stored)
        result_OI = accepted.solved.weight_OI
        if bias_O is not None:
            result_OI, bias_O = result_OI[:, :-1], result_OI[:, -1]
        whole = float(row_errors(dense_OI, gram_II).sum())
        facts["accepted"] = accepted.share
        facts["stages"] = {
            "masked": relative(accepted.zeroed, whole),
            "updated": relative(accepted.left, whole),
        }
        facts["error"] = facts["stages"]["updated"]
    block.replace(linear, result_OI.to(weight_OI.dtype).contiguous())
    changed = block.params_of({linear})
    if bias_O is not None:
        changed.add(block.add_to_bias(linear, bias_O))
    return facts, changed


def unit_masks(group: Group, block: Block, keep_U: Tensor) -> dict[str, Tensor]:
    """Return keep_OI of every linear of a site: False where a unit that goes has its part."""
    found: dict[str, Tensor] = {}
    num_units = group.sites[0].num_units
    for span in group.sites[0].spans:
        rows, columns = block.anatomy.linears[span.linear].shape
        keep_OI = torch.ones(rows, columns, dtype=torch.bool)
        if span.axis == "all":
            keep_OI &= keep_U[span.unit].cpu()
        else:
            wide = keep_U.cpu().repeat_interleave(span.width)
            part = slice(span.offset, span.offset + num_units * span.width)
            if span.axis == "out":
                keep_OI[part] &= wide[:, None]
            else:
                keep_OI[:, part] &= wide
        before = found.get(span.linear)
        found[span.linear] = keep_OI if before is None else before & keep_OI
    return found


def sliced_masks(
    prior: Mapping[str, Tensor], cut_out: list[tuple[Coupling, Tensor]], block: Block
) -> dict[str, Tensor]:
    """Return the masks of an earlier pruning for what is left of the linears, by full name."""
    axes = linear_axes(cut_out, block.anatomy.linears)
    found = moved_masks(prior, cut_out, block)
    for linear in {name for name, _ in axes}:
        keep_OI = prior.get(block.prefix + linear)
        if keep_OI is not None:
            for axis in (0, 1):
                if (linear, axis) in axes:
                    keep_OI = take(keep_OI, axis, axes[linear, axis])
            found[block.prefix + linear] = keep_OI
    return found


def moved_masks(
    prior: Mapping[str, Tensor], cut_out: list[tuple[Coupling, Tensor]], block: Block
) -> dict[str, Tensor]:
    """Return the masks of experts that stay under the numbers that they get, by full name."""
    experts, found = experts_of(block.anatomy.linears), {}
    for kept_K in (kept_K for row, kept_K in cut_out if row.kind == EXPERTS):
        for place, expert in enumerate(kept_K.tolist()):
            for new, old in zip(experts[place], experts[expert], strict=True):
                if block.prefix + old in prior:
                    found[block.prefix + new] = prior[block.prefix + old]
    return found


def zero_units(masks: Mapping[str, Tensor], block: Block) -> set[str]:
    """Set what masks leave out to zero; return the parameters that changed."""
    for linear, keep_OI in masks.items():
        weight_OI = block.weight(linear)
        block.replace(linear, masked(weight_OI, keep_OI.to(weight_OI.device)))
    return block.params_of(set(masks))


def is_deep(site: Site) -> bool:
    """Tell whether the one unit of a site is a half of a block, or all of it."""
    return site.kind in DEPTHS


def join(stats: Stats, own: Stats | None) -> Stats:
    """Return the statistics of a tap together with what is known of one of its linears."""
    if own is None:
        return stats
    return replace(stats, values={**stats.values, **own.values}, num_sequences=own.num_sequences)


def with_diagonal(stats: Stats) -> Stats:
    """Return the statistics with `col_sq`, which the diagonal of a Gram matrix is."""
    if "gram" not in stats.values or "col_sq" in stats.values:
        return stats
    diagonal_I = stats["gram"].diagonal()
    wide = torch.float32 if diagonal_I.device.type == "mps" else torch.float64  # MPS has no more
    return replace(stats, values={**stats.values, "col_sq": diagonal_I.to(wide)})


def _with_ones(gram_II: Tensor, sums_I: Tensor, num_tokens: int) -> Tensor:
    """Return the Gram matrix of the inputs and one more that is always one."""
    size = len(gram_II)
    found = gram_II.new_zeros(size + 1, size + 1)
    found[:size, :size] = gram_II
    found[:size, size] = found[size, :size] = sums_I.to(gram_II)
    found[size, size] = num_tokens
    return found


def _beside(matrix_OI: Tensor, column_O: Tensor) -> Tensor:
    """Return a matrix with one more column."""
    return torch.cat([matrix_OI, column_O.to(matrix_OI)[:, None]], dim=1)
