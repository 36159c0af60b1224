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
