"""Words, lists and tables of the page in Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmprune.catalog import METHODS


def names(words: Iterable[str]) -> str:
    """Return names as code, or that there are none."""
    return ", ".join(f"`{word}`" for word in words) or "nothing"


def says(part: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring on one line, without its `Return`."""
    text = inspect.getdoc(part) or ""
    return " ".join(text.split("\n\n")[0].split()).removeprefix("Return ")


def tells(part: Callable[..., Any]) -> str:
    """Return the paragraphs of a docstring that say what a part does, on one line."""
    text = inspect.getdoc(part) or ""
    ends = re.split(r"\n\n(?=Source|Raises|Args|>>>)", text)[0]
    return re.sub("^Return,? ", "", " ".join(ends.split()))


def values(options: Mapping[str, float]) -> str:
    """Return numbers by name."""
    return ", ".join(f"`{name}` {value:g}" for name, value in options.items())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, *map(list, rows)]
    text = [f"| {' | '.join(cells)} |".replace("  ", " ") for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:], ""])


def anchor(title: str) -> str:
    """Return the link target that the heading of a method gets; equal ones are counted."""

    def plain(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    titles = [method.title for method in METHODS.values()]
    before = [plain(other) for other in titles[: titles.index(title)]].count(plain(title))
    return plain(title) + (f"-{before}" if before else "")


def linked(paper: str) -> str:
    """Return a citation whose arXiv or OpenReview number is a link."""
    paper = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    forum = r"[openreview:\1](https://openreview.net/forum?id=\1)"
    return re.sub(r"openreview:(\w+)", forum, paper)


def item(text: str) -> str:
    """Return a list item of short lines."""
    return filled(f"- {text}", indent="  ")


def filled(text: str, indent: str = "") -> str:
    """Return text in lines of 100 characters, never broken inside a word."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def plain(value: Any) -> str:
    """Return a value as a recipe writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def described(name: str, row: Any, *facts: str) -> str:
    """Return what a part does and where it comes from."""
    return item(" ".join([f"`{name}`: {tells(row.fn)}", *facts, *cited(row.paper)]))


def cited(paper: str) -> list[str]:
    """Return the citation of a row, whose title follows a colon; other rows come from no paper."""
    return [f"Paper: {linked(paper)}."] if ":" in paper else []
