"""What a target may be: sizes, speed and quality that a result is to meet."""

from __future__ import annotations

import re
from typing import Literal

TARGETS = {
    "ppl": "what perplexity may rise to: +5%, or 12.5",
    "params": "parameters of the model: 3B, 350M, or 0.8x of what it has",
    "size": "bytes of its tensors: 4GB, or 0.8x",
    "latency": "time of a decoded token: 0.7x, measured on this device",
    "kv": "bytes of key/value cache per token: 0.5x",
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS = {"params": _COUNTS, "size": _BYTES}
LATENCY = {"latency_batch": 1.0, "latency_prompt": 128.0}
"""Options of a target of latency: sequences at once, and tokens before the one that is timed."""


def amount_of(key: str, text: str) -> tuple[Literal["times", "value"], float]:
    """Return what a target of size or speed asks for: a share of the dense model's, or a number.

    Raises:
        ValueError: it is not of this form.

    >>> amount_of("params", "3B"), amount_of("latency", "0.7x"), amount_of("size", "4GB")
    (('value', 3000000000.0), ('times', 0.7), ('value', 4000000000.0))
    """
    text = str(text).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)", text)
    if found:
        number, unit = float(found[1]), found[2].upper()
        if unit == "X" and 0 < number < 1:
            return "times", number
        if unit in UNITS.get(key, {}) and number > 0:
            return "value", number * UNITS[key][unit]
    raise ValueError(
        f"{_why_not(key, text, found)}. A target for {key} is {TARGETS[key]}. Type for example "
        f"`--target {key}=0.8x`."
    )


def _why_not(key: str, text: str, found: re.Match[str] | None) -> str:
    """Say what is wrong with a target."""
    if found is None:
        return f"'{text}' is no number with a unit"
    number, unit = float(found[1]), found[2].upper()
    if not number:
        return f"'{text}' leaves nothing"
    if unit == "X":
        return f"'{text}' is not below what the model has, which is 1x"
    known = [name for name in UNITS.get(key, {}) if name]
    if not known:
        return f"'{text}' is no share of what the model has"
    return f"'{text}' has no unit that is known here: x, {', '.join(known)}"
