"""Linears of one tap made two, by the directions that carry most of what they say.

Legend: O outputs, I inputs, R rank, N rows of tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import NumericalError, RecipeError
from llmprune.engine.sites import Group
from llmprune.score import RANK_SCORES
from llmprune.solver.errors import relative, relative_error
from llmprune.solver.low_rank import Factors, low_rank_factors
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import advance, embed, logits
from llmprune.walk.rewriting import Rewriting

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.arch.types import Site
    from llmprune.engine.outcome import Outcome
    from llmprune.engine.plan import Plan
    from llmprune.engine.solving import Cutter

PLAIN = "its own singular values (no token reached it)"
LEFT, RIGHT = "left.weight", "right.weight"


def lower_ranks(
    cutter: Cutter,
    group: Group,
    block: Block,
    stats: Stats,
    prior: Mapping[str, Tensor],
    outcome: Outcome,
) -> None:
    """Put factors, or their product, in place of the linears of a group that lose ranks.

    Factors wait in `block.added` until the block is written, for its module has no place for them.

    Raises:
        RecipeError: a linear has zeros of an earlier pruning, which would be filled.
        NumericalError: a Gram matrix is not finite; names the linear.
    """
    learns = bool(RANK_SCORES[cutter.method.score].needs)
    for site in group.sites:
        name, count = site.spans[0].linear, cutter.counts[site.name]
        facts: dict[str, Any] = {"error": 0.0}
        if count:
            if site.name in prior:
                raise RecipeError(
                    f"prune.pattern: {site.name} has zeros of an earlier pruning, which a form of "
                    "low rank does not keep. Lower ranks first, or give --set prune.regrow=true."
                )
            weight_OI = block.weight(name)
            gram_II = stats["gram"] if learns and stats.num_tokens else None
            rank = site.num_units - count
            factors = _factors(site, weight_OI, gram_II, rank, cutter)
            product_OI = _product(factors).to(weight_OI)
            facts = _facts(weight_OI, product_OI, gram_II, rank)
            facts |= {"fallback": PLAIN} if learns and gram_II is None else {}
            outcome.touched |= _put(block, name, factors, product_OI, shrink=cutter.shrink)
        outcome.rows.append(_row(site, count, stats.num_tokens, facts))


def product_logits(plan: Plan, blocks: Rewriting) -> Callable[[Tensor], Tensor] | None:
    """Return what gives logits (N, T, V) of token ids (N, T), on the host, for the source with the
    product of the stored factors in place of every linear that became two.

    None where tensors have the source's shapes, and in 16 bits, which the product is rounded to.
    """
    same = blocks.result.skeleton is blocks.source.skeleton
    if same or plan.dtype != torch.float32:
        return None
    source = replace(blocks.source, dtype=plan.dtype)
    result = replace(blocks.result, dtype=plan.dtype)

    def logits_of(tokens_NT: Tensor) -> Tensor:
        flow = embed(source, tokens_NT, len(tokens_NT))
        for index in range(len(source)):
            with result.open(index) as small:
                values = small.values()
                products = {
                    site.spans[0].linear: _product(_stored(values, site.spans[0].linear))
                    for group in plan.groups[index]
                    for site in group.sites
                    if (plan.counts or {})[site.name]
                }
            with source.open(index) as block:
                for name, product_OI in products.items():
                    block.replace(name, product_OI.to(block.weight(name)))
                advance(block, flow)
        parts = [part.cpu() for _, _, part in logits(source, flow)]
        return torch.cat(parts, 1)

    return logits_of


def _factors(
    site: Site, weight_OI: Tensor, gram_II: Tensor | None, rank: int, cutter: Cutter
) -> Factors:
    """Return the factors of a linear, rounded to what is stored."""
    if gram_II is None:
        gram_II = torch.eye(weight_OI.shape[1], device=weight_OI.device)
    try:
        found = low_rank_factors(weight_OI, gram_II, rank, cutter.settings.damping)
    except NumericalError as error:
        raise NumericalError(f"{site.name}: {error}") from error
    return Factors(*(part.to(cutter.stored) for part in found))


def _product(factors: Factors) -> Tensor:
    """Return the weight_OI that factors stand for, multiplied in float64 on the host."""
    left_OR, right_RI = (part.cpu().double() for part in factors)
    return left_OR @ right_RI


def _stored(values: Mapping[str, Tensor], name: str) -> Factors:
    return Factors(values[f"{name}.{LEFT}"], values[f"{name}.{RIGHT}"])


def _facts(
    weight_OI: Tensor, product_OI: Tensor, gram_II: Tensor | None, rank: int
) -> dict[str, Any]:
    """Return what the report says of a linear: its rank, and what of its output is lost."""
    if gram_II is not None:
        error = relative_error(weight_OI, product_OI, gram_II)
    else:
        change = float((weight_OI.double() - product_OI.double()).square().sum())
        error = relative(change, float(weight_OI.double().square().sum()))
    return {"error": error, "rank": rank, "lost_energy": error**2}


def _put(
    block: Block, name: str, factors: Factors, product_OI: Tensor, *, shrink: bool
) -> set[str]:
    """Put factors or their product in a linear's place; return the parameters that changed."""
    if not shrink:
        block.replace(name, product_OI)
        return block.params_of({name})
    added = {f"{name}.{LEFT}": factors.left_OR, f"{name}.{RIGHT}": factors.right_RI}
    block.added.update(added)
    return set(added)


def _row(site: Site, count: int, num_tokens: int, facts: Mapping[str, Any]) -> dict[str, object]:
    """Return a linear's line of the report."""
    return {
        "site": site.name,
        "units": site.num_units,
        "removed": count,
        "weights": site.num_weights,
        "removed_weights": site.freed(count),
        "sparsity": site.freed(count) / site.num_weights,
        "tokens": num_tokens,
        **facts,
    }
