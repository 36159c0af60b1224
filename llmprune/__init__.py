"""Make Hugging Face causal language models smaller after training.

>>> import llmprune
>>> llmprune.__version__
'0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from llmprune.api import (
        analyze,
        bench,
        compare,
        evaluate,
        gate,
        inspect,
        load,
        perplexity,
        plan,
        prune,
        push,
        recover,
        rolling_perplexity,
        run,
    )
    from llmprune.base.errors import LlmpruneError
    from llmprune.catalog import METHODS
    from llmprune.comparison.result import Comparison
    from llmprune.recipe import Recipe
    from llmprune.report.run import Report

_HOMES = {
    "Comparison": "llmprune.comparison.result",
    "LlmpruneError": "llmprune.base.errors",
    "METHODS": "llmprune.catalog",
    "Recipe": "llmprune.recipe",
    "Report": "llmprune.report.run",
    "analyze": "llmprune.api",
    "bench": "llmprune.api",
    "compare": "llmprune.api",
    "evaluate": "llmprune.api",
    "gate": "llmprune.api",
    "inspect": "llmprune.api",
    "load": "llmprune.api",
    "perplexity": "llmprune.api",
    "plan": "llmprune.api",
    "prune": "llmprune.api",
    "push": "llmprune.api",
    "recover": "llmprune.api",
    "rolling_perplexity": "llmprune.api",
    "run": "llmprune.api",
}

__all__ = [
    "METHODS",
    "Comparison",
    "LlmpruneError",
    "Recipe",
    "Report",
    "analyze",
    "bench",
    "compare",
    "evaluate",
    "gate",
    "inspect",
    "load",
    "perplexity",
    "plan",
    "prune",
    "push",
    "recover",
    "rolling_perplexity",
    "run",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for, so that importing the package is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
