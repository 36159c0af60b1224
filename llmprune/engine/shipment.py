"""What is left of a model's blocks once counts are known, and how that is stored.

Shapes alone decide; nothing is read or built here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.couplings import ATTENTION, BLOCK, DEPTHS, FFN, HEADS, QUERY_HEADS
from llmprune.arch.layout import BlockLayout, Layout, Tier
from llmprune.arch.types import Coupling, Site
from llmprune.checkpoint.shrink import Axes, axes_of
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.engine.sites import Group

if TYPE_CHECKING:
    import torch

    from llmprune.arch.anatomy import Anatomy

Counts = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """How a result is stored: blocks, config.json, code files beside it, and the modules of it.

    `before` is the source's config.

    `widths` is to how many units every coupling is filled up with zeros (tier E1); `reasons` say
    why lower tiers would not do.
    """

    layout: Layout
    tier: Tier
    config: Mapping[str, Any]
    skeleton: Skeleton
    before: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[Path, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def places(self) -> dict[int, int]:
        """Return where each source block stands in the result; those that went are absent."""
        return {block.source: place for place, block in enumerate(self.layout.blocks)}

    @property
    def num_params(self) -> int:
        """Return the parameters of the result."""
        return sum(value.numel() for value in self.skeleton.model.parameters())


def layout_of(groups: Sequence[Sequence[Group]], counts: Counts) -> Layout:
    """Return what is left of every block.

    A block that loses both halves, or all of them, is gone.
    """
    blocks = []
    for index, here in enumerate(groups):
        without = gone_of(here, counts)
        if BLOCK not in without:
            sizes: dict[str, int] = {}
            for group in here:
                (site,) = group.sites
                assert group.coupling is not None
                if is_gone(site, without):
                    continue
                for key, per_unit in group.coupling.config_keys:
                    sizes[key] = per_unit * (site.num_units - counts[site.name])
            blocks.append(BlockLayout(source=index, sizes=sizes, without=without))
    return Layout(blocks=tuple(blocks))


def gone_of(groups: Sequence[Group], counts: Counts) -> tuple[str, ...]:
    """Return which halves of a block go, or that all of it does."""
    sites = [site for group in groups for site in group.sites if site.kind in DEPTHS]
    gone = tuple(site.kind for site in sites if counts[site.name])
    return (BLOCK,) if BLOCK in gone or {ATTENTION, FFN} <= set(gone) else gone


def is_gone(site: Site, gone: Sequence[str]) -> bool:
    """Tell whether the half that a site lies in goes whole, so that nothing of it is cut."""
    if site.kind in DEPTHS:
        return BLOCK in gone and site.kind != BLOCK and len(gone) == 1
    half = ATTENTION if site.kind in (HEADS, QUERY_HEADS) else FFN
    return BLOCK in gone or half in gone


def cut_of_block(
    groups: Sequence[Group], kept: Mapping[str, torch.Tensor]
) -> list[tuple[Coupling, torch.Tensor]]:
    """Return the couplings of a block that units are cut out of; `kept` are units by site."""
    return [
        (group.coupling, kept[site.name])
        for group in groups
        for site in group.sites
        if group.coupling is not None and site.kind not in DEPTHS and site.name in kept
    ]


def axes_of_block(
    groups: Sequence[Group],
    kept: Mapping[str, torch.Tensor],
    anatomy: Anatomy,
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int],
) -> Axes:
    """Return the index of every axis of a block that changes; `kept` are units by site."""
    return axes_of(cut_of_block(groups, kept), anatomy.linears, shapes, widths)
