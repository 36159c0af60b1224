"""Text that a model wrote for itself, kept by all that decides it, so that none is written twice.

    ~/.cache/llmprune/written/  KEY.safetensors (the windows)  KEY.json (their record)

The record is written last, and holds the hash of the windows: what does not match is written anew.
`LLMPRUNE_CACHE` moves the folder. Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmprune.base.errors import LlmpruneError
from llmprune.base.places import cache_folder
from llmprune.calibration.mix import Windows
from llmprune.calibration.windows import token_hash
from llmprune.checkpoint.sink import write_json, write_tensors
from llmprune.checkpoint.source import read_json


def text_key(decides: Mapping[str, Any]) -> str:
    """Return the name that a text is kept under: a hash of all that decides its tokens.

    >>> text_key({"seed": 0}) == text_key({"seed": 0}) != text_key({"seed": 1})
    True
    """
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def kept_text(key: str) -> Windows | None:
    """Return the windows kept under a key; none where there are none, or they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = cache_folder("written") / key
    try:
        record = read_json(path.with_suffix(".json"))
        tokens_NT = load_file(path.with_suffix(".safetensors"))["tokens"]
        is_whole = token_hash(tokens_NT) == record["tokens"]
        told = {**record["on_policy"], "kept": key, "from_cache": True}
    except (LlmpruneError, OSError, SafetensorError, KeyError, TypeError):
        return None
    if not is_whole:
        return None
    return Windows(tokens=tokens_NT, record={**record, "on_policy": told}, is_remote=True)


def keep_text(key: str, windows: Windows) -> Windows:
    """Keep windows, and return them with a record that says under which key.

    Where the folder cannot be written they are written again next time.
    """
    path = cache_folder("written") / key
    told = {**windows.record["on_policy"], "kept": key, "from_cache": False}
    record = {**windows.record, "on_policy": told}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path.with_suffix(".safetensors"), {"tokens": windows.tokens})
        write_json(path.with_suffix(".json"), record)
    except (OSError, LlmpruneError):
        return windows
    return replace(windows, record=record)
