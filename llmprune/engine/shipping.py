"""What a result will be stored as: its blocks, its config, the tier that holds them.

Nothing is read but the source's config: the new one is built without weights, and every block that
comes of it is compared with what the plan leaves of the block that it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.couplings import ATTENTION, BLOCK, DEPTHS, FFN, HEADS, QUERY_HEADS
from llmprune.arch.layout import BlockLayout, Layout, Tier
from llmprune.arch.resize import check_blocks_alike, resized
from llmprune.arch.types import Site
from llmprune.base.errors import WontLoad
from llmprune.checkpoint.shrink_experts import without_units
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.engine.building import as_named, build_or_twin, explicit
from llmprune.engine.rehearsal import check_meaning
from llmprune.engine.shipment import (
    Shipment,
    axes_of_block,
    cut_of_block,
    gone_of,
    is_gone,
    layout_of,
)
from llmprune.engine.sites import Group
from llmprune.solver import COMPENSATIONS

if TYPE_CHECKING:
    import torch

    from llmprune.arch.anatomy import Anatomy
    from llmprune.engine.plan import Plan


def ship(
    plan: Plan,
    source: Skeleton,
    config: Mapping[str, Any],
    anatomies: Sequence[Anatomy],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Shipment:
    """Decide how the result of a plan with counts is stored.

    Raises:
        WontLoad: the tier that is asked for, or any, cannot hold it; says why.
    """
    assert plan.counts is not None
    layout = layout_of(plan.groups, plan.counts)
    if not layout.blocks:
        raise WontLoad(
            "the plan leaves no block at all. Ask for a lower --sparsity, or for fewer blocks."
        )
    base = explicit(config, source.config, len(plan.groups))
    base, layout = _unfolded(plan, base, layout)
    tier, reasons = _choose_tier(plan, base, layout)
    sizes: dict[str, Any] = _sizes(plan, layout) if tier in ("E0", "E1") else _pinned(plan)
    if tier == "E0":  # also what differed before, and does no longer
        sizes |= {key: n for key, n in layout.widest.items() if base.get(key, n) != n}
    sizes |= bias_entries(plan, source, anatomies)
    changed = resized(base, layout, as_named(sizes, base, source.config))
    code: tuple[Path, ...] = ()
    if tier in ("E2", "E3"):
        from llmprune.delivery.heterogeneous import heterogeneous_config

        changed, code = heterogeneous_config(changed, layout, tier)
    changed, skeleton = build_or_twin(source, changed, code, dtype, trust_remote_code)
    shipment = Shipment(
        layout=layout,
        tier=tier,
        config=changed,
        before=base,
        skeleton=skeleton,
        code=code,
        widths=_widths(plan) if tier == "E1" else {},
        reasons=tuple(reasons),
    )
    check_blocks_alike(source.blocks, skeleton.blocks, layout, _roots(anatomies))
    _check_biases(plan, skeleton, layout)
    _check_shapes(plan, source, shipment, anatomies)
    if tier in ("E0", "E1") and changed["model_type"] == source.config.model_type:
        check_meaning(
            *(source.config, source.family, _kinds(plan, layout), changed["model_type"]),
            trust_remote_code=trust_remote_code,
        )
    return shipment


def _unfolded(
    plan: Plan, config: Mapping[str, Any], layout: Layout
) -> tuple[dict[str, Any], Layout]:
    """Return config and layout in terms of the stock class, also of blocks that differed before.

    Raises:
        WontLoad: they did, and are to be filled up to the widest.
    """
    if "auto_map" not in config:
        return dict(config), layout
    from llmprune.delivery.heterogeneous import cut_again, unfolded

    found = unfolded(config)
    if found is None:
        return dict(config), layout
    if plan.prune.tier == "E1":
        raise WontLoad(
            "prune.tier: E1 fills blocks up to the widest, and those of this source differed "
            "before, maybe by more than goes now. Type --set prune.tier=E3, or leave tier out."
        )
    return found[0], cut_again(layout, found[1])


def _kinds(plan: Plan, layout: Layout) -> list[str]:
    """Return the kinds of units that go anywhere."""
    gone = [BLOCK] if len(layout.blocks) < len(plan.groups) else []
    return [*gone, *{site.kind for site in plan.sites if (plan.counts or {})[site.name]}]


def bias_entries(plan: Plan, source: Skeleton, anatomies: Sequence[Anatomy]) -> dict[str, Any]:
    """Return the config's entries that give linears the biases that a compensation writes."""
    if not _writes_biases(plan):
        return {}
    found = {}
    for index, groups in enumerate(plan.groups):
        params = source.shapes(index)
        for group in groups:
            reader = group.coupling.reader if group.coupling is not None else None
            if reader is None or not (plan.counts or {})[group.sites[0].name]:
                continue
            param = anatomies[index].linears[reader].param
            half = "attention_bias" if group.sites[0].kind in (HEADS, QUERY_HEADS) else "mlp_bias"
            if param.removesuffix("weight") + "bias" not in params and hasattr(source.config, half):
                found[half] = True
    return found


