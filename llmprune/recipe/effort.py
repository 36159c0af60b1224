"""The one dial: the parts of a prune step where it names an effort and no parts of its own.

Chosen by perplexity on the bundled model and by published results; the table is in docs/METHODS.md.
"""

from __future__ import annotations

import re
from typing import Any

EFFORTS = ("fast", "good", "best")
FEW = 0.4  # below this sparsity equal shares are as good as any that were tried


def stages(effort: str, pattern: str, sparsity: float | None) -> dict[str, Any]:
    """Return the keys of a prune step that follow from an effort, a pattern and a sparsity.

    Whole channels have one method so far, whatever the effort.

    >>> stages("fast", "unstructured", 0.5)
    {'method': 'wanda'}
    >>> stages("good", "2:4", None)
    {'method': 'sparsegpt', 'solver': 'least-squares', 'permute': True}
    """
    if effort not in ("good", "best") or pattern == "ffn-channels":
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
