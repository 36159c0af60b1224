"""The linears and taps of one block, derived from its family's row and its parameters' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmprune.arch.table import FAMILIES
from llmprune.arch.types import Coupling, Family, Linear, Tap, Unfuse
from llmprune.base.errors import UnsupportedModel

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What one block holds: its linears by name, its taps, and the couplings that apply."""

    linears: Mapping[str, Linear]
    taps: tuple[Tap, ...]
    couplings: tuple[Coupling, ...]


def family_of(model_type: str) -> Family:
    """Return the row of a model type.

    Raises:
        UnsupportedModel: no row names this type.

    >>> family_of("llama").blocks
    'model.layers'
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise UnsupportedModel(
        f"model type {model_type!r} has no row in the family table. Supported: {known}. "
        "Add a Family row with its taps to llmprune/arch/table.py."
    )


def anatomy_of(family: Family, shapes: Shapes) -> Anatomy:
    """Return linears, taps and couplings of a block whose parameters have these shapes.

    Raises:
        UnsupportedModel: a linear that the family's row names is not in the block.
    """
    fused = {row.param: row for row in family.unfuse}
    linears: dict[str, Linear] = {}
    for param, shape in shapes.items():
        row = fused.get(param)
        if row is not None:
            linears.update(_split(row, shape))
        elif param.endswith(".weight") and len(shape) == 2:
            name = param.removesuffix(".weight")
            linears[name] = Linear(name=name, param=param, shape=(shape[0], shape[1]))
    num_experts = max(
        (shapes[p][0] for p, row in fused.items() if row.stacked and p in shapes), default=0
    )
    taps = tuple(_expand(family.taps, num_experts))
    read = {name for tap in taps for name in tap.readers}
    if missing := sorted(read - linears.keys()):
        raise UnsupportedModel(
            f"a block of family {family.model_types[0]!r} has no linear {missing[0]!r} "
            f"(it has {', '.join(sorted(linears)) or 'none'}); the checkpoint's architecture "
            "differs from the row in llmprune/arch/table.py: add a row that names its taps."
        )
    return Anatomy(
        linears={name: linear for name, linear in linears.items() if name in read},
        taps=taps,
        couplings=family.couplings,
    )


def _split(row: Unfuse, shape: tuple[int, ...]) -> dict[str, Linear]:
    """Return the linears inside one fused or stacked parameter."""
    rows, columns = (shape[-1], shape[-2]) if row.transposed else (shape[-2], shape[-1])
    found = {}
    for expert in range(shape[0]) if row.stacked else (None,):
        for part, template in enumerate(row.parts):
            name = template.format(expert=expert)
            found[name] = Linear(
                name=name,
                param=row.param,
                shape=(rows // len(row.parts), columns),
                expert=expert,
                part=part,
                num_parts=len(row.parts),
                transposed=row.transposed,
            )
    return found


def _expand(taps: tuple[Tap, ...], num_experts: int) -> list[Tap]:
    """Return the taps with one copy per expert where a name asks for it."""
    found = []
    for tap in taps:
        for expert in range(num_experts) if "{expert}" in tap.name else (0,):
            readers = tuple(name.format(expert=expert) for name in tap.readers)
            found.append(Tap(name=tap.name.format(expert=expert), readers=readers))
    return found
