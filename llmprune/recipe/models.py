"""What the user wants, as frozen models that say what is wrong with a wish."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from llmprune.recipe.dialect import dump
from llmprune.recipe.pruning import PruneStep
from llmprune.recipe.publication import PushStep
from llmprune.recipe.texts import ON_POLICY, Calibration, Part
from llmprune.recipe.training import RecoverStep

_SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B", re.IGNORECASE)


class EvaluateStep(Part):
    """Measure the result; ``perplexity: auto`` leaves out what the model cannot do.

    Dense and pruned model go on from each of ``prompts`` with ``new_tokens`` tokens, for the page
    of the report; by default a few short ones, unless ``perplexity: false``.
    """

    perplexity: Literal["auto"] | bool = "auto"
    data: str = Field(default="auto", min_length=1)
    num_windows: int = Field(default=16, ge=1)
    stride: int | None = Field(default=None, ge=1)
    bos: Literal["auto"] | bool = False
    prompts: tuple[str, ...] | None = None
    new_tokens: int = Field(default=32, ge=1, le=1024)

    @field_validator("prompts")
    @classmethod
    def _prompts_say_something(cls, prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if prompts is not None and not all(prompt.strip() for prompt in prompts):
            raise ValueError("an empty prompt gives a model nothing to go on from. Leave it out.")
        return prompts

    @field_validator("perplexity", "bos", mode="before")
    @classmethod
    def _a_choice_is_one(cls, choice: object) -> object:
        if choice != "auto" and not isinstance(choice, bool):
            raise ValueError(f"{choice!r} is no choice here. There are: auto, true, false.")
        return choice


KINDS: dict[str, type[Part]] = {
    "prune": PruneStep,
    "recover": RecoverStep,
    "evaluate": EvaluateStep,
    "push": PushStep,
}


class Step(Part):
    """One step of a recipe: a mapping with a single key, the kind of step.

    >>> Step(prune={"sparsity": 0.5}).prune.method
    'wanda'
    """

    prune: PruneStep | None = None
    recover: RecoverStep | None = None
    evaluate: EvaluateStep | None = None
    push: PushStep | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_steps_take_defaults(cls, step: Any) -> Any:
        """Accept `evaluate` and `evaluate:` for `evaluate: {}`, and the steps' own models."""
        for name, kind in KINDS.items():
            if isinstance(step, kind):
                return {name: step}
        if isinstance(step, str):
            step = {step: None}
        if isinstance(step, dict):
            return {kind: {} if fields is None else fields for kind, fields in step.items()}
        return step

    @model_validator(mode="after")
    def _one_kind_per_step(self) -> Self:
        if len(self.model_fields_set) != 1:
            found = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(
                f"a step has one kind, and this has: {found}. "
                "Begin each step with a dash of its own: `- prune: {...}`, `- evaluate: {...}`."
            )
        return self

    @property
    def writes(self) -> bool:
        """Tell whether the step makes another model."""
        return self.evaluate is None and self.push is None


class Recipe(Part):
    """Everything a run is asked for.

    >>> recipe = Recipe(model="org/name", steps=[{"prune": {"sparsity": 0.5}}])
    >>> recipe.prune.sparsity, recipe.calibration.num_samples
    (0.5, 128)
    """

    model: str = Field(min_length=1)
    revision: str | None = None
    out: str | None = Field(default=None, min_length=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    max_memory: dict[str, str | int] | None = None
    trust_remote_code: bool = False
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    steps: tuple[Step, ...]

    @field_validator("calibration", mode="before")
    @classmethod
    def _an_empty_section_takes_defaults(cls, calibration: object) -> object:
        return {} if calibration is None else calibration

    @field_validator("max_memory", mode="before")
    @classmethod
    def _memory_is_readable(cls, limits: object) -> object:
        if limits is None:
            return None
        if not isinstance(limits, dict):
            raise ValueError(f"{limits!r} is not a mapping. Type `max_memory: {{cpu: 8GB}}`.")
        for device, limit in limits.items():
            if not isinstance(limit, int) and not _SIZE.fullmatch(str(limit)):
                raise ValueError(
                    f"{limit!r} for '{device}' is no size. "
                    "Give bytes or a number with a unit: KB, MB, GB, KiB, MiB or GiB, as in 8GB."
                )
        return {str(device): limit for device, limit in limits.items()}

    @field_validator("steps")
    @classmethod
    def _some_step_writes(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        if not any(step.writes for step in steps):
            raise ValueError("no step prunes. Add `- prune: {sparsity: 0.5}`.")
        for index, step in enumerate(steps):
            if step.push is not None and index + 1 < len(steps):
                raise ValueError(
                    f"step {index} pushes, and something comes after it. Put `- push: {{...}}` "
                    "last: what is pushed is the recipe's result."
                )
            if step.evaluate is not None and (index == 0 or not steps[index - 1].writes):
                raise ValueError(
                    f"step {index} evaluates, and one step may after each that prunes or recovers. "
                    "Measure anything else with `llmprune eval`."
                )
        return steps

    @model_validator(mode="after")
    def _a_training_has_text_that_is_there(self) -> Self:
        if self.calibration.data != ON_POLICY:
            return self
        for index, step in enumerate(self.steps):
            if step.recover is not None and step.recover.data == "auto":
                raise ValueError(
                    f"step {index} trains on the calibration text, which here is {ON_POLICY}: "
                    "written for a pruning alone. Give that step text of its own, such as "
                    "`- recover: {data: c4}`."
                )
        return self

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from the YAML file ``path`` with ``overrides`` such as ``seed=1``.

        Raises RecipeError (UnknownName for keys) with the file or the key path.
        """
        from llmprune.recipe.reading import build, override, read_recipe

        return build(override(read_recipe(path), overrides))

    def stages(self) -> tuple[Recipe, ...]:
        """Return recipes of one step that writes each, with the evaluation that follows it.

        Each but the first is of the model that the one before it writes.
        """
        steps = self.without_push().steps
        starts = [index for index, step in enumerate(steps) if step.writes]
        ends = [*starts[1:], len(steps)]
        return tuple(
            self.model_copy(update={"steps": steps[start:end]})
            for start, end in zip(starts, ends, strict=True)
        )

    def without_push(self) -> Recipe:
        """Return the recipe of the result alone, wherever that goes afterwards."""
        kept = tuple(step for step in self.steps if step.push is None)
        return self if kept == self.steps else self.model_copy(update={"steps": kept})

    @property
    def prune(self) -> PruneStep:
        """The first step that prunes."""
        return next(step.prune for step in self.steps if step.prune is not None)

    @property
    def recover(self) -> RecoverStep | None:
        """The first step that recovers, if there is one."""
        return next((step.recover for step in self.steps if step.recover is not None), None)

    @property
    def evaluate(self) -> EvaluateStep | None:
        """The step that evaluates, if there is one."""
        return next((step.evaluate for step in self.steps if step.evaluate is not None), None)

    @property
    def push(self) -> PushStep | None:
        """The step that pushes, if there is one."""
        return next((step.push for step in self.steps if step.push is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, defaults included, from which ``build`` makes an equal recipe."""
        data = self.model_dump(mode="json")
        for step in data["steps"]:
            for kind in [kind for kind, fields in step.items() if fields is None]:
                del step[kind]
        return data

    def to_yaml(self) -> str:
        """Return the recipe as YAML text that ``Recipe.read`` understands."""
        return dump(self.to_dict())

    def hash(self) -> str:
        """Return the SHA-256 of the recipe as canonical JSON, in hexadecimal."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
