"""From YAML, plain data and `key=value` to a recipe, with errors that start with the key path."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.recipe.dialect import load
from llmprune.recipe.models import KINDS, Recipe, Step
from llmprune.recipe.texts import Calibration, Part, Portion

_PLACES: dict[str, type[Part]] = {
    "": Recipe,
    "calibration.": Calibration,
    **{f"steps[{index}].{name}.": kind for index, (name, kind) in enumerate(KINDS.items())},
}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Read the YAML file ``path`` into plain data, not yet checked.

    Raises RecipeError with file and line where the file is missing or is not a YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {_why_unreadable(path, error)}") from error
    try:
        data = load(text)
    except RecipeError as error:
        raise RecipeError(f"{path}{error}") from error
    if not isinstance(data, dict):
        raise RecipeError(
            f"{path}, line 1: a recipe is a mapping of keys, and this file holds "
            f"{_kind(data)}. Begin with `model: NAME`."
        )
    return data


def build(data: Mapping[str, Any]) -> Recipe:
    """Make a recipe from plain data.

    Raises RecipeError, or UnknownName for a key that no section has; one line per mistake.

    >>> build({"model": "org/name", "steps": [{"prune": {"pattern": "2:4"}}]}).prune.sparsity
    0.5
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        mistakes = [_mistake(dict(one)) for one in error.errors(include_url=False)]
        kinds = {kind for kind, _ in mistakes}
        kind = UnknownName if kinds == {UnknownName} else RecipeError
        raise kind("\n".join(text for _, text in mistakes)) from None


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return ``data`` with assignments such as ``steps[0].prune.sparsity=0.6`` applied in order.

    Values are read as YAML. A path that begins with ``prune.``, ``recover.`` or ``evaluate.``
    means the first step of that kind, which is added if there is none. Raises RecipeError.

    >>> override({"seed": 0}, ["seed=1", "prune.pattern=2:4"])
    {'seed': 1, 'steps': [{'prune': {'pattern': '2:4'}}]}
    """
    changed = copy.deepcopy(dict(data))
    if "steps" in changed:
        changed["steps"] = _spelled_out(changed["steps"])
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise RecipeError(
                f"'{assignment}' is not an assignment. Type KEY=VALUE, as in "
                "`calibration.num_samples=256` or `prune.sparsity=0.6`."
            )
        try:
            value = load(text)
        except RecipeError as error:
            raise RecipeError(f"{path}: the value '{text}' is not YAML{error}") from error
        _assign(changed, path.strip(), value)
    return changed


def default_steps() -> list[dict[str, Any]]:
    """Return the steps of a run without a recipe: prune, then evaluate."""
    return [{"prune": {}}, {"evaluate": {}}]


def recovery_recipe(
    model: str,
    wish: Mapping[str, Any],
    top: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """Make the recipe of one recovery, from the keys of its step and those of the top that are
    given.

    Raises RecipeError, or UnknownName, as `build` does.

    >>> recovery_recipe("result", {"steps": 100}).recover.steps
    100
    """
    step = {key: value for key, value in wish.items() if value is not None}
    data = {"model": model, "steps": [{"recover": step}, {"evaluate": {}}]}
    data |= {key: value for key, value in (top or {}).items() if value is not None}
    return build(override(data, settings))


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Return one line per key whose value differs, with both values.

    >>> recipe = build({"model": "org/name", "steps": [{"prune": {"sparsity": 0.5}}]})
    >>> differences(recipe, recipe.model_copy(update={"seed": 1}))
    ['seed: 0 and 1']
    """
    left, right = dict(_leaves(old.to_dict())), dict(_leaves(new.to_dict()))
    return [
        f"{path}: {_value(left, path)} and {_value(right, path)}"
        for path in left | right
        if _value(left, path) != _value(right, path)
    ]


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    parts = [part for part in re.split(r"[.\[\]]+", path) if part]
    if parts and parts[0] in KINDS:
        parts = ["steps", str(_step_of_kind(data, parts[0])), *parts]
    if not parts:
        raise RecipeError(f"'{path}' names no key. Type one such as `seed` or `prune.sparsity`.")
    here: Any = data
    for part in parts[:-1]:
        here = _child(here, part, path)
    _child(here, parts[-1], path)  # an item that is not there is not made
    here[int(parts[-1]) if isinstance(here, list) else parts[-1]] = value


