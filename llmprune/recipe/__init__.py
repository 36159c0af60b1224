"""What the user wants: frozen models, read from YAML or plain data."""

from llmprune.recipe.models import Calibration, EvaluateStep, Portion, PruneStep, Recipe, Step
from llmprune.recipe.reading import build, default_steps, differences, override, read_recipe

__all__ = [
    "Calibration",
    "EvaluateStep",
    "Portion",
    "PruneStep",
    "Recipe",
    "Step",
    "build",
    "default_steps",
    "differences",
    "override",
    "read_recipe",
]
