"""The one dial: what a recipe does where it names an effort and no parts of its own."""

from __future__ import annotations

from typing import Any


def stages(effort: str, pattern: str, sparsity: float | None) -> dict[str, Any]:
    """Return the keys of a prune step that follow from an effort, a pattern and a sparsity.

    >>> stages("fast", "unstructured", 0.5)
    {'method': 'wanda'}
    """
    return {"method": "wanda"}
