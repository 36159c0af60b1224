"""What was measured of the demo, from `eval/results/demo.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.methods_page.dial import efforts
from eval.methods_page.text import anchor, filled, table
from llmprune.catalog import METHODS

RESULTS = Path(__file__).parents[1] / "results" / "demo.json"


def results(path: Path = RESULTS) -> str:
    """Return what was measured of the demo, a line per method; nothing where there is no file.

    Raises:
        ValueError: a row of the file is not as eval/results/README.md says.
    """
    if not path.exists():
        return ""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    amounts: list[str] = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        method, amount, settings = measured(row)
        amounts += [amount] if amount not in amounts else []
        line = cells.setdefault((method, settings), {})
        if amount in line:
            raise ValueError(f"{row} is a second row of its method, settings and amount")
        seconds = f" ({row['seconds']:.0f} s)" if "seconds" in row else ""
        line[amount] = f"{row['perplexity']:.2f}{seconds}"
    rows = [
        (label(method), f"`{settings}`" if settings else "", *(line.get(a, "") for a in amounts))
        for (method, settings), line in cells.items()
    ]
    text = (
        "Perplexity of the demo on its evaluation text, lower is better; where they are known, "
        "the seconds of the run in brackets. Another model may order the methods otherwise. What "
        "was measured how: "
        "[eval/results/README.md](../eval/results/README.md)."
    )
    return f"## Results\n\n{filled(text)}\n\n{table(('method', 'set', *amounts), rows)}"


def measured(row: Any) -> tuple[str, str, str]:
    """Return the method, amount and settings of a row of results.

    Raises:
        ValueError: it is not as eval/results/README.md says.
    """
    needed: dict[str, Any] = {"method": str, "amount": str, "perplexity": int | float}
    kinds: dict[str, Any] = needed | {"seconds": int | float, "settings": str}
    keys = set(row) if isinstance(row, dict) else set()
    if set(needed) - keys or keys - set(kinds):
        raise ValueError(f"{row} has not the keys {[*needed]}, or more than {[*kinds]}")
    for key in keys:
        if not isinstance(row[key], kinds[key]):
            raise ValueError(f"{row}: {key} is no {kinds[key]}")
    if row["method"] not in {*METHODS, *efforts(), "dense"}:
        raise ValueError(f"{row}: there is no method or effort {row['method']!r}")
    return row["method"], row["amount"], row.get("settings", "")


def label(method: str) -> str:
    """Return what a line of results is about."""
    if method in METHODS:
        title = METHODS[method].title
        return f"[{title}](#{anchor(title)})"
    return f"[`--effort {method}`](#the-dial)" if method in efforts() else method
