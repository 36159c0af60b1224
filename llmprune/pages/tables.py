"""Tables of a page: captions, numbers to the right, and a scroll of their own where they are wide.

Cells are text and escaped; a cell that is `Markup` (a link, for one) is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from llmprune.pages.document import together

_NUMBER = re.compile(r"[-+−±]?[\d.,]+(e[-+]?\d+)?( ?%| ?[KMGT]?i?B| ?ms| ?s| x)?( ± [\d.]+)?")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Markup:
    """Return rows below a head; the first cell of a row is its heading.

    A column whose filled cells are all numbers is set to the right.

    >>> "n" in table(("block", "error"), [("0", "0.25")], caption="Errors")
    True
    """
    body = [list(row) for row in rows]
    right = [_is_numeric([row[i] for row in body]) for i in range(len(head))]
    first = _row(head, right, heading="col", all_headings=True)
    lines = together(_row(row, right, heading="row") for row in body)
    return _framed(
        Markup("<table>{}<thead>{}</thead><tbody>{}</tbody></table>").format(
            _caption(caption), first, lines
        ),
        caption,
    )


def facts(pairs: Iterable[tuple[str, str]], *, caption: str = "") -> Markup:
    """Return names and what stands for them as a table of two columns.

    >>> facts([("model", "a < b")]).count("a &lt; b")
    1
    """
    lines = together(
        Markup('<tr><th scope="row">{}</th><td>{}</td></tr>').format(name, text)
        for name, text in pairs
    )
    return _framed(
        Markup('<table class="facts">{}<tbody>{}</tbody></table>').format(_caption(caption), lines),
        caption,
    )


def _row(
    cells: Sequence[str], right: Sequence[bool], *, heading: str, all_headings: bool = False
) -> Markup:
    """Return a row whose first cell, or all of them, are headings."""
    found = []
    for place, (cell, is_right) in enumerate(zip(cells, right, strict=True)):
        kind = Markup(' class="n"') if is_right else Markup()
        if all_headings or place == 0:
            found.append(Markup('<th scope="{}"{}>{}</th>').format(heading, kind, cell))
        else:
            found.append(Markup("<td{}>{}</td>").format(kind, cell))
    return Markup("<tr>{}</tr>").format(together(found))


def _framed(content: Markup, caption: str) -> Markup:
    """Return a table in a frame that scrolls, by keyboard too."""
    return Markup('<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>').format(
        caption or "Table", content
    )


def _caption(text: str) -> Markup:
    return Markup("<caption>{}</caption>").format(text) if text else Markup()


def _is_numeric(cells: Sequence[str]) -> bool:
    """Tell whether all filled cells of a column begin and end as numbers, some with a unit."""
    filled = [str(cell) for cell in cells if cell]
    return bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)