def _writes_biases(plan: Plan) -> bool:
    row = COMPENSATIONS.get(plan.method.solver)
    return row is not None and row.bias


def _check_biases(plan: Plan, skeleton: Skeleton, layout: Layout) -> None:
    """Check that every linear that a compensation gives a bias has a place for it.

    Raises:
        WontLoad: one has none: transformers would drop the bias on loading.
    """
    for place, block in enumerate(layout.blocks if _writes_biases(plan) else ()):
        params = skeleton.shapes(place)
        for group in plan.groups[block.source]:
            reader = group.coupling.reader if group.coupling is not None else None
            gone = is_gone(group.sites[0], block.without)
            cut = bool((plan.counts or {})[group.sites[0].name]) and not gone
            if reader is not None and cut and f"{reader}.bias" not in params:
                raise WontLoad(
                    f"solver {plan.method.solver} puts a bias into {reader}, for which a "
                    f"{skeleton.config.model_type} model has no place: it would be dropped on "
                    "loading. Type --set prune.solver=least-squares, which needs none."
                )


def as_it_is(source: Skeleton, config: Mapping[str, Any], num_blocks: int) -> Shipment:
    """Return how a result is stored whose tensors keep their shapes."""
    blocks = tuple(BlockLayout(source=index) for index in range(num_blocks))
    return Shipment(layout=Layout(blocks=blocks), tier="E0", config=config, skeleton=source)


