"""The command that asks for a run again, from the recipe that its folder recorded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.recipe import build, default_steps

FLAGS = {
    "model": "--model",
    "revision": "--revision",
    "prune.method": "--method",
    "prune.pattern": "--pattern",
    "prune.sparsity": "--sparsity",
    "prune.effort": "--effort",
    "calibration.data": "--calib",
    "calibration.num_samples": "--num-samples",
    "calibration.seq_len": "--seq-len",
    "seed": "--seed",
    "device": "--device",
    "dtype": "--dtype",
}
HEEDED = {"method", "sparsities", "min_keep", "propagate"}  # an effort leaves out what they decide


def command_text(wish: Mapping[str, Any]) -> str:
    """Return the command line of a recipe given as plain data; keys at their defaults are left out.

    >>> command_text({"model": "demo", "steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": {}}]})
    'llmprune --model demo --sparsity 0.5'
    """
    asked, usual = dict(_keys(wish)), _defaults(wish)
    words = ["llmprune"]
    for key, flag in FLAGS.items():
        if _is_flag(key, asked.get(key)) and (key not in usual or asked[key] != usual[key]):
            words += [flag, str(asked[key])]
    for name, value in (asked.get("prune.target") or {}).items():
        words += ["--target", f"{name}={value}"]
    if not any("evaluate" in step for step in wish["steps"]):
        words.append("--no-eval")
    if asked.get("trust_remote_code"):
        words.append("--trust-remote-code")
    for key, value in asked.items():
        known = _is_flag(key, value) or key in ("trust_remote_code", "prune.target")
        if not known and (key not in usual or value != usual[key]):
            words += ["--set", f"{key}={json.dumps(value)}"]
    return " ".join(shlex.quote(word) for word in words)


def _defaults(wish: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a run has without being asked for them; an effort sets many."""
    step = next(step["prune"] for step in wish["steps"] if "prune" in step)
    fixed = re.fullmatch(r"\d+:\d+", step.get("pattern", ""))  # its sparsity follows from it
    steps = default_steps()
    given = ("pattern", "effort") if fixed else ("pattern", "effort", "target", "sparsity")
    steps[0]["prune"] = {key: step[key] for key in given if step.get(key) is not None}
    usual = dict(_keys(build({"model": "demo", "steps": steps}).to_dict()))
    if step.get("effort"):
        own = {key: step[key] for key in HEEDED & step.keys() if step[key] != usual[f"prune.{key}"]}
        steps[0]["prune"] |= own
        found = dict(_keys(build({"model": "demo", "steps": steps}).to_dict()))
        usual |= {key: found[key] for key in found if key.removeprefix("prune.") not in HEEDED}
    usual |= {"prune.pattern": "unstructured", "prune.effort": None, "prune.target": None}
    for key in ("model",) if fixed else ("model", "prune.sparsity"):
        del usual[key]
    return usual


def _keys(wish: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the key paths of a recipe as `--set` takes them, with their values."""
    for key, value in wish.items():
        if key == "steps":
            for step in value:
                yield from _keys(step)
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", content) for inner, content in value.items())
        else:
            yield key, value


def _is_flag(key: str, value: Any) -> bool:
    """Tell whether a flag can say this; a mix of texts, for one, needs `--set`."""
    return key in FLAGS and isinstance(value, str | int | float)
