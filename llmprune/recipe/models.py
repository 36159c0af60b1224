"""What the user wants, as frozen models that say what is wrong with a wish."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llmprune.base.errors import UnknownName
from llmprune.recipe.dialect import dump

PATTERNS = ("unstructured", "N:M", "ffn-channels")

_SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B", re.IGNORECASE)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Part):
    """The text that statistics are learnt from, and how it is cut into windows of tokens."""

    data: str = "demo"
    num_samples: int = Field(default=128, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    bos: bool = False
    column: str | None = None


class PruneStep(_Part):
    """Which weights to remove; ``sparsity`` is the fraction removed (of N:M, 1 - N/M).

    >>> PruneStep(pattern="2:4").sparsity
    0.5
    """

    method: str = "wanda"
    pattern: str = "unstructured"
    sparsity: float = Field(default=None, validate_default=True)
    group: Literal["row", "matrix"] | None = None
    skip: tuple[str, ...] = ()
    propagate: Literal["pruned", "dense"] = "pruned"
    form: Literal["auto", "masked", "shrunk"] = "auto"
    multiple: int | None = Field(default=None, ge=1)
    regrow: bool = False

    @field_validator("pattern")
    @classmethod
    def _pattern_is_legal(cls, pattern: str) -> str:
        if counts := _n_of_m(pattern):
            kept, of = counts
            if not 0 < kept < of:
                hint = f" Did you mean '{of}:{kept}'?" if 0 < of < kept else ""
                raise ValueError(
                    f"'{pattern}' would keep {kept} of every {of} weights. "
                    f"N:M keeps N of every M, with 0 < N < M, as in '2:4'.{hint}"
                )
        elif pattern not in PATTERNS or pattern == "N:M":
            raise UnknownName(
                f"'{pattern}' is no pattern. There are: unstructured, ffn-channels, and N:M such "
                f"as 2:4, which keeps N of every M weights."
            )
        return pattern

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity_is_given(cls, sparsity: object, info: ValidationInfo) -> object:
        if sparsity is not None:
            return sparsity
        counts = _n_of_m(info.data.get("pattern", "1:2"))  # an illegal pattern is reported itself
        if counts is None:
            raise ValueError(
                f"missing; pattern '{info.data['pattern']}' needs the fraction to remove. "
                "Type `sparsity: 0.5` in the recipe or `--sparsity 0.5`."
            )
        return 1 - counts[0] / counts[1]

    @field_validator("sparsity")
    @classmethod
    def _sparsity_is_legal(cls, sparsity: float, info: ValidationInfo) -> float:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"{sparsity:g} is not a fraction. Sparsity is the part removed, at least 0 and "
                f"below 1; {_suggestion(sparsity)}"
            )
        counts = _n_of_m(info.data.get("pattern", ""))
        if counts is None:
            return sparsity
        exact = 1 - counts[0] / counts[1]
        if not math.isclose(sparsity, exact, abs_tol=1e-3):
            raise ValueError(
                f"{sparsity:g} contradicts pattern '{info.data['pattern']}', which keeps "
                f"{counts[0]} of every {counts[1]} and so removes {exact:.4g}. "
                "Leave sparsity out, or choose another pattern."
            )
        return exact

    @field_validator("skip", mode="before")
    @classmethod
    def _one_glob_is_a_list_of_one(cls, skip: object) -> object:
        return (skip,) if isinstance(skip, str) else skip


class EvaluateStep(_Part):
    """Measure the result; ``perplexity: auto`` leaves out what the model cannot do."""

    perplexity: Literal["auto"] | bool = "auto"
    data: str = "demo"
    num_windows: int = Field(default=16, ge=1)

    @field_validator("perplexity", mode="before")
    @classmethod
    def _perplexity_is_a_choice(cls, perplexity: object) -> object:
        if perplexity != "auto" and not isinstance(perplexity, bool):
            raise ValueError(f"{perplexity!r} is no choice here. There are: auto, true, false.")
        return perplexity


class Step(_Part):
    """One step of a recipe: a mapping with a single key, the kind of step.

    >>> Step(prune={"sparsity": 0.5}).prune.method
    'wanda'
    """

    prune: PruneStep | None = None
    evaluate: EvaluateStep | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_steps_take_defaults(cls, step: Any) -> Any:
        """Accept `evaluate` and `evaluate:` for `evaluate: {}`, and the steps' own models."""
        if isinstance(step, PruneStep | EvaluateStep):
            return {"prune" if isinstance(step, PruneStep) else "evaluate": step}
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


class Recipe(_Part):
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
    def _one_step_prunes(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        positions = [index for index, step in enumerate(steps) if step.prune]
        if not positions:
            raise ValueError("no step prunes. Add `- prune: {sparsity: 0.5}`.")
        if len(positions) > 1:
            raise ValueError(
                f"steps {positions[0]} and {positions[1]} both prune; one per run is supported. "
                "Put the second into a recipe of its own, whose `model` is the first one's `out`."
            )
        others = [index for index, step in enumerate(steps) if step.evaluate]
        if len(others) > 1 or (others and others[0] < positions[0]):
            raise ValueError(
                f"step {others[0]} evaluates; one step after the pruning may. Measure "
                "anything else with `llmprune eval`."
            )
        return steps

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from the YAML file ``path`` with ``overrides`` such as ``seed=1``.

        Raises RecipeError (UnknownName for keys) with the file or the key path.
        """
        from llmprune.recipe.reading import build, override, read_recipe

        return build(override(read_recipe(path), overrides))

    @property
    def prune(self) -> PruneStep:
        """The one step that prunes."""
        return next(step.prune for step in self.steps if step.prune is not None)

    @property
    def evaluate(self) -> EvaluateStep | None:
        """The step that evaluates, if there is one."""
        return next((step.evaluate for step in self.steps if step.evaluate is not None), None)

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


def _n_of_m(pattern: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def _suggestion(sparsity: float) -> str:
    if 1 < sparsity < 100:
        return f"did you mean {sparsity / 100:g}?"
    return "type 0.5 to remove half."
