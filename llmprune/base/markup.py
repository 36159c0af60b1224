"""Tables as HTML for notebooks: colours and fonts are the reader's, nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "padding:0.15em 0.8em 0.15em 0;vertical-align:top;background:none;color:inherit"
_LINE = "border-bottom:1px solid currentColor"
_TABLE = "border-collapse:collapse;color:inherit;margin:0.4em 0"


def html_facts(facts: Iterable[tuple[str, str]], *, caption: str = "") -> str:
    """Return names and what stands for them as a table of two columns.

    >>> html_facts([("model", "a < b")]).count("a &lt; b")
    1
    """
    rows = "".join(
        f'<tr style="background:none"><th scope="row" style="{_CELL};text-align:left">'
        f'{escape(name)}</th><td style="{_CELL};text-align:left">{escape(text)}</td></tr>'
        for name, text in facts
    )
    return f'<table style="{_TABLE}">{_caption(caption)}<tbody>{rows}</tbody></table>'


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """Return rows below a head; columns of numbers are set to the right."""
    table = [list(row) for row in rows]
    sides = [
        "right" if table and all(row[i][:1].isdigit() for row in table) else "left"
        for i in range(len(head))
    ]
    first = "".join(
        f'<th scope="col" style="{_CELL};{_LINE};text-align:{side}">{escape(name)}</th>'
        for name, side in zip(head, sides, strict=True)
    )
    body = "".join(
        '<tr style="background:none">'
        + "".join(
            f'<td style="{_CELL};text-align:{side}">{escape(cell)}</td>'
            for cell, side in zip(row, sides, strict=True)
        )
        + "</tr>"
        for row in table
    )
    return (
        f'<table style="{_TABLE}">{_caption(caption)}<thead><tr style="background:none">{first}'
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def html_folded(title: str, content: str) -> str:
    """Return content that is folded away below its title."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _caption(text: str) -> str:
    """Return a table's caption, if it has one."""
    if not text:
        return ""
    return f'<caption style="text-align:left;font-weight:bold">{escape(text)}</caption>'
