"""Which linears are decided together, and which groups of them a solver sees at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.types import Coupling, Site, Span
from llmprune.base.errors import RecipeError
from llmprune.mask.pattern import Channels, NofM, Pattern, Tiles


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites solved together: the readers of one tap, or the one site of a coupling.

    `tap` is where their evidence is collected; `coupling` is set where whole units go.
    """

    tap: str
    sites: tuple[Site, ...]
    coupling: Coupling | None = None


def is_skipped(linear: str, prefix: str, skip: Sequence[str]) -> bool:
    """Tell whether a glob names a linear, by its full name or relative to its block."""
    return any(fnmatchcase(name, glob) for glob in skip for name in (linear, prefix + linear))


def groups_of(
    pattern: Pattern, anatomy: Anatomy, *, block: int, prefix: str, skip: Sequence[str]
) -> tuple[Group, ...]:
    """Return the groups of one block under a pattern, in the order their taps are read.

    Raises:
        RecipeError: the pattern does not fit the block's linears.
    """
    if isinstance(pattern, Channels):
        return _coupled(pattern, anatomy, block=block, prefix=prefix, skip=skip)
    groups = []
    for tap in anatomy.taps:
        names = [name for name in tap.readers if not is_skipped(name, prefix, skip)]
        if names:
            sites = tuple(_weights(name, anatomy, block, prefix, pattern) for name in names)
            groups.append(Group(tap=tap.name, sites=sites))
    return tuple(groups)


def _weights(name: str, anatomy: Anatomy, block: int, prefix: str, pattern: Pattern) -> Site:
    """Return the site of all weights of one linear; its units are weights or tiles."""
    rows, columns = anatomy.linears[name].shape
    if isinstance(pattern, NofM) and columns % pattern.m:
        raise RecipeError(
            f"prune.pattern: {pattern.n}:{pattern.m} needs widths that {pattern.m} divides, but "
            f"{prefix}{name} reads {columns} columns. Choose another pattern, or leave it out with "
            f"--set 'prune.skip=[\"*{name}\"]'."
        )
    if isinstance(pattern, Tiles) and (rows % pattern.height or columns % pattern.width):
        shapes = [linear.shape for linear in anatomy.linears.values()]
        height = math.gcd(pattern.height, *(shape[0] for shape in shapes))
        width = math.gcd(pattern.width, *(shape[1] for shape in shapes))
        fits = f"{height}x{width}"
        hint = "other tiles" if fits == "1x1" else f"tiles that do, such as {fits}"
        raise RecipeError(
            f"prune.pattern: {pattern.height}x{pattern.width} tiles do not fill {prefix}{name}, "
            f"which has {rows} x {columns} weights. Choose {hint}, or leave the linear out with "
            f"--set 'prune.skip=[\"*{name}\"]'."
        )
    size = pattern.size if isinstance(pattern, Tiles) else 1
    return Site(
        name=prefix + name,
        block=block,
        spans=(Span(linear=name, axis="weight"),),
        num_units=rows * columns // size,
        unit_cost=size,
        shape=(rows, columns),
    )


def _coupled(
    pattern: Channels, anatomy: Anatomy, *, block: int, prefix: str, skip: Sequence[str]
) -> tuple[Group, ...]:
    """Return the group of a coupling, whose evidence is what its reader of units reads."""
    coupling = next((row for row in anatomy.couplings if row.name == pattern.coupling), None)
    if coupling is None:
        raise RecipeError(
            f"prune.pattern: this family has no {pattern.coupling!r} coupling in the family table, "
            "so its channels cannot be removed. Use pattern unstructured or N:M, or add a Coupling "
            "row."
        )
    if any(is_skipped(span.linear, prefix, skip) for span in coupling.spans):
        raise RecipeError(
            f"prune.skip leaves {prefix}* out, but a uniform result needs the same "
            f"{coupling.config_key} in every block. Skip only linears outside {pattern.coupling!r}."
        )
    reader = next(span.linear for span in coupling.spans if span.axis == "in")
    num_units = anatomy.linears[reader].shape[1]
    cost = 0
    for span in coupling.spans:
        rows, columns = anatomy.linears[span.linear].shape
        cost += columns if span.axis == "out" else rows
    site = Site(
        name=prefix + coupling.name,
        block=block,
        spans=coupling.spans,
        num_units=num_units,
        unit_cost=cost,
    )
    tap = next(tap.name for tap in anatomy.taps if reader in tap.readers)
    return (Group(tap=tap, sites=(site,), coupling=coupling),)


def all_sites(groups: Iterable[Sequence[Group]]) -> list[Site]:
    """Return the sites of all blocks in order."""
    return [site for block in groups for group in block for site in group.sites]
