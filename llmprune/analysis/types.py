"""What an analysis found: a table, a picture of it, and what it says to a person.

Cells are numbers, words, or None where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Cell = str | float | int | None
Row = tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture of numbers; x is a number, or the place of a name in `names`.

    `bars` has one bar per name and series, `lines` joins the points of a series, and `heat` shows a
    shade per series (a row) and name (a column).
    """

    kind: Literal["bars", "lines", "heat"]
    title: str
    series: Mapping[str, Sequence[tuple[float, float | None]]]
    x_label: str
    y_label: str
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one analysis found; without rows it says in `means` why there is nothing to see.

    `means` are sentences for a person, made from the numbers. `columns` name the cells of `rows`,
    and `numbers` are those that sum the table up.
    """

    name: str
    title: str
    means: tuple[str, ...]
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    charts: tuple[Chart, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Tell whether it could not be looked at."""
        return not self.rows

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {
            "title": self.title,
            "means": list(self.means),
            "columns": list(self.columns),
            "rows": [list(row) for row in self.rows],
            "numbers": dict(self.numbers),
            "charts": [asdict(chart) for chart in self.charts],
        }


def finding_from(name: str, data: Mapping[str, Any]) -> Finding:
    """Return the finding of what `to_dict` gave; one that was written before charts were has none.

    >>> finding_from("pq", {"title": "PQ", "means": [], "columns": ["a"], "rows": [[1]]}).rows
    ((1,),)
    """
    return Finding(
        name=name,
        title=data["title"],
        means=tuple(data["means"]),
        columns=tuple(data["columns"]),
        rows=tuple(tuple(row) for row in data["rows"]),
        charts=tuple(Chart(**chart) for chart in data.get("charts", ())),
        numbers=data.get("numbers", {}),
    )


def absent(name: str, title: str, why: str) -> Finding:
    """Return the finding of an analysis that does not apply, with the reason.

    >>> absent("cka", "CKA", "there is no dense model").means
    ('Not measured: there is no dense model.',)
    """
    return Finding(name=name, title=title, means=(f"Not measured: {why.rstrip('.')}.",))


def by_block(
    rows: Sequence[Row], columns: Mapping[str, int]
) -> dict[str, list[tuple[float, float | None]]]:
    """Return named columns of rows as series over the first cell, the number of a block.

    >>> by_block([(0, 0.5, None), (1, 0.25, None)], {"cka": 1, "other": 2})
    {'cka': [(0.0, 0.5), (1.0, 0.25)]}
    """
    found: dict[str, list[tuple[float, float | None]]] = {}
    for name, place in columns.items():
        points = [(float(row[0] or 0), _number(row[place])) for row in rows]
        if any(y is not None for _, y in points):
            found[name] = points
    return found


def _number(cell: Cell) -> float | None:
    return None if cell is None or isinstance(cell, str) else float(cell)
