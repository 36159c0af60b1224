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
        units = {"params": _COUNTS, "size": _BYTES}.get(key, {})
        if unit in units and number > 0:
            return "value", number * units[unit]
    raise ValueError(
        f"'{text}' is no target for {key}, which is {TARGETS[key]}. Type for example "
        f"`--target {key}=0.8x`."
    )
