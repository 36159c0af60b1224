"""How a result is stored: by its form; of low rank as two linears with code, or as their product.

Nothing is read but the source's config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import RecipeError, WontLoad
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.checkpoint.source import Source
from llmprune.delivery.masks import MaskFiles
from llmprune.engine.building import build_result
from llmprune.engine.ranks import DENSE, ranks_by_block
from llmprune.engine.shipment import Shipment
from llmprune.engine.shipping import as_it_is, ship, ship_masked
from llmprune.mask.pattern import LOW_RANK, LowRank

if TYPE_CHECKING:
    import torch

    from llmprune.arch.anatomy import Anatomy
    from llmprune.engine.plan import Plan

REASONS = (("E0", "no stock class has two linears in place of one"), ("E2", "nor has DeciLM"))


def shipping_of(plan: Plan) -> Callable[..., Shipment]:
    """Return what decides how the result of a plan is stored: `ship`, or as that."""
    if isinstance(plan.pattern, LowRank):
        return ship_ranks
    return ship_masked if plan.form == "masked" else ship


def ship_ranks(
    plan: Plan,
    source: Skeleton,
    config: Mapping[str, Any],
    anatomies: Sequence[Anatomy],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Shipment:
    """Decide how a result with linears of low rank is stored.

    Raises:
        WontLoad: no class can be built that has them.
    """
    plain = as_it_is(source, config, len(plan.groups))
    ranks = ranks_by_block(plan, plan.counts or {})
    if plan.form == DENSE or not any(ranks):
        return plain
    from llmprune.delivery.heterogeneous import factored_config

    changed, code = factored_config(config, ranks)
    skeleton = build_result(source, changed, code, dtype, trust_remote_code)
    for index, own in enumerate(ranks):
        _check_block(source.shapes(index), skeleton.shapes(index), own, anatomies[index])
    return replace(
        plain,
        tier="E3",
        config=changed,
        before=config,
        skeleton=skeleton,
        code=code,
        reasons=REASONS,
    )


def _check_block(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    anatomy: Anatomy,
) -> None:
    """Check that a block has its factors, of the right shapes, and all else as it was.

    Raises:
        WontLoad: it has not; names the parameter.
    """
    expected = dict(before)
    for name, rank in ranks.items():
        rows, columns = anatomy.linears[name].shape
        del expected[anatomy.linears[name].param]
        expected |= {f"{name}.left.weight": (rows, rank), f"{name}.right.weight": (rank, columns)}
    wrong = sorted(
        name for name in expected.keys() | after.keys() if expected.get(name) != after.get(name)
    )
    if wrong:
        raise WontLoad(
            f"{wrong[0]} would be {expected.get(wrong[0])}, where the class makes it "
            f"{after.get(wrong[0])}. Leave it out with --set 'prune.skip=[\"*{wrong[0]}\"]', or "
            "type --set prune.tier=E0 for products, which save nothing."
        )


def check_no_masks(plan: Plan, source: Source) -> None:
    """Check that no zeros of an earlier pruning would be filled.

    Raises:
        RecipeError: some would.
    """
    if not isinstance(plan.pattern, LowRank) or plan.prune.regrow:
        return
    masked = MaskFiles(source.folder).index
    if any(site.name in masked for site in plan.sites):
        raise RecipeError(
            f"prune.pattern: {source.name} was pruned by single weights, whose zeros {LOW_RANK} "
            "does not keep. Lower the rank first and prune weights after it, or give the zeros up "
            "with --set prune.regrow=true."
        )
