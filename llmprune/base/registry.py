"""A table of names whose missing entries teach: the near match and the full list."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import NoReturn, TypeVar

from llmprune.base.errors import UnknownName

T = TypeVar("T")


class Registry(dict[str, T]):
    """Hold named values; looking up a name that is not there raises `UnknownName`.

    `kind` is the key under which users write such a name ("score", "solver").

    >>> Registry("score", {"wanda": 1})["wanda"]
    1
    """

    def __init__(self, kind: str, table: Mapping[str, T]) -> None:
        super().__init__(table)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        raise unknown(self.kind, name, self)


def unknown(kind: str, name: str, names: Iterable[str]) -> UnknownName:
    """Return the error for a name that no table holds.

    >>> print(unknown("score", "wnada", ["magnitude", "wanda"]))
    score: 'wnada' is not known. Did you mean 'wanda'? Choose one of: magnitude, wanda.
    """
    known, hint = sorted(names), near_match(name, names)
    return UnknownName(f"{kind}: {name!r} is not known.{hint} Choose one of: {', '.join(known)}.")


def near_match(name: str, names: Iterable[str]) -> str:
    """Return the question whether the nearest name was meant, with a space before it, or nothing.

    >>> near_match("wnada", ["magnitude", "wanda"])
    " Did you mean 'wanda'?"
    """
    near = difflib.get_close_matches(str(name).lower(), sorted(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
