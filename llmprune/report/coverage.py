"""How many calibration tokens each expert saw: what the statistics of experts rest on."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from llmprune.base.text import columns, ranges
from llmprune.report.kinds import site_rows


class Experts(NamedTuple):
    """The experts of a block: tokens by expert, those without any, those with too few to tell.

    `thin` experts saw tokens, but fewer than one of their linears has columns, so statistics of
    whole rows and columns are not determined by them; None where the columns are not recorded.
    """

    block: int
    tokens: dict[int, int]
    unseen: list[int]
    thin: list[int] | None


def experts_of(data: Mapping[str, Any]) -> list[Experts]:
    """Return the experts of every block of a report that has some and was given tokens."""
    tokens: dict[int, dict[int, int]] = {}
    widest: dict[tuple[int, int], int] = {}
    shapes = {name: s for block in data["blocks"] for name, s in block.get("masks", {}).items()}
    any_token = False
    for block, _, expert, row in site_rows(data):
        any_token = any_token or row["tokens"] > 0
        if expert is None:
            continue
        seen = tokens.setdefault(block, {})
        seen[expert] = max(row["tokens"], seen.get(expert, 0))
        if row["site"] in shapes:
            key = block, expert
            widest[key] = max(shapes[row["site"]][1], widest.get(key, 0))
    return [_judged(block, seen, widest) for block, seen in tokens.items()] if any_token else []


def _judged(block: int, seen: dict[int, int], widest: Mapping[tuple[int, int], int]) -> Experts:
    """Return the experts of a block with those that saw nothing or too little."""
    unseen = sorted(expert for expert, count in seen.items() if not count)
    thin = None
    if all((block, expert) in widest for expert in seen):
        thin = sorted(e for e, count in seen.items() if 0 < count < widest[block, e])
    return Experts(block, seen, unseen, thin)


def coverage_rows(data: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return head and rows: a block's experts, tokens of the least and most used, who lacks."""
    head = ("block", "experts", "min", "median", "max", "unseen", "fewer tokens than columns")
    rows = [
        (
            f"{one.block}",
            f"{len(one.tokens):,}",
            *(f"{int(fn(one.tokens.values())):,}" for fn in (min, median, max)),
            _listed(one.unseen),
            "not known" if one.thin is None else _listed(one.thin),
        )
        for one in experts_of(data)
    ]
    return head, rows


def coverage_text(data: Mapping[str, Any]) -> str:
    """Return the coverage as aligned text, or why there is none."""
    head, rows = coverage_rows(data)
    if rows:
        return columns(head, rows)
    if any(expert is not None for _, _, expert, _ in site_rows(data)):
        return f"no calibration token flowed: {data['method']} looks at weights alone"
    return "this model has no experts"


def coverage_line(data: Mapping[str, Any]) -> str:
    """Return a sentence about experts that saw no or few tokens; empty where none did."""
    found = experts_of(data)
    total = sum(len(one.tokens) for one in found)
    unseen = sum(len(one.unseen) for one in found)
    thin = sum(len(one.thin or ()) for one in found)
    parts = [f"{unseen:,} of {total:,} saw no token"] if unseen else []
    if thin:
        whole = f"{thin:,} more" if unseen else f"{thin:,} of {total:,}"
        parts.append(f"{whole} saw fewer tokens than they have columns")
    return ", ".join(parts)


def _listed(experts: list[int]) -> str:
    """Return how many experts and which.

    >>> _listed([]), _listed([1, 2, 5])
    ('0', '3 (1-2, 5)')
    """
    return f"{len(experts)} ({ranges(experts)})" if experts else "0"
