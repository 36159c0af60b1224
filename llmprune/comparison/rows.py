"""The rows of a comparison: a method and amount over all seeds, beside the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from llmprune.comparison.pareto import front

PERPLEXITY, KL = "perplexity", "kl"
AXES = (PERPLEXITY, KL)  # what a front may be of, beside the parameters that are kept


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The mean of a number over seeds, and its standard deviation where there are several."""

    mean: float
    deviation: float | None = None

    def text(self, digits: int) -> str:
        """Return the mean with so many decimals, and what it varies by.

        >>> Spread(mean=2, deviation=0.25).text(2), Spread(mean=2).text(1)
        ('2.00 ± 0.25', '2.0')
        """
        more = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{more}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at an amount. `kept` counts the parameters that are not removed, zeros left out.

    `loss` is the mean negative log-likelihood per token in nats, `ratio` the perplexity over the
    dense model's, `gap` what the loss is above the dense one's, `memory` bytes at most. `kl` is the
    mean KL(dense || pruned) per token in nats, None where it was not measured. It and `tasks` come
    with their standard errors, of several seeds the means of both.
    """

    method: str
    asked: str
    num_seeds: int
    sparsity: float
    parameters: int
    kept: int
    loss: float
    perplexity: Spread
    ratio: float
    gap: float
    kl: tuple[float, float | None] | None
    tasks: Mapping[str, tuple[float, float | None]]
    seconds: float
    memory: int
    best: bool = False
    front: bool = False

    def height(self, axis: str) -> float:
        """Return perplexity or KL, which is NaN where it was not measured."""
        if axis == PERPLEXITY:
            return self.perplexity.mean
        return math.nan if self.kl is None else self.kl[0]

    @property
    def marks(self) -> str:
        """Return what stands out: the lowest loss of an amount, and what nothing dominates."""
        return ", ".join([*["best"] * self.best, *["Pareto"] * self.front])


def rows_of(
    results: Sequence[Mapping[str, Any]], dense: Mapping[str, Any], axis: str = PERPLEXITY
) -> list[Row]:
    """Return a row per method and amount, in the order in which they come.

    Results whose cell failed are left out. The best of an amount has the lowest mean loss; on the
    front is what no row, and not the dense model, beats in both kept parameters and loss, or KL by
    the `axis`; there a row without KL is never.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            groups.setdefault((result["method"], result["asked"]), []).append(result)
    rows = [_row(*key, found, dense) for key, found in groups.items()]
    points = [(float(dense["parameters"]), 0.0 if axis == KL else float(dense["loss"]))]
    points += [(float(row.kept), _badness(row, axis)) for row in rows]
    undominated = front(points)
    return [
        replace(row, best=_is_best(row, rows), front=place + 1 in undominated)
        for place, row in enumerate(rows)
    ]


def _badness(row: Row, axis: str) -> float:
    if axis == PERPLEXITY:
        return row.loss
    return math.inf if row.kl is None else row.kl[0]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and standard deviation (of a sample, n - 1) of numbers.

    >>> spread([1.0, 3.0]).text(3)
    '2.000 ± 1.414'
    """
    return Spread(mean=fmean(values), deviation=stdev(values) if len(values) > 1 else None)


def _row(
    method: str, asked: str, found: Sequence[Mapping[str, Any]], dense: Mapping[str, Any]
) -> Row:
    loss = fmean(result["loss"] for result in found)
    return Row(
        method=method,
        asked=asked,
        num_seeds=len(found),
        sparsity=fmean(result["sparsity"] for result in found),
        parameters=round(fmean(result["parameters"] for result in found)),
        kept=round(fmean(result["kept"] for result in found)),
        loss=loss,
        perplexity=spread([result["perplexity"] for result in found]),
        ratio=math.exp(loss - dense["loss"]),
        gap=loss - dense["loss"],
        kl=_score([r["kl"] for r in found]) if all(r.get("kl") for r in found) else None,
        tasks={name: _score([r["tasks"][name] for r in found]) for name in found[0]["tasks"]},
        seconds=fmean(result["seconds"] for result in found),
        memory=max(result["memory"] for result in found),
    )


def _score(scores: Sequence[Sequence[float | None]]) -> tuple[float, float | None]:
    values = [value for value, _ in scores if value is not None]
    errors = [error for _, error in scores if error is not None]
    return fmean(values), fmean(errors) if errors else None


def _is_best(row: Row, rows: Sequence[Row]) -> bool:
    """Tell whether a row is the first of those with the lowest loss of its amount, of several."""
    rivals = [other for other in rows if other.asked == row.asked]
    return len(rivals) > 1 and min(rivals, key=lambda other: other.loss) is row
