"""Which linears are decided together, and which groups of them a solver sees at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.couplings import BLOCK, CHANNELS, EXPERT_CHANNELS
from llmprune.arch.types import Coupling, Site, Span
from llmprune.base.errors import RecipeError
from llmprune.mask.pattern import NofM, Pattern, Tiles, Units

if TYPE_CHECKING:
    from llmprune.engine.shapes import Anatomies


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites solved together: the readers of one tap, or the one site of a coupling.

    `tap` is where their evidence is collected, "" where nothing is learnt of a unit; `coupling` is
    set where whole units go, and `around` are then the taps of all its linears.
    """

    tap: str
    sites: tuple[Site, ...]
    coupling: Coupling | None = None
    around: tuple[str, ...] = ()


def is_skipped(linear: str, prefix: str, skip: Sequence[str]) -> bool:
    """Tell whether a glob names a linear, by its full name or relative to its block."""
    return any(fnmatchcase(name, glob) for glob in skip for name in (linear, prefix + linear))


def groups_of(
    pattern: Pattern,
    anatomy: Anatomy,
    *,
    block: int,
    prefix: str,
    skip: Sequence[str],
    with_them: Sequence[str] = (),
) -> tuple[Group, ...]:
    """Return the groups of one block under a pattern, in the order their taps are read.

    `with_them` are kinds of unit that go along with those of the pattern.

    Raises:
        RecipeError: the pattern does not fit the block's linears.
    """
    if isinstance(pattern, Units):
        kinds = {*pattern.kinds, *with_them}
        rows = [row for row in anatomy.couplings if row.kind in kinds]
        return tuple(_coupled(row, anatomy, block=block, prefix=prefix, skip=skip) for row in rows)
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
    coupling: Coupling, anatomy: Anatomy, *, block: int, prefix: str, skip: Sequence[str]
) -> Group:
    """Return the group of a coupling, whose evidence is what its reader of units reads."""
    for span in coupling.spans:
        if is_skipped(span.linear, prefix, skip):
            raise RecipeError(
                f"prune.skip leaves {prefix}{span.linear} out, but it is part of the units of "
                f"{coupling.name!r}, which go whole. Skip linears that no unit has a part of, or "
                "choose another --pattern."
            )
    own = sum(span_cost(span, anatomy) for span in coupling.spans if span.axis != "all")
    whole = sum(span_cost(span, anatomy) for span in coupling.spans if span.axis == "all")
    channels = coupling.kind in (CHANNELS, EXPERT_CHANNELS)
    site = Site(
        name=prefix + coupling.name,
        block=block,
        spans=coupling.spans,
        num_units=coupling.num_units,
        unit_cost=own + whole // coupling.num_units,
        kind=coupling.kind,
        num_groups=coupling.num_groups,
        grid=math.lcm(coupling.grid, coupling.num_groups),
        least=coupling.least,
        entry=coupling.config_keys[0][0] if channels and coupling.config_keys else "",
    )
    around = dict.fromkeys(anatomy.tap_of(span.linear).name for span in coupling.spans)
    tap = "" if coupling.reader is None else anatomy.tap_of(coupling.reader).name
    return Group(tap=tap, sites=(site,), coupling=coupling, around=tuple(around))


def span_cost(span: Span, anatomy: Anatomy) -> int:
    """Return the weights that one unit owns of a linear."""
    rows, columns = anatomy.linears[span.linear].shape
    if span.axis == "all":
        return rows * columns
    return span.width * (columns if span.axis == "out" else rows)


def kinds_with_them(pattern: Pattern, anatomies: Anatomies) -> tuple[str, ...]:
    """Return the kinds of unit that go along with those of a pattern.

    Where one entry of the config counts the channels of experts and of dense halves, as in a Jamba,
    all are as wide.
    """
    if not isinstance(pattern, Units):
        return ()
    entries: dict[str, set[str]] = {}
    for row in (row for block in anatomies.blocks for row in block.couplings):
        if row.kind in (CHANNELS, EXPERT_CHANNELS):
            entries.setdefault(row.kind, set()).update(key for key, _ in row.config_keys)
    kinds = {kind for kind in entries if kind in pattern.kinds}
    asked = {key for kind in kinds for key in entries[kind]}
    return tuple(kind for kind in entries if kind not in kinds and entries[kind] & asked)


def check_units(pattern: Pattern, groups: Sequence[Sequence[Group]], anatomies: Anatomies) -> None:
    """Check that the model has units of every kind that a pattern names.

    Raises:
        RecipeError: it has not; says why, and which kinds it has.
    """
    if not isinstance(pattern, Units):
        return
    there = {site.kind for site in all_sites(groups)}
    for kind in pattern.kinds:
        if kind not in there:
            blocks = anatomies.blocks
            kinds = dict.fromkeys(row.kind for b in blocks for row in b.couplings)
            has = ["blocks" if each == BLOCK else each for each in kinds]
            why = next((block.lacks[kind] for block in blocks if kind in block.lacks), None)
            because = f": {why}" if why else "; the table of families knows of none"
            raise RecipeError(
                f"prune.pattern: this {anatomies.model_type} model has no {kind} to "
                f"remove{because}. It has: {', '.join(has)}. Choose among them, or --pattern "
                "unstructured."
            )


def linears_of(groups: Iterable[Group]) -> list[str]:
    """Return the linears of a block that its sites have a part of, each once."""
    sites = [site for group in groups for site in group.sites]
    return list(dict.fromkeys(span.linear for site in sites for span in site.spans))


def all_sites(groups: Iterable[Sequence[Group]]) -> list[Site]:
    """Return the sites of all blocks in order."""
    return [site for block in groups for group in block for site in group.sites]