def ship_masked(
    plan: Plan,
    source: Skeleton,
    config: Mapping[str, Any],
    anatomies: Sequence[Anatomy],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> Shipment:
    """Decide how a result with zeros is stored: as the source, but for biases that it gets.

    Raises:
        WontLoad: the family has no place for them.
    """
    plain = as_it_is(source, config, len(plan.groups))
    entries = bias_entries(plan, source, anatomies)
    skeleton, changed = source, dict(config)
    if entries:
        changed = resized(config, plain.layout, entries)
        changed, skeleton = build_or_twin(source, changed, (), dtype, trust_remote_code)
    _check_biases(plan, skeleton, plain.layout)
    return replace(plain, config=changed, before=config, skeleton=skeleton)


def _choose_tier(
    plan: Plan, config: Mapping[str, Any], layout: Layout
) -> tuple[Tier, list[tuple[str, str]]]:
    """Return the tier: asked for, or the lowest that holds the layout."""
    asked = plan.prune.tier
    if asked in ("auto", "E0") and layout.uniform:
        return "E0", []  # whether a stock class takes these sizes is seen when it is built
    from llmprune.delivery.heterogeneous import lowest_tier, why_not

    if asked == "auto":
        tier, reasons = lowest_tier(config, layout)
        return tier, [(str(name), why) for name, why in reasons]
    reason = why_not(config, layout, asked)
    if reason is not None:
        lowest, _ = lowest_tier(config, layout)
        raise WontLoad(
            f"prune.tier: {asked} cannot hold this result: {reason}. Type --set prune.tier={lowest}"
            ", or prune.form=masked for zeros in tensors of the old shape."
        )
    return asked, []


def _sizes(plan: Plan, layout: Layout) -> dict[str, int]:
    """Return the config's sizes: those of all blocks, or of the widest."""
    changed = {
        key
        for here in plan.groups
        for group in here
        if group.coupling is not None and (plan.counts or {})[group.sites[0].name]
        for key, _ in group.coupling.config_keys
    }
    sizes = {key: num for key, num in layout.widest.items() if key in changed}
    return sizes | _pinned(plan)


def _pinned(plan: Plan) -> dict[str, int]:
    """Return what a config must say once a number of units changes."""
    return {
        key: value
        for here in plan.groups
        for group in here
        if group.coupling is not None and (plan.counts or {})[group.sites[0].name]
        for key, value in group.coupling.pinned
    }


def _widths(plan: Plan) -> dict[str, int]:
    """Return to how many units each coupling is filled up: the most that any block keeps."""
    most: dict[str, int] = {}
    for here in plan.groups:
        gone = gone_of(here, plan.counts or {})
        for group in here:
            (site,) = group.sites
            if group.coupling is not None and site.kind not in DEPTHS and BLOCK not in gone:
                kept = site.num_units - (plan.counts or {})[site.name]
                name = group.coupling.name
                most[name] = max(most.get(name, 0), kept)
    return most


def _roots(anatomies: Sequence[Anatomy]) -> dict[str, list[str]]:
    """Return the paths of the modules that each half of the blocks lies in."""
    found: dict[str, set[str]] = {}
    for anatomy in anatomies:
        for half in (ATTENTION, FFN):
            row = anatomy.coupling(half)
            spans = row.spans if row is not None else ()
            found.setdefault(half, set()).update(s.linear.partition(".")[0] for s in spans)
    return {half: sorted(paths) for half, paths in found.items()}


def _check_shapes(
    plan: Plan, source: Skeleton, shipment: Shipment, anatomies: Sequence[Anatomy]
) -> None:
    """Check that the config makes every block's parameters as large as what is left of them.

    Raises:
        WontLoad: it does not; names the parameter.
    """
    for place, block in enumerate(shipment.layout.blocks):
        groups = plan.groups[block.source]
        kept = {
            site.name: _some_units(site, (plan.counts or {})[site.name])
            for group in groups
            for site in group.sites
            if not is_gone(site, block.without) or shipment.tier == "E1"
        }
        anatomy = anatomies[block.source]
        shapes = _without_units(source.stored_shapes(block.source), groups, kept, anatomy)
        axes = axes_of_block(groups, kept, anatomy, shapes, shipment.widths)
        for (param, axis), index_N in axes.items():
            sizes = list(shapes[param])
            sizes[axis] = len(index_N)
            shapes[param] = tuple(sizes)
        for param, shape in shipment.skeleton.stored_shapes(place).items():
            if shapes.get(param, shape) != shape:
                raise WontLoad(
                    f"{param} of block {block.source} would be {list(shapes[param])}, where the "
                    f"config makes it {list(shape)}: this family's config cannot say so. Choose "
                    "another --pattern, or --set prune.form=masked."
                )


def _some_units(site: Site, count: int) -> torch.Tensor:
    """Return units that may stay where `count` go: the first of every group."""
    import torch

    size, kept = site.num_units // site.num_groups, (site.num_units - count) // site.num_groups
    starts = torch.arange(site.num_groups)[:, None] * size
    return (starts + torch.arange(kept)).reshape(-1)


def _without_units(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[Group],
    kept: Mapping[str, torch.Tensor],
    anatomy: Anatomy,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a block's parameters once experts, or channels of theirs, are gone."""
    import torch

    values = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found = without_units(values, cut_of_block(groups, kept), anatomy.linears)
    return {name: tuple(value.shape) for name, value in found.items()}
