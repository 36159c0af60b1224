"""What a model looks like to llmprune: blocks by kind, taps, couplings, experts, what stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmprune.arch.anatomy import EXPERT, Anatomy, is_router, left_out, split_index
from llmprune.arch.types import Coupling, Family, Linear, Span, Tap
from llmprune.base.progress import human_count
from llmprune.base.text import columns, named_lines, ranges
from llmprune.engine.shapes import Anatomies


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Blocks that have the same linears, taps and parameters."""

    blocks: tuple[int, ...]
    anatomy: Anatomy = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def experts(self) -> int:
        """Return the number of experts that a router of the blocks chooses from."""
        if not any(is_router(param, self.shapes) for param in self.shapes):
            return 0
        stacked = (
            name
            for name, linear in self.anatomy.linears.items()
            if linear.expert is not None or EXPERT.search(name)
        )
        return len({split_index(name)[1] for name in stacked})

    def folded(self, name: str) -> str:
        """Return a name with the index in a stack replaced by those of the whole stack."""
        stacked, index = split_index(name)
        if index is None:
            return name
        taps = (tap.name for tap in self.anatomy.taps)
        known = map(split_index, (*self.anatomy.linears, *taps, *self.shapes))
        indices = {other for template, other in known if template == stacked and other is not None}
        return stacked.replace("*", f"{{{ranges(sorted(indices))}}}")

    @property
    def eligible(self) -> int:
        """Return the weights of the linears of one block."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.anatomy.linears.values())


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection:
    """The anatomy of a model; its repr is what `llmprune inspect` prints."""

    source: str
    family: str
    blocks: str
    kinds: tuple[Kind, ...]
    trunk: Mapping[str, tuple[int, ...]]

    @property
    def num_params(self) -> int:
        """Return the parameters of the model."""
        blocks = sum(_count(kind.shapes.values()) * len(kind.blocks) for kind in self.kinds)
        return blocks + _count(self.trunk.values())

    @property
    def eligible(self) -> int:
        """Return the weights that may be pruned: linears in blocks, less routers."""
        return sum(kind.eligible * len(kind.blocks) for kind in self.kinds)

    def __repr__(self) -> str:
        share = self.eligible / self.num_params
        num_blocks = sum(len(kind.blocks) for kind in self.kinds)
        head = named_lines(
            [
                ("model", f"{self.source}: {human_count(self.num_params)} parameters"),
                ("family", self.family),
                ("blocks", f"{num_blocks} at {self.blocks}"),
                ("eligible", f"{self.eligible:,} weights, {share:.1%} of all parameters"),
            ]
        )
        return "\n\n".join([head, *map(_kind_text, self.kinds), _trunk_text(self.trunk)])

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {
            "source": self.source,
            "family": self.family,
            "blocks": self.blocks,
            "parameters": self.num_params,
            "eligible": self.eligible,
            "kinds": [_kind_data(kind) for kind in self.kinds],
            "trunk": {name: list(shape) for name, shape in self.trunk.items()},
        }


def inspection_of(model: Anatomies, *, source: str, family: Family) -> Inspection:
    """Return the inspection of a model by shape."""
    kinds: dict[str, list[int]] = {}
    for index, anatomy in enumerate(model.blocks):
        key = repr((anatomy.taps, anatomy.couplings, sorted(model.shapes[index].items())))
        kinds.setdefault(key, []).append(index)
    found = "a row of the family table" if family.seen is None else "probed: no row in the table"
    return Inspection(
        source=source,
        family=f"{model.model_type}, {found}",
        blocks=family.blocks,
        kinds=tuple(
            Kind(blocks=tuple(same), anatomy=model.blocks[same[0]], shapes=model.shapes[same[0]])
            for same in kinds.values()
        ),
        trunk=model.trunk,
    )


def _kind_text(kind: Kind) -> str:
    """Return the taps, couplings and the rest of blocks of one kind."""
    word = "block" if len(kind.blocks) == 1 else "blocks"
    experts = f", {kind.experts} experts" if kind.experts else ""
    title = f"{word} {ranges(kind.blocks)}: {kind.eligible:,} eligible weights each{experts}"
    parts = [title, columns(("tap", "linear", "shape (O, I)", "weights"), _tap_rows(kind))]
    if kind.anatomy.couplings:
        rows = _coupling_rows(kind)
        parts.append(columns(("coupling", "units", "moves together", "config key"), rows))
    parts.append(columns(("not eligible", "parameters", "why"), _left_rows(kind)))
    return "\n\n".join([f"{title}\n{parts[1]}", *parts[2:]])


def _tap_rows(kind: Kind) -> list[tuple[str, ...]]:
    """Return a line per linear, those of a stack (all experts) as one."""
    rows: dict[str, tuple[str, Linear, int]] = {}
    for tap in kind.anatomy.taps:
        for name in tap.readers:
            linear = kind.anatomy.linears[name]
            key, _ = split_index(name)
            first, shown, before = rows.get(key, (tap.name, linear, 0))
            rows[key] = (first, shown, before + linear.shape[0] * linear.shape[1])
    return [
        (
            kind.folded(tap_name),
            kind.folded(linear.name),
            f"{linear.shape[0]} x {linear.shape[1]}{_stored(linear)}",
            f"{weights:,}",
        )
        for tap_name, linear, weights in rows.values()
    ]


def _stored(linear: Linear) -> str:
    """Say how a linear lies in its parameter where that is not plainly."""
    how = [
        "transposed" if linear.transposed else "",
        f"part {linear.part + 1} of {linear.num_parts}" if linear.num_parts > 1 else "",
        "interleaved" if linear.interleaved else "",
    ]
    found = ", ".join(filter(None, how))
    return f" ({found})" if found else ""


def _coupling_rows(kind: Kind) -> list[tuple[str, ...]]:
    """Return a line per kind of unit: how many there are, what moves together, what counts them."""
    kinds: dict[str, list[Coupling]] = {}
    for row in kind.anatomy.couplings:
        kinds.setdefault(row.kind, []).append(row)
    return [
        (
            name,
            f"{sum(row.num_units for row in rows):,}",
            ", ".join(dict.fromkeys(_moved(kind, span) for row in rows for span in row.spans)),
            ", ".join(dict.fromkeys(key for row in rows for key, _ in row.config_keys if key)),
        )
        for name, rows in kinds.items()
    ]


def _moved(kind: Kind, span: Span) -> str:
    """Return the part of a linear that a unit owns."""
    part = {"out": " rows", "in": " columns"}.get(span.axis, "")
    return kind.folded(span.linear) + part


def _left_rows(kind: Kind) -> list[tuple[str, ...]]:
    """Return what is not eligible, with vectors as one line."""
    rest = left_out(kind.anatomy, kind.shapes)
    rows: dict[str, tuple[str, int, str]] = {}
    for param, why in rest.items():
        label = "norms, biases, scales" if why.startswith("norm") else kind.folded(param)
        _, before, _ = rows.get(label, ("", 0, ""))
        rows[label] = (label, before + _count([kind.shapes[param]]), why)
    return [(label, f"{size:,}", why) for label, size, why in rows.values()]


def _trunk_text(trunk: Mapping[str, tuple[int, ...]]) -> str:
    """Return what lies outside the blocks."""
    rows = [
        (name, f"{_count([shape]):,}", "outside the blocks: stays as it is")
        for name, shape in trunk.items()
    ]
    return columns(("not eligible", "parameters", "why"), rows)


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the number of values in tensors of these shapes."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total


def _kind_data(kind: Kind) -> dict[str, Any]:
    """Return blocks of one kind as plain data."""

    def tap(row: Tap) -> dict[str, Any]:
        return {"name": row.name, "readers": list(row.readers)}

    return {
        "blocks": list(kind.blocks),
        "experts": kind.experts,
        "eligible": kind.eligible,
        "taps": [tap(row) for row in kind.anatomy.taps],
        "linears": {name: list(row.shape) for name, row in kind.anatomy.linears.items()},
        "couplings": list(dict.fromkeys(row.kind for row in kind.anatomy.couplings)),
        "not_eligible": left_out(kind.anatomy, kind.shapes),
    }
