"""Print docs/METHODS.md: the published methods, from the tables that the package itself works with.

`make docs` writes the page; a test compares the two.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from llmprune.allocation import ALLOCATIONS
from llmprune.catalog import METHODS, Method
from llmprune.score import SCORES
from llmprune.solver import SOLVERS
from llmprune.stats import STATISTICS

HEAD = """\
# Methods

Made by `make docs` from the tables in `llmprune/`. Do not edit this page: edit
`llmprune/catalog.py` and the docstrings of the parts, then run `make docs`.

A method is a row of names: a *score* says how much each weight matters (higher = keep), an
*allocation* how much to remove where, a *solver* what happens to the weights that stay. Shapes: O
outputs, I inputs of a linear.
"""
GROUPS = {"row": "within each row (one output)", "matrix": "within the whole matrix"}
POOLS = {
    "l2": "the norm of the scores in the channel's column of the down projection",
    "mean": "the mean of the scores in the channel's column of the down projection",
}


def page() -> str:
    """Return the whole page: an overview, a section per method, the statistics they need."""
    sections = [HEAD, overview(), *map(section, METHODS.values()), statistics()]
    return "\n".join(sections)


def overview() -> str:
    """Return one line per method."""
    lines = ["| method | needs | weights compete | patterns | year |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        cells = (
            f"[{method.title}](#{method.title.lower().replace(' ', '-')})",
            names(needs(method)),
            GROUPS[method.group],
            names(method.patterns),
            str(method.year),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def section(method: Method) -> str:
    """Return what one method does, with what, and where it comes from."""
    score, solver = SCORES[method.score], SOLVERS[method.solver]
    facts = [
        f"Ask for it: `--method {method.name}`.",
        f"Needs: {names(needs(method))}.",
        f"Score `{method.score}`: {says(score.fn)}",
        f"Weights compete {GROUPS[method.group]}; `prune.group` changes it. N:M has groups of its "
        "own: M consecutive inputs.",
        f"Patterns: {names(method.patterns)}.",
    ]
    if "ffn-channels" in method.patterns:
        facts.append(f"Score of an FFN channel: {POOLS[method.pool]}.")
    facts += [
        f"Allocation `{method.allocation}`: {says(ALLOCATIONS[method.allocation].fn)}",
        f"Solver `{method.solver}`: {says(solver.fn)}",
        f"Paper: {linked(method.paper)}.",
    ]
    return f"## {method.title}\n\n{filled(method.summary)}\n\n" + "\n".join(map(item, facts)) + "\n"


def statistics() -> str:
    """Return what calibration learns for these methods."""
    lines = [
        item(f"`{name}`, shape {row.shape}, by {row.observe}: {says(row.accumulator)}")
        for name, row in STATISTICS.items()
    ]
    return "## Statistics\n\nWhat the methods need of the calibration text.\n\n" + "\n".join(
        [*lines, ""]
    )


def needs(method: Method) -> list[str]:
    """Return the statistics that score and solver read."""
    return list(dict.fromkeys(SCORES[method.score].needs + SOLVERS[method.solver].needs))


def names(words: Iterable[str]) -> str:
    """Return names as code, or that there are none."""
    return ", ".join(f"`{word}`" for word in words) or "nothing"


def says(part: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring on one line, without its `Return`."""
    text = inspect.getdoc(part) or ""
    return " ".join(text.split("\n\n")[0].split()).removeprefix("Return ")


def linked(paper: str) -> str:
    """Return a citation whose arXiv number is a link."""
    return re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def item(text: str) -> str:
    """Return a list item of short lines."""
    return filled(f"- {text}", indent="  ")


def filled(text: str, indent: str = "") -> str:
    """Return text in lines of 100 characters, never broken inside a word."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    print(page(), end="")
