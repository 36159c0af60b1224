"""What masks have cut off: rows and columns without a weight, and units without a path.

A row (an output) without a weight and without a bias gives 0, a column (an input) without a weight
is not read. A channel of a feed-forward half carries something if all rows that write it are alive
(gate and up are multiplied) and the column that reads it is; a value of attention, if its row is
and a column that reads it in one of the group's heads.

Legend: O outputs, I inputs, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.analysis.types import Chart, Finding, Row, by_block
from llmprune.arch.couplings import CHANNELS, EXPERT_CHANNELS, HEADS
from llmprune.arch.types import Coupling
from llmprune.walk.block import Block

NAME, TITLE = "dead", "What the masks cut off"
VALUES = "values"
Alive = Callable[[str], tuple[Tensor, Tensor]]  # linear -> rows_O and columns_I that are alive


class Reach(NamedTuple):
    """Units of one kind in a block: how many nothing writes, nothing reads, or either."""

    block: int
    kind: str
    num_units: int
    num_unwritten: int
    num_unread: int
    num_dead: int


class Dead(NamedTuple):
    """Rows and columns of one linear without a weight that is kept."""

    block: int
    linear: str
    num_rows: int
    dead_rows: int
    num_columns: int
    dead_columns: int


def reach_of(block: Block, masks: Mapping[str, Tensor]) -> tuple[list[Dead], list[Reach]]:
    """Return what is dead in a block; `masks` keep_OI by linear, else what is not zero is kept."""
    lives: dict[str, tuple[Tensor, Tensor]] = {}
    dead = []
    for linear in block.anatomy.linears:
        keep_OI = masks[linear] if linear in masks else block.weight(linear) != 0
        keep_OI = keep_OI.cpu()
        rows_O, columns_I = keep_OI.any(dim=1), keep_OI.any(dim=0)
        dead.append(
            Dead(
                *(block.index, linear, len(rows_O), int((~rows_O).sum())),
                *(len(columns_I), int((~columns_I).sum())),
            )
        )
        bias_O = bias_of(block, linear)
        lives[linear] = (rows_O if bias_O is None else rows_O | (bias_O.cpu() != 0)), columns_I
    found = [paths(coupling, lives.__getitem__) for coupling in block.anatomy.couplings]
    return dead, [Reach(block.index, *row) for row in _joined(row for row in found if row)]


def paths(coupling: Coupling, alive: Alive) -> tuple[str, int, int, int, int] | None:
    """Return (kind, units, unwritten, unread, dead) of channels or values; None for other kinds.

    >>> from llmprune.arch.types import Span
    >>> ffn = Coupling(name="ffn-channels", num_units=3, spans=(
    ...     Span(linear="gate", axis="out"), Span(linear="up", axis="out"),
    ...     Span(linear="down", axis="in")))
    >>> on = torch.tensor
    >>> lives = {"gate": (on([True, False, True]), on([True])),
    ...     "up": (on([True, True, True]), on([True])),
    ...     "down": (on([True]), on([True, True, False]))}
    >>> paths(ffn, lives.__getitem__)
    ('ffn-channels', 3, 1, 1, 2)
    """
    if coupling.kind in (CHANNELS, EXPERT_CHANNELS):
        written_U, read_U = _channels(coupling, alive)
        kind = CHANNELS if coupling.kind == CHANNELS else EXPERT_CHANNELS
    elif coupling.kind == HEADS:
        written_U, read_U = _values(coupling, alive)
        kind = VALUES
    else:
        return None
    dead = int((~(written_U & read_U)).sum())
    return kind, len(written_U), int((~written_U).sum()), int((~read_U).sum()), dead


def _channels(coupling: Coupling, alive: Alive) -> tuple[Tensor, Tensor]:
    """Return which channels are written by all that must, and which are read."""
    num = coupling.num_units
    written_U = torch.ones(num, dtype=torch.bool)
    read_U = torch.zeros(num, dtype=torch.bool)
    for span in coupling.spans:
        rows_O, columns_I = alive(span.linear)
        if span.axis == "out":
            written_U &= rows_O[span.offset : span.offset + num]
        elif span.axis == "in":
            read_U |= columns_I[span.offset : span.offset + num]
    return written_U, read_U


def _values(coupling: Coupling, alive: Alive) -> tuple[Tensor, Tensor]:
    """Return which values, of all key/value heads in order, are written and which are read.

    Values lie in the third span, or behind queries and keys of every group of a single one.
    """
    writers = [span for span in coupling.spans if span.axis == "out"]
    reader = next(span for span in coupling.spans if span.axis == "in")
    num = coupling.num_units
    if len(writers) == 3:
        d, start, stride = writers[2].width, writers[2].offset, writers[2].width
        owner = writers[2].linear
    else:
        d = (writers[0].width - reader.width) // 2
        start, stride = writers[0].offset + reader.width + d, writers[0].width
        owner = writers[0].linear
    rows_O = alive(owner)[0]
    written_U = torch.cat([rows_O[start + u * stride : start + u * stride + d] for u in range(num)])
    columns_I = alive(reader.linear)[1][reader.offset : reader.offset + num * reader.width]
    read_U = columns_I.view(num, -1, d).any(dim=1).flatten()
    return written_U, read_U


def bias_of(block: Block, linear: str) -> Tensor | None:
    """Return the bias (O,) of a linear, its part of a fused one; None where it has none."""
    place = block.anatomy.linears[linear]
    found = next(iter(block.biases_of([linear]).values()), None)
    if found is None:
        return None
    bias = found if place.expert is None else found[place.expert]
    if place.interleaved:
        return bias[place.part :: place.num_parts]
    num = len(bias) // place.num_parts
    return bias[place.part * num : (place.part + 1) * num]


def reach_finding(dead: Sequence[Dead], reach: Sequence[Reach]) -> Finding:
    """Return the tables of linears and of units, one below the other, in one."""
    rows: list[Row] = [
        (each.block, each.kind, each.num_units, each.num_unwritten, each.num_unread, each.num_dead)
        for each in reach
    ]
    rows += [
        (each.block, each.linear, each.num_rows, each.dead_rows, each.dead_columns, None)
        for each in dead
    ]
    rows.sort(key=lambda row: int(row[0] or 0))
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(dead, reach),
        columns=("block", "what", "rows or units", "dead rows", "dead columns", "without a path"),
        rows=tuple(rows),
        charts=_charts(reach),
        numbers={
            "dead rows": sum(each.dead_rows for each in dead),
            "dead columns": sum(each.dead_columns for each in dead),
            **{
                f"dead {kind}": sum(r.num_dead for r in reach if r.kind == kind)
                for kind in sorted({each.kind for each in reach})
            },
        },
    )


def _means(dead: Sequence[Dead], reach: Sequence[Reach]) -> tuple[str, ...]:
    rows, columns = sum(each.dead_rows for each in dead), sum(each.dead_columns for each in dead)
    says = []
    for kind in sorted({each.kind for each in reach}):
        mine = [each for each in reach if each.kind == kind]
        num, lost = sum(each.num_units for each in mine), sum(each.num_dead for each in mine)
        if not lost:
            says.append(f"All {num} {_plural(kind)} still carry something.")
            continue
        worst = max(mine, key=lambda each: each.num_dead / max(1, each.num_units))
        advice = (
            " They take memory and time and give nothing: --pattern ffn-channels can remove such "
            "at no cost in quality."
            if kind == CHANNELS
            else ""
        )
        says.append(
            f"{lost} of {num} {_plural(kind)} ({lost / num:.1%}) carry nothing any more, most in "
            f"block {worst.block} ({worst.num_dead} of {worst.num_units}).{advice}"
        )
    if rows or columns:
        says.append(f"{rows} rows and {columns} columns of linears have no weight left.")
    else:
        says.append("No row and no column of a linear is without a weight.")
    return tuple(says)


def _plural(kind: str) -> str:
    words = {CHANNELS: "FFN channels", EXPERT_CHANNELS: "channels of experts"}
    return words.get(kind, "values of attention heads")


def _charts(reach: Sequence[Reach]) -> tuple[Chart, ...]:
    series = {}
    for kind in sorted({each.kind for each in reach}):
        rows: list[Row] = [
            (each.block, each.num_dead / max(1, each.num_units))
            for each in reach
            if each.kind == kind
        ]
        series[_plural(kind)] = by_block(rows, {kind: 1})[kind]
    if not series:
        return ()
    return (
        Chart(
            kind="lines",
            title="Share of units without a path",
            series=series,
            x_label="block",
            y_label="share",
        ),
    )


def _joined(rows: object) -> list[tuple[str, int, int, int, int]]:
    """Return the counts of each kind, those of all experts of a block in one."""
    found: dict[str, list[int]] = {}
    for kind, *counts in rows:  # type: ignore[attr-defined]
        total = found.setdefault(kind, [0, 0, 0, 0])
        for place, count in enumerate(counts):
            total[place] += count
    return [(kind, a, b, c, d) for kind, (a, b, c, d) in found.items()]