def _child(here: Any, part: str, path: str) -> Any:
    """Return what ``here`` holds under ``part``; an absent section is made."""
    if isinstance(here, list):
        if not part.isdecimal() or int(part) >= len(here):
            count = f"0 to {len(here) - 1}" if here else "none"
            raise RecipeError(f"{path}: there is no item '{part}'. The items there: {count}.")
        return here[int(part)]
    if isinstance(here, dict):
        if here.get(part) is None:
            here[part] = {}
        return here[part]
    raise RecipeError(f"{path}: '{part}' is below {here!r}, which holds no keys. Shorten the path.")


def _spelled_out(steps: Any) -> Any:
    """Return steps with the bare `evaluate` and `evaluate:` as `evaluate: {}`."""
    if not isinstance(steps, list):
        return steps
    steps = [{step: {}} if isinstance(step, str) else step for step in steps]
    return [
        {kind: {} if fields is None else fields for kind, fields in step.items()}
        if isinstance(step, dict)
        else step
        for step in steps
    ]


def _step_of_kind(data: dict[str, Any], kind: str) -> int:
    steps = data["steps"] = data.get("steps") or []
    if not isinstance(steps, list):
        raise RecipeError(f"steps: {steps!r} is not a list. Begin each step with a dash.")
    for index, step in enumerate(steps):
        if isinstance(step, dict) and kind in step:
            return index
    index = 0 if kind == "prune" else len(steps)
    steps.insert(index, {kind: {}})
    return index


def _mistake(error: dict[str, Any]) -> tuple[type[RecipeError], str]:
    """Turn one of pydantic's errors into our class and wording."""
    place = tuple(part for part in error["loc"] if not str(part).startswith("<"))  # a form of data
    path, kind, value = _path(place), error["type"], error["input"]
    own = error.get("ctx", {}).get("error")
    if own is not None:
        return (UnknownName if isinstance(own, UnknownName) else RecipeError), f"{path}: {own}"
    if kind == "extra_forbidden":
        return UnknownName, f"{path}: {_unknown_key(place)}"
    if kind == "missing":
        return RecipeError, f"{path}: missing; {_MISSING.get(path, 'give it a value.')}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return RecipeError, f"{path}: {value!r} is not a mapping. Type keys and values below it."
    if kind == "string_type" and isinstance(value, int | float):
        return RecipeError, f"{path}: {value!r} is a number here. Put quotes around it: '{value}'."
    reason = error["msg"].replace("Input should", "it should").replace("tuple", "list")
    return RecipeError, f"{path}: {value!r} does not fit; {reason}."


_MISSING = {
    "model": "name a folder or a model on the Hub: type `model: NAME` or `--model NAME`.",
    "steps": "say what to do: type `steps:` and below it `- prune: {sparsity: 0.5}`.",
}


def _unknown_key(location: tuple[int | str, ...]) -> str:
    name = str(location[-1])
    fields = list(_model_at(location[:-1]).model_fields)
    near = difflib.get_close_matches(name, fields, n=1)
    elsewhere = [place + name for place, model in _PLACES.items() if name in model.model_fields]
    hint = f" Did you mean '{(near or elsewhere)[0]}'?" if near or elsewhere else ""
    return f"there is no such key.{hint} The keys here: {', '.join(fields)}."


def _model_at(location: tuple[int | str, ...]) -> type[Part]:
    names = [part for part in location if isinstance(part, str)]
    models: dict[str, type[Part]] = {
        "calibration": Calibration,
        "data": Portion,
        "steps": Step,
        **KINDS,
    }
    return models[names[-1]] if names else Recipe


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or "recipe"


def _leaves(value: Any, path: tuple[int | str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of all scalars and lists of scalars."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = list(enumerate(value))
    else:
        yield _path(path), value
        return
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _value(leaves: Mapping[str, Any], path: str) -> str:
    return repr(leaves[path]) if path in leaves else "nothing"


def _why_unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "this is not text in UTF-8. Give a recipe in YAML."
    if path.is_dir():
        return "this is a folder. Give a recipe file in it."
    if path.exists():
        return f"{error}. Make the file readable."
    others = sorted(other.name for other in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, others, n=1)
    hint = f" Did you mean '{path.parent / near[0]}'?" if near else ""
    return f"there is no such file.{hint} Give the path of a recipe in YAML."


def _kind(data: Any) -> str:
    return "nothing" if data is None else f"a {type(data).__name__}"
