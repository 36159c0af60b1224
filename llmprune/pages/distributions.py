"""What of a page shows how scores and activations are spread, by kind of linear and by tap.

A block's record counts values by powers of two: count k of `low` e is of those from 2^(e+k) on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.pages.charts import lines
from llmprune.pages.document import Section, folded, side_by_side, together

Points = list[tuple[float, float]]


def distributions_part(data: Mapping[str, Any]) -> Section | None:
    """Return charts of the spread of scores (kept and removed) and of activations."""
    scores, taps = merged(data, "scores"), merged(data, "activations")
    if not scores and not taps:
        return None
    charts = [
        lines(
            f"Scores of {kind}",
            {
                part: _points(counts[part], counts)
                for part in ("removed", "kept")
                if any(counts[part].values())
            },
            x_label="score",
            y_label="share",
            log_x=True,
            zero=True,
            marks=False,
        )
        for kind, counts in scores.items()
    ]
    parts = [side_by_side(*charts[:2])]
    if charts[2:]:
        title = f"Scores of the other {len(charts) - 2} kinds"
        parts.append(folded(title, side_by_side(*charts[2:])))
    if taps:
        parts.append(_activations(taps))
    lead = (
        "Over all blocks. Scores of a sample of rows, in bins of a factor of two; scores of 0 or "
        "below, which methods that centre them give to many, are left out. Activations are the "
        "root mean square of every input channel."
    )
    return Section("Scores and activations", together(parts), lead)


def merged(data: Mapping[str, Any], what: str) -> dict[str, dict[str, dict[int, int]]]:
    """Return counts of a report by kind, part (kept, removed, all) and exponent, over all blocks.

    Counts of what has no logarithm are at no exponent, and in none of these.
    """
    found: dict[str, dict[str, dict[int, int]]] = {}
    for block in data["blocks"]:
        for kind, spread in block.get("spreads", {}).get(what, {}).items():
            for part, exponent, count in _counts(spread):
                bins = found.setdefault(kind, {}).setdefault(part, {})
                bins[exponent] = bins.get(exponent, 0) + count
    return found


def _counts(spread: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    for part, counts in spread["counts"].items():
        for place, count in enumerate(counts.split()):
            yield part, spread["low"] + place, int(count)


def _points(bins: Mapping[int, int], beside: Mapping[str, Mapping[int, int]]) -> Points:
    """Return the middle of every bin with its share of all that was counted."""
    total = sum(sum(each.values()) for each in beside.values()) or 1
    return [(1.5 * 2.0**exponent, bins[exponent] / total) for exponent in sorted(bins)]


def _activations(taps: Mapping[str, Mapping[str, Mapping[int, int]]]) -> Any:
    return lines(
        "Activations by what reads them",
        {tap: _points(parts["all"], parts) for tap, parts in taps.items()},
        x_label="root mean square of a channel",
        y_label="share of channels",
        log_x=True,
        zero=True,
    )
