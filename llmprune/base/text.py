"""Text that lines up: tables of columns, runs of numbers, named lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ranges.

    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as aligned text; all but the first column and words are set to the right.

    >>> print(columns(("a", "n"), [("x", "1")]))
    a  n
    x  1
    """
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    number = [all(row[i][:1].isdigit() for row in table[1:]) for i in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, number, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def named_lines(lines: Sequence[tuple[str, str]]) -> str:
    """Return lines that begin with a name, aligned.

    >>> print(named_lines([("a", "1"), ("long", "2")]))
    a     1
    long  2
    """
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)
