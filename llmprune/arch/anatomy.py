"""The linears and taps of one block, derived from its family's row and its parameters' shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune.arch.couplings import couplings_of
from llmprune.arch.experts import expert_couplings
from llmprune.arch.types import Coupling, Family, Linear, Tap, Unfuse
from llmprune.base.errors import UnsupportedModel

ROUTERS = re.compile(r"(^|\.)(gate|wg|gate_network|shared_expert_gate|\w*router\w*)(\.|$)")
EXPERT = re.compile(r"\bexperts\.\d+(?=\.|$)")
INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What one block holds: its linears by name, its taps, and the couplings that apply.

    `lacks` says why it has not the units of some couplings.
    """

    linears: Mapping[str, Linear]
    taps: tuple[Tap, ...]
    couplings: tuple[Coupling, ...]
    lacks: Mapping[str, str] = field(default_factory=dict)

    def coupling(self, name: str) -> Coupling | None:
        """Return the coupling of a kind of unit, if the block has such units."""
        return next((row for row in self.couplings if row.name == name), None)

    def tap_of(self, linear: str) -> Tap:
        """Return the tap that a linear reads."""
        return next(tap for tap in self.taps if linear in tap.readers)


def anatomy_of(family: Family, shapes: Shapes) -> Anatomy:
    """Return linears, taps and couplings of a block whose parameters have these shapes.

    A block has those of its family's taps, readers and couplings whose linears it holds: blocks of
    one model may differ in kind.

    Raises:
        UnsupportedModel: it holds none of them.
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
    taps = tuple(_present(family.taps, linears))
    read = {name for tap in taps for name in tap.readers}
    if not read:
        wanted = ", ".join(name for tap in family.taps for name in tap.readers)
        raise UnsupportedModel(
            f"a block of family {family.model_types[0]!r} has none of the linears {wanted} "
            f"(it has {', '.join(sorted(linears)) or 'none'}); the checkpoint's architecture "
            "differs from the row in llmprune/arch/table.py: add a row that names its taps."
        )
    linears = {name: linear for name, linear in linears.items() if name in read}
    couplings, lacks = couplings_of(family, linears, shapes)
    routers = [name for name in shapes if is_router(name, shapes)]
    experts, more = expert_couplings(family.mixture, linears, shapes, routers)
    return Anatomy(
        linears=linears, taps=taps, couplings=(*couplings, *experts), lacks={**lacks, **more}
    )


def split_index(name: str) -> tuple[str, int | None]:
    """Return the name of a linear or tap with the index in a stack starred, and the index.

    >>> split_index("mlp.experts.7.up_proj"), split_index("ffn.2")
    (('mlp.experts.*.up_proj', 7), ('ffn.2', None))
    """
    match = INDEX.search(name)
    return (name, None) if match is None else (INDEX.sub("*", name, count=1), int(match[0]))


def left_out(anatomy: Anatomy, shapes: Shapes) -> dict[str, str]:
    """Return the parameters of a block that are no part of a linear, with what they are."""
    inside = {linear.param for linear in anatomy.linears.values()}
    return {
        param: _what_else(param, shape, shapes)
        for param, shape in shapes.items()
        if param not in inside
    }


def is_router(param: str, shapes: Shapes) -> bool:
    """Tell whether a parameter of a block chooses experts.

    Most are known by their names. What is called a gate is one only beside experts; in attention it
    is a linear like others.

    >>> is_router("attn.gate.weight", {"attn.gate.weight": (64, 64), "mlp.experts.w1": (8, 4, 64)})
    False
    """
    match = ROUTERS.search(param)
    if match is None or match[2] not in ("gate", "wg"):
        return match is not None
    owner = param[: match.start(2)]
    beside = {name: shape for name, shape in shapes.items() if name.startswith(owner)}
    return any(
        "expert" in name.removeprefix(owner) or (len(shape) == 3 and "conv" not in name)
        for name, shape in beside.items()
    )


def _what_else(param: str, shape: tuple[int, ...], shapes: Shapes) -> str:
    """Say why a parameter is not eligible."""
    if len(shape) < 2 or param.endswith("bias"):
        return "norm, bias or scale"
    if is_router(param, shapes):
        return "router"
    if len(shape) > 2 and "conv" in param:
        return "convolution"
    return "no product with it is watched"


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
                interleaved=row.interleaved,
            )
    return found


def _present(taps: tuple[Tap, ...], linears: Mapping[str, Linear]) -> list[Tap]:
    """Return the taps whose readers are there, one copy per expert where a name asks for it."""
    found = []
    for tap in taps:
        for expert in _experts(tap, linears):
            readers = tuple(name.format(expert=expert) for name in tap.readers)
            if present := tuple(name for name in readers if name in linears):
                found.append(Tap(name=tap.name.format(expert=expert), readers=present))
    return found


def _experts(tap: Tap, linears: Mapping[str, Linear]) -> list[int]:
    """Return the experts that a tap's readers exist for; one number for a tap without experts."""
    if "{expert}" not in tap.name:
        return [0]
    forms = [re.escape(name).replace(r"\{expert\}", r"(\d+)") for name in tap.readers]
    matches = (re.fullmatch(form, name) for form in forms for name in linears)
    return sorted({int(match[1]) for match in matches if match})
