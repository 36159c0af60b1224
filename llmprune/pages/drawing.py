"""What charts are drawn with: the figure around a drawing, words, marks, cells and legends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from llmprune.pages.axes import short
from llmprune.pages.document import together
from llmprune.pages.style import NUM_SERIES

WIDTH, HEIGHT = 480, 260
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4", "1 4")
MARKS = ("circle", "square", "diamond", "triangle")
CHAR = 7.2  # width of a character, about
NOTHING = Markup()


def framed_figure(
    title: str,
    drawing: Markup,
    *,
    legend: Markup = NOTHING,
    note: str = "",
    said: str | Mapping[str, Sequence[tuple[object, float | None]]],
    height: float = HEIGHT,
    width: float | None = None,
) -> Markup:
    """Return a drawing with title, legend and note; one of a fixed width keeps it and scrolls."""
    sentence = said if isinstance(said, str) else spoken(said)
    small = Markup("<small>{}</small>").format(note) if note else Markup()
    fixed = width is not None
    style = Markup(' class="fixed" width="{:.0f}" height="{:.0f}"').format(width or 0, height)
    return Markup(
        '<figure{}><figcaption>{}{}</figcaption>{}<div class="scroll"{}>'
        '<svg role="img" viewBox="0 0 {:.0f} {:.0f}"{} aria-label="{}">'
        "<desc>{}</desc>{}</svg></div></figure>"
    ).format(
        *(Markup(' class="wide"') if fixed else "", title, small, legend),
        Markup(' tabindex="0" role="region" aria-label="{}"').format(title) if fixed else "",
        *(
            width or WIDTH,
            height,
            style if fixed else "",
            f"{title}. {sentence}",
            sentence,
            drawing,
        ),
    )


def words(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>').format(
        x, y, anchor, Markup(' class="{}"').format(kind) if kind else "", text
    )


def mark(place: int, x: float, y: float, tooltip: str) -> Markup:
    """Return the mark of a series at a place of the drawing."""
    shapes = {
        "circle": "M{l} {y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "square": "M{l} {t}h7v7h-7z",
        "diamond": "M{x} {u}l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
        "triangle": "M{x} {u}l4.5 8h-9z",
    }
    where = {"x": x, "y": y, "l": x - 3.5, "t": y - 3.5, "u": y - 4.8}
    path = shapes[MARKS[place % len(MARKS)]].format(**{k: f"{v:.1f}" for k, v in where.items()})
    title = Markup("<title>{}</title>").format(tooltip) if tooltip else Markup()
    return Markup('<path class="s{}" d="{}" fill="var(--c,currentColor)">{}</path>').format(
        place % NUM_SERIES, path, title
    )


def shaded_cell(
    x: float, y: float, width: float, height: float, shade: float, label: str, tooltip: str
) -> Markup:
    """Return a cell of a heat map; an empty one has a dashed border."""
    dash = "" if label else Markup(' stroke-dasharray="3 3"')
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="var(--heat,currentColor)"'
        ' fill-opacity="{:.3f}" stroke="var(--line,currentColor)"{}><title>{}</title></rect>'
    ).format(x + 0.5, y + 0.5, width - 1, height - 1, shade, dash, tooltip)


def legend_of(series: Iterable[str], *, dashes: bool, boxes: bool = False) -> Markup:
    """Return the names of series with their signs; none where there is but one."""
    names = list(series)
    if len(names) < 2:
        return Markup()
    line = (
        '<path class="s{}" d="M0 6h28" stroke="var(--c,currentColor)" stroke-width="2" '
        'stroke-dasharray="{}"/>'
    )
    box = '<rect class="s{}" x="8" y="1" width="14" height="10" fill="var(--c,currentColor)"/>'
    items = []
    for place, name in enumerate(names):
        sign = Markup()
        if dashes:
            sign += Markup(line).format(place % NUM_SERIES, DASHES[place % len(DASHES)])
        if boxes:
            sign += Markup(box).format(place % NUM_SERIES)
        else:
            sign += mark(place, 14, 6, "")
        items.append(
            Markup('<li><svg viewBox="0 0 28 12" aria-hidden="true">{}</svg>{}</li>').format(
                sign, name
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(together(items))


def spoken(series: Mapping[str, Sequence[tuple[object, float | None]]]) -> str:
    """Return of each series how many values it has, and the least and largest."""
    parts = []
    for name, points in series.items():
        found = [float(y) for _, y in points if y is not None and math.isfinite(y)]
        span = f" from {short(min(found))} to {short(max(found))}" if found else ""
        parts.append(f"{name}: {len(found)} values{span}")
    return "; ".join(parts) + "."
