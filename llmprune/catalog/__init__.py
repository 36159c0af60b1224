"""The published methods as one table; each row names its parts, which other rooms define."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.catalog.baselines import BASELINES
from llmprune.catalog.gradients import GRADIENTS
from llmprune.catalog.halves import DEEP
from llmprune.catalog.low_rank import FACTORED
from llmprune.catalog.mixtures import MIXTURES
from llmprune.catalog.second_order import SECOND_ORDER
from llmprune.catalog.shares import SHARES
from llmprune.catalog.structured import STRUCTURED
from llmprune.catalog.types import Method
from llmprune.catalog.whole import WHOLE_MODEL

METHODS: Registry[Method] = Registry(
    "method",
    {
        **BASELINES,
        **SECOND_ORDER,
        **GRADIENTS,
        **SHARES,
        **STRUCTURED,
        **DEEP,
        **MIXTURES,
        **WHOLE_MODEL,
        **FACTORED,
    },
)

__all__ = ["METHODS", "Method"]


def methods_for(pattern: str) -> list[str]:
    """Return the methods that have a rule for a pattern of weights, a unit, or lower ranks.

    >>> methods_for("low-rank"), "wanda" in methods_for("2:4"), "wanda" in methods_for("16x16")
    (['svd-llm', 'svd'], True, True)
    """
    kinds = {"N:M": ":" in pattern, "HxW": pattern[:1].isdigit()}
    kind = next((name for name, meant in kinds.items() if meant), pattern)
    return [row.name for row in METHODS.values() if kind in row.patterns]
