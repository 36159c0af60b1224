"""The one dial: the parts of a prune step where it names an effort and no parts of its own.

Chosen by perplexity on the bundled model and by published results; the table is in docs/METHODS.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

EFFORTS = ("fast", "good", "best")
FEW = 0.4  # below this sparsity equal shares are as good as any that were tried


def stages(effort: str, pattern: str, sparsity: float | None) -> dict[str, Any]:
    """Return the keys of a prune step that follow from an effort, a pattern and a sparsity.

    Whole units have a method by their kind.

    >>> stages("fast", "unstructured", 0.5)
    {'method': 'wanda'}
    >>> stages("good", "2:4", None)
    {'method': 'sparsegpt', 'solver': 'least-squares', 'permute': True}
    """
    if pattern != "unstructured" and not pattern[:1].isdigit():
        return {"method": _method_of_units(effort, pattern.split("+"))}
    if effort not in ("good", "best"):
        return {"method": "wanda"}
    fixed = re.fullmatch(r"\d+:\d+", pattern) is not None
    found: dict[str, Any] = {"method": "sparsegpt", "solver": "least-squares"}
    if effort == "best" and "x" not in pattern:
        found = {"method": "alps"}
    if fixed:
        found["permute"] = True
    elif sparsity is None or sparsity >= FEW:
        found["allocation"] = "sensitivity"
    return found | ({"repair": "block"} if effort == "best" else {})


def usual_parts(pattern: str, target: Any = None) -> dict[str, Any]:
    """Return what is meant where no method is given: Wanda; of units, what suits their kind.

    A latency is met by sizes that are known before anything is read, so shares are then equal.

    >>> usual_parts("2:4"), usual_parts("heads"), usual_parts("blocks")
    ({'method': 'wanda'}, {'method': 'compact'}, {'method': 'finercut'})
    >>> usual_parts("heads", {"latency": "0.7x"})
    {'method': 'compact', 'allocation': 'uniform'}
    """
    units = pattern != "unstructured" and not pattern[:1].isdigit()
    found = {"method": stages("good" if units else "fast", pattern, None)["method"]}
    timed = isinstance(target, Mapping) and "latency" in target
    return found | ({"allocation": "uniform"} if timed and found["method"] == "compact" else {})


def _method_of_units(effort: str, kinds: list[str]) -> str:
    """Return the method for kinds of unit."""
    own = {
        "experts": "reap",
        "hidden": "slicegpt",
        "vocabulary": "vocabulary",
        "low-rank": "svd-llm",
    }
    if kinds[0] in own:
        return own[kinds[0]]
    deep = {"attention", "ffn", "blocks", "sublayers"}
    if deep & {*kinds}:
        return "finercut" if {*kinds} <= deep else "greedy-units"
    careful = effort in ("good", "best") and "expert-channels" not in kinds
    return "compact" if careful else "wanda"


def beside(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an effort adds to the keys that a prune step gives itself.

    A method that is given keeps its own solver, and one that the dial never chooses its allocation;
    shares by hand, a ranking's floor and dense inputs leave out what they contradict.

    >>> beside({"effort": "best", "method": "owl", "sparsity": 0.7})
    {'repair': 'block'}
    """
    sparsity = step.get("sparsity")
    share = sparsity if isinstance(sparsity, float | int) else None
    found = stages(str(step["effort"]), str(step.get("pattern", "unstructured")), share)
    if step.get("method", found["method"]) != found["method"]:
        found.pop("solver", None)
    other = step.get("method", "wanda") not in ("wanda", "sparsegpt", "alps")
    if other or step.get("sparsities") or step.get("min_keep") is not None:
        found.pop("allocation", None)
    if step.get("propagate") == "dense":
        found.pop("repair", None)
    return {key: value for key, value in found.items() if key not in step}
