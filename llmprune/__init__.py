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
        bench,
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
    from llmprune.recipe import Recipe
    from llmprune.report.run import Report

_HOMES = {
    "LlmpruneError": "llmprune.base.errors",
    "METHODS": "llmprune.catalog",
    "Recipe": "llmprune.recipe",
    "Report": "llmprune.report.run",
    "bench": "llmprune.api",
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
    "LlmpruneError",
    "Recipe",
    "Report",
    "bench",
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
