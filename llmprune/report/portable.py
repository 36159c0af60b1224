"""Plain data without the places of one machine: what may leave it with a result."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_IN_TEXT = re.compile(
    r"""(?<![\w.:/\\~-])                 # not the middle of a word, of a URL or of a path
        (?:file://)?(?:~|[A-Za-z]:)?[/\\] # where a path begins
        (?:[^\s"'`<>|:*?(),;\\/]+[/\\])*  # folders
        ([^\s"'`<>|:*?(),;\\/]+)[/\\]?    # what is kept: the last name""",
    re.VERBOSE,
)
_SEVERAL = re.compile(r"[:;,]\s|\n|,(?=[/~]|[A-Za-z]:[/\\])")  # a sentence, or paths of a mix
_PATH_KEY = re.compile(r"(path|dir|file|folder|checkpoint)$")


def last_name(path: str) -> str:
    r"""Return the last name of a path of any system.

    >>> last_name("/home/me/models/llama"), last_name("C:\\models\\llama")
    ('llama', 'llama')
    """
    flavour = PureWindowsPath if "\\" in path or re.match(r"[A-Za-z]:", path) else PurePosixPath
    return flavour(path).name or "folder"


def is_place(text: str) -> bool:
    """Tell whether a text as a whole is a path that holds on one machine only.

    >>> is_place("/data/llama"), is_place("~/llama"), is_place("../llama"), is_place("owner/name")
    (True, True, True, False)
    """
    return (
        PurePosixPath(text).is_absolute()
        or PureWindowsPath(text).is_absolute()
        or re.match(r"(~|\.{1,2})[/\\]", text) is not None
    )


def without_places(value: Any, places: Iterable[str | Path] = ()) -> Any:
    """Return plain data in which every path of this machine is cut down to its last name.

    Paths are found where they are a whole string, and inside of sentences; `places` are paths that
    are known to occur, which may hold spaces.

    >>> without_places({"out": "/home/me/x", "text": "cannot read /home/me/a.txt: empty"})
    {'out': 'x', 'text': 'cannot read a.txt: empty'}
    """
    known = sorted({form for place in places for form in _forms(place)}, key=len, reverse=True)
    return _clean(value, known)


def without_roots(value: Any, roots: Iterable[str | Path]) -> Any:
    """Return plain data of another program with paths below known folders cut to their last names.

    Other strings that begin with a slash may be tokens or patterns and stay, unless their key says
    that it names a path, as `name_or_path` does.
    """
    return _below(value, tuple(form for root in roots for form in _forms(root)), key="")


def _forms(place: str | Path) -> set[str]:
    """Return how a path may be written; too short ones would match anywhere."""
    text = os.path.expanduser(str(place))
    forms = {str(place), text, os.path.abspath(text), os.path.realpath(text)}
    return {form for form in forms if is_place(form) and len(form) > 2}


def _clean(value: Any, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _clean(inner, known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner, known) for inner in value]
    if not isinstance(value, str):
        return value
    if is_place(value) and not _SEVERAL.search(value):
        return last_name(value)
    for place in known:
        short = last_name(place).replace("\\", r"\\")
        value = re.sub(re.escape(place) + r"(?![\w-])", short, value)
    return _IN_TEXT.sub(lambda match: match[1], value)


def _below(value: Any, roots: tuple[str, ...], key: str) -> Any:
    if isinstance(value, dict):
        return {name: _below(inner, roots, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_below(inner, roots, key) for inner in value]
    if isinstance(value, str) and (
        value in roots
        or value.startswith(tuple(root.rstrip("/\\") + os.sep for root in roots))
        or (_PATH_KEY.search(key) and is_place(value))
    ):
        return last_name(value)
    return value
