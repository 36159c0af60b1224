"""What the user wants: frozen models, read from YAML or plain data."""

from llmprune.recipe.models import EvaluateStep, Recipe, Step
from llmprune.recipe.pruning import PruneStep
from llmprune.recipe.reading import (
    build,
    default_steps,
    differences,
    override,
    read_recipe,
    recovery_recipe,
)
from llmprune.recipe.texts import Calibration, Portion
from llmprune.recipe.training import RecoverStep

__all__ = [
    "Calibration",
    "EvaluateStep",
    "Portion",
    "PruneStep",
    "Recipe",
    "RecoverStep",
    "Step",
    "build",
    "default_steps",
    "differences",
    "override",
    "read_recipe",
    "recovery_recipe",
]
