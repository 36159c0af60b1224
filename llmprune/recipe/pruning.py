"""A wish to remove weights, and what is wrong with one."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmprune.base.errors import UnknownName
from llmprune.base.registry import near_match
from llmprune.catalog import METHODS
from llmprune.catalog.types import LOW_RANK, UNITS
from llmprune.recipe.effort import beside, usual_parts
from llmprune.recipe.targets import TARGETS, amount_of
from llmprune.recipe.texts import Part

MOST = 0.9  # the highest sparsity that a search for a target looks at, unless a recipe says


class PruneStep(Part):
    """Which weights to remove; ``sparsity`` is the fraction removed (of N:M, 1 - N/M).

    ``sparsities`` gives linears, by glob, a share of their own, and implies the allocation manual;
    ``min_keep`` is the share of each linear that a ranking of the whole model leaves. ``solver``,
    ``refine`` and ``repair`` take the place of the method's own; ``none`` leaves one out.
    ``options`` are the numbers of score, allocation and repair, by name. With ``effort`` what is
    not given follows from one dial. With ``target`` sparsity is the most that may be removed.
    Of whole units, ``multiple`` divides the channels that stay, and ``parallel`` devices can share
    heads and channels.

    >>> PruneStep(pattern="2:4").sparsity
    0.5
    """

    method: str = "wanda"
    pattern: str = "unstructured"
    target: dict[str, str] | None = None
    sparsity: float = Field(default=None, validate_default=True)
    group: Literal["row", "matrix", "mass"] | None = None
    allocation: str | None = None
    sparsities: dict[str, float] | None = Field(default=None, validate_default=True)
    min_keep: float | None = None
    skip: tuple[str, ...] = ()
    propagate: Literal["pruned", "dense"] = "pruned"
    form: Literal["auto", "masked", "shrunk"] = "auto"
    tier: Literal["auto", "E0", "E1", "E2", "E3"] = "auto"
    multiple: int | None = Field(default=None, ge=1)
    parallel: int = Field(default=1, ge=1)
    regrow: bool = False
    effort: Literal["fast", "good", "best"] | None = None
    solver: str | None = None
    refine: str | None = None
    repair: str | None = None
    reduce: Literal["reader", "sum", "mean", "max"] | None = None
    permute: bool = False
    damping: float = Field(default=0.01, gt=0, le=1)
    damp: Literal["mean", "diag"] = "mean"
    options: dict[str, float] = Field(default_factory=dict)
    adopt: Literal["better", "always"] = "better"
    max_reads: int = Field(default=100, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _dial_and_method_set_what_is_not_given(cls, step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        if step.get("effort") is not None:
            step = {**beside(step), **step}
        elif isinstance(pattern := step.get("pattern"), str) and "method" not in step:
            step = {**usual_parts(pattern, step.get("target")), **step}
        name = step.get("method", "wanda")
        method = METHODS.get(name) if isinstance(name, str) else None
        if method is not None:
            step = {"pattern": method.pattern, "propagate": method.propagate, **step}
        return step

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
        elif sides := re.fullmatch(r"(\d+)x(\d+)", pattern):
            if int(sides[1]) * int(sides[2]) < 2:
                raise ValueError(
                    f"'{pattern}' is no tile. HxW removes whole tiles of H outputs by W inputs, "
                    "as in '16x16'; for single weights type 'unstructured'."
                )
        elif pattern not in ("unstructured", LOW_RANK) and not set(pattern.split("+")) <= {*UNITS}:
            wrong = next(name for name in pattern.split("+") if name not in UNITS)
            hint = near_match(wrong, ("unstructured", LOW_RANK, *UNITS))
            raise UnknownName(
                f"'{pattern}' is no pattern.{hint} There are: unstructured, N:M such as 2:4, which "
                "keeps N of every M weights, HxW such as 16x16, which removes whole tiles of H "
                f"outputs by W inputs, low-rank, and units: {', '.join(UNITS)}, or several with a "
                "plus, such as ffn-channels+heads."
            )
        return pattern

    @field_validator("target", mode="before")
    @classmethod
    def _target_is_readable(cls, target: object, info: ValidationInfo) -> object:
        if target is None:
            return None
        pairs = list(target.items()) if isinstance(target, dict) else []
        if len(pairs) != 1 or pairs[0][0] not in TARGETS:
            known = "; ".join(f"{key}, {what}" for key, what in TARGETS.items())
            raise ValueError(
                f"{target!r} is no target. Give one: {known}. Type `target: {{ppl: +5%}}` or "
                "`--target ppl=+5%`."
            )
        key, text = pairs[0]
        pattern = info.data.get("pattern", "unstructured")
        if key == "ppl" and allowed_loss(text) is None:
            raise ValueError(
                f"{target!r} is no target. Of ppl it is what perplexity may rise to: type "
                "`target: {ppl: +5%}` or `--target ppl=+5%` for a twentieth more than the dense "
                "model's, or `ppl=12.5` for the value itself."
            )
        if key != "ppl":
            amount_of(key, str(text))
            if pattern == "unstructured" or pattern[:1].isdigit():
                raise ValueError(
                    f"{key} changes only where tensors get smaller, and pattern '{pattern}' leaves "
                    "zeros in tensors of the old shape. Type --pattern ffn-channels, or others of "
                    "whole units."
                )
        if _n_of_m(info.data.get("pattern", "1:2")):
            raise ValueError(
                f"pattern '{info.data['pattern']}' fixes the sparsity, so there is none to find. "
                "Leave the target out, or choose pattern unstructured."
            )
        return {key: str(text)}

    @field_validator("sparsity", mode="before")
    @classmethod
    def _sparsity_is_given(cls, sparsity: object, info: ValidationInfo) -> object:
        if sparsity is not None:
            return sparsity
        counts = _n_of_m(info.data.get("pattern", "1:2"))  # an illegal pattern is reported itself
        if counts is None and info.data.get("target", True):  # a wrong one is reported itself
            return MOST
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

    @field_validator("sparsities")
    @classmethod
    def _shares_are_legal(
        cls, sparsities: dict[str, float] | None, info: ValidationInfo
    ) -> dict[str, float] | None:
        allocation = info.data.get("allocation")
        if not sparsities:
            if allocation == "manual" or sparsities is not None:
                raise ValueError(
                    "no linear is named, but allocation manual needs shares. Type for example "
                    "`sparsities: {'*down_proj': 0.3}`; linears not named share what is left."
                )
            return None
        if allocation not in (None, "manual"):
            raise ValueError(
                f"shares for single linears contradict allocation '{allocation}'. Leave one out."
            )
        for glob, share in sparsities.items():
            if not 0 <= share < 1:
                raise ValueError(
                    f"{share:g} for '{glob}' is not a fraction. It is the part of the linear "
                    f"removed, at least 0 and below 1; {_suggestion(share)}"
                )
        return sparsities

    @field_validator("min_keep")
    @classmethod
    def _share_kept_is_legal(cls, share: float | None) -> float | None:
        if share is not None and not 0 <= share < 1:
            raise ValueError(
                f"{share:g} is not a fraction. It is the part of each linear that stays whatever "
                "its rank, at least 0 and below 1; type 0.05 to keep a twentieth."
            )
        return share

    @field_validator("skip", mode="before")
    @classmethod
    def _one_glob_is_a_list_of_one(cls, skip: object) -> object:
        return (skip,) if isinstance(skip, str) else skip


def allowed_loss(text: object) -> tuple[Literal["rise", "value"], float] | None:
    """Return what a target of perplexity says: the share it may rise by, or the value it may have.

    >>> allowed_loss("+5%"), allowed_loss("12.5"), allowed_loss("little")
    (('rise', 0.05), ('value', 12.5), None)
    """
    found = re.fullmatch(r"\+?\s*(\d+(?:\.\d+)?)\s*(%?)", str(text).strip())
    if found is None or float(found[1]) <= 0:
        return None
    return ("rise", float(found[1]) / 100) if found[2] else ("value", float(found[1]))


def _n_of_m(pattern: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def _suggestion(sparsity: float) -> str:
    if 1 < sparsity < 100:
        return f"did you mean {sparsity / 100:g}?"
    return "type 0.5 to remove half."
