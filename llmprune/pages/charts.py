"""Charts from plain numbers as inline SVG: nothing is fetched or run, colours are the page's.

Every chart is a figure with its title, and for who does not see it a sentence of what it holds.
What is not a finite number is left out; a title of a mark, in a browser its tooltip, has its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

from markupsafe import Markup

from llmprune.pages.axes import Axis, axis_over, short
from llmprune.pages.document import together
from llmprune.pages.drawing import (
    CHAR,
    DASHES,
    HEIGHT,
    WIDTH,
    framed_figure,
    legend_of,
    mark,
    shaded_cell,
    words,
)
from llmprune.pages.style import NUM_SERIES

LEFT, RIGHT, TOP, BOTTOM = 68, 14, 12, 44

Points = Sequence[tuple[float, float]]


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    marks: bool = True,
    note: str = "",
) -> Markup:
    """Return named series of (x, y) as lines; `zero` begins the y axis at 0.

    A y that is not finite, or not above 0 on a logarithmic axis, interrupts its line.
    """
    x, y = _axes(series, log_x=log_x, log_y=log_y, zero=zero)
    drawn = []
    for place, points in enumerate(series.values()):
        for run in _runs(points, log_x=log_x, log_y=log_y):
            path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in run)
            drawn.append(
                Markup(
                    '<polyline class="s{}" points="{}" fill="none" stroke="var(--c,currentColor)" '
                    'stroke-width="2" stroke-dasharray="{}"/>'
                ).format(place % NUM_SERIES, path, DASHES[place % len(DASHES)])
            )
            if marks or len(run) == 1:
                drawn += [mark(place, x.place(a), y.place(b), "") for a, b in run]
    drawing = together([_frame(x, y, x_label, y_label), *drawn])
    return framed_figure(
        title, drawing, legend=legend_of(series, dashes=True), note=note, said=series
    )


def scatter(
    title: str,
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    names: Mapping[str, Sequence[str]] | None = None,
    note: str = "",
) -> Markup:
    """Return named series of (x, y) as marks; `names` has a tooltip for each point of a series."""
    x, y = _axes(series, log_x=log_x, log_y=log_y, zero=False)
    drawn = [
        mark(place, x.place(a), y.place(b), f"{said}: {short(a)}, {short(b)}")
        for place, (name, points) in enumerate(series.items())
        for said, (a, b) in zip((names or {}).get(name, [name] * len(points)), points, strict=True)
        if _drawable(a, log_x) and _drawable(b, log_y)
    ]
    drawing = together([_frame(x, y, x_label, y_label), *drawn])
    return framed_figure(
        title, drawing, legend=legend_of(series, dashes=False), note=note, said=series
    )


def bars(
    title: str,
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    x_label: str = "",
    text: Callable[[float], str] = short,
    note: str = "",
) -> Markup:
    """Return horizontal bars, below each name one per series; None has no bar.

    Values begin at 0 and are written at the end of their bars by `text`.
    """
    thick, gap = (18, 8) if len(series) == 1 else (14, 10)
    longest = max((len(name) for name in names), default=1)
    left = min(200, 14 + CHAR * longest)
    values = [value for row in series.values() for value in row if _drawable(value)]
    room = 10 + CHAR * max((len(text(value)) for value in values), default=0)
    x = axis_over(values, left, WIDTH - room, zero=True)
    height = TOP + len(names) * (thick * len(series) + gap) + (28 if x_label else 8)
    zero, drawn = x.place(0), []
    for i, name in enumerate(names):
        top = TOP + i * (thick * len(series) + gap)
        middle = top + thick * len(series) / 2
        drawn.append(words(left - 8, middle + 4, _cut_short(name, left), anchor="end"))
        for place, row in enumerate(series.values()):
            value = row[i]
            if not _drawable(value):
                continue
            end, y = x.place(value), top + place * thick
            drawn.append(
                Markup(
                    '<rect class="s{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" '
                    'fill="var(--c,currentColor)"/>'
                ).format(place % NUM_SERIES, min(zero, end), y, abs(end - zero), thick - 2)
            )
            drawn.append(words(max(zero, end) + 5, y + thick - 4, text(value)))
    if x_label:
        drawn.append(words((left + WIDTH - room) / 2, height - 10, x_label, "middle", "m"))
    said = {name: list(zip(names, row, strict=True)) for name, row in series.items()}
    legend = legend_of(series, dashes=False, boxes=True)
    return framed_figure(title, together(drawn), legend=legend, note=note, said=said, height=height)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    low: float | None = None,
    high: float | None = None,
    text: Callable[[float], str] = short,
    column_label: str = "",
    note: str = "",
) -> Markup:
    """Return a value per row and column as a shade between `low` and `high`; None stays empty.

    The numbers are written into the cells where these are few; every cell has its tooltip. A map of
    many columns keeps its size and scrolls.
    """
    found = [value for row in values for value in row if _drawable(value)]
    least = min(found, default=0.0) if low is None else low
    most = max(found, default=1.0) if high is None else high
    left = 14 + CHAR * max((len(name) for name in rows), default=1)
    written = len(columns) <= 16
    widest = max((len(text(value)) for value in found), default=1)
    cell = max(26.0, 10 + CHAR * widest) if written else 15.0
    tall, top = 26, 26
    width = left + cell * len(columns) + 8
    every = max(1, math.ceil(CHAR * (1 + max(map(len, columns), default=1)) / cell))
    drawn = []
    for j, column in enumerate(columns):
        if j % every == 0:
            drawn.append(words(left + cell * (j + 0.5), top - 8, column, "middle", "m"))
    for i, (row, line) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * i
        drawn.append(words(left - 8, y + tall / 2 + 4, row, "end"))
        for j, value in enumerate(line):
            where = left + cell * j, y, cell, tall
            label = text(value) if _drawable(value) else ""
            shade = _shade(value, least, most) if label else 0.0
            drawn.append(
                shaded_cell(*where, shade, label, f"{row}, {columns[j]}: {label or 'none'}")
            )
            if written and label:
                drawn.append(words(where[0] + cell / 2, y + tall / 2 + 4, label, "middle"))
    height = top + tall * len(rows) + (28 if column_label else 8)
    if column_label:
        drawn.append(words(left + cell * len(columns) / 2, height - 8, column_label, "middle", "m"))
    scale = f"{text(least)} is pale, {text(most)} is deep" if found else "no values"
    said = f"{len(rows)} rows, {len(columns)} columns; {scale}."
    return framed_figure(
        *(title, together(drawn)),
        note=". ".join(filter(None, (note.rstrip("."), scale[0].upper() + scale[1:]))) + ".",
        said=said,
        height=height,
        width=width,
    )


def _axes(
    series: Mapping[str, Points], *, log_x: bool, log_y: bool, zero: bool
) -> tuple[Axis, Axis]:
    points = [
        (a, b)
        for row in series.values()
        for a, b in row
        if _drawable(a, log_x) and _drawable(b, log_y)
    ]
    x = axis_over((a for a, _ in points), LEFT, WIDTH - RIGHT, log=log_x)
    return x, axis_over((b for _, b in points), HEIGHT - BOTTOM, TOP, log=log_y, zero=zero)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> Markup:
    """Return grid, marked numbers and names of two axes."""
    rule = '<path d="M{:.1f} {:.1f}{}{:.1f}" stroke="var(--line,currentColor)" fill="none"/>'
    parts = []
    for value in x.ticks():
        parts.append(Markup(rule).format(x.place(value), TOP, "V", HEIGHT - BOTTOM))
        parts.append(words(x.place(value), HEIGHT - BOTTOM + 16, short(value), "middle", "m"))
    for value in y.ticks():
        parts.append(Markup(rule).format(LEFT, y.place(value), "H", WIDTH - RIGHT))
        parts.append(words(LEFT - 6, y.place(value) + 4, short(value), "end", "m"))
    parts.append(words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "m"))
    turned = Markup('<g transform="translate(13 {:.0f}) rotate(-90)">{}</g>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return together([*parts, turned.format(middle, words(0, 0, y_label, "middle", "m"))])


def _shade(value: float | None, low: float, high: float) -> float:
    """Return how deep a cell is, from 0.06 to 1."""
    share = 1.0 if high <= low else (float(value or 0.0) - low) / (high - low)
    return 0.06 + 0.94 * min(max(share, 0.0), 1.0)


def _runs(points: Points, *, log_x: bool, log_y: bool) -> list[list[tuple[float, float]]]:
    """Return the stretches of a line that can be drawn."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if _drawable(a, log_x) and _drawable(b, log_y):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _drawable(value: float | None, log: bool = False) -> TypeGuard[float]:
    """Tell whether a value has a place on an axis."""
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _cut_short(name: str, room: float) -> str:
    """Return a name that fits into the room before the bars."""
    most = max(3, int((room - 12) / CHAR))
    return name if len(name) <= most else name[: most - 1] + "…"
