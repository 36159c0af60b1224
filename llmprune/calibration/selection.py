"""Which texts a recipe means: names, the short form of a mix, and what `auto` stands for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Literal

from llmprune.base.errors import RecipeError
from llmprune.calibration.presets import PRESETS
from llmprune.checkpoint.source import read_json
from llmprune.recipe.models import Recipe
from llmprune.recipe.texts import ON_POLICY, PARTS, Portion

DEMO, AUTO, HUB = "demo", "auto", "hub:"
RANDOM = "random-tokens"  # no text at all
CALIBRATION, EVALUATION = "c4", "wikitext2"  # what `auto` stands for, except for the demo

SUFFIXES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_WEIGHED = re.compile(r"(?P<name>.+?)(?::(?P<weight>\d{1,9}(?:\.\d{1,9})?))?")

Place = Literal["demo", "preset", "local", "hub", "drawn", "written"]


def calibration_texts(recipe: Recipe) -> tuple[Portion, ...]:
    """Return the texts to calibrate on, `auto` and the short form of a mix resolved.

    >>> from llmprune.recipe import build
    >>> steps = [{"prune": {"sparsity": 0.5}}]
    >>> wish = {"model": "owner/name", "steps": steps, "calibration": {"data": "c4:3,ultrachat"}}
    >>> [(text.data, text.weight) for text in calibration_texts(build(wish))]
    [('c4', 3.0), ('ultrachat', 1.0)]

    Raises:
        RecipeError: a weight is zero, text that the model writes is part of a mix, or split,
            config, revision or column stand beside one.
    """
    wish = recipe.calibration
    texts = _texts(wish.data) if isinstance(wish.data, str) else wish.data
    if len(texts) > 1 and any(text.data == ON_POLICY for text in texts):
        raise RecipeError(
            f"calibration.data: {ON_POLICY} is no part of a mix: the model writes all windows or "
            f"none. Type --calib {ON_POLICY} alone, with calibration.prompts for what it begins "
            "from."
        )
    given = {name: value for name in PARTS if (value := getattr(wish, name)) is not None}
    if given and len(texts) > 1:
        raise RecipeError(
            f"calibration.{next(iter(given))}: of which text in '{wish.data}'? Give `calibration."
            f"data` as a list: [{{data: c4, weight: 3, {next(iter(given))}: NAME}}, ...]."
        )
    auto = DEMO if is_demo(recipe.model) else CALIBRATION
    return tuple(
        text.model_copy(update=given | ({"data": auto} if text.data == AUTO else {}))
        for text in texts
    )


def evaluation_data(recipe: Recipe) -> str:
    """Return the text to evaluate on: as asked; else the demo's with it or its text; or WikiText-2.

    >>> from llmprune.recipe import build, default_steps
    >>> wish = {"model": "owner/name", "steps": [{"prune": {"sparsity": 0.5}}, "evaluate"]}
    >>> evaluation_data(build(wish))
    'wikitext2'
    """
    asked = recipe.evaluate.data if recipe.evaluate else AUTO
    if asked != AUTO:
        return asked
    calibrated = {text.data for text in calibration_texts(recipe)}
    return DEMO if is_demo(recipe.model) or calibrated == {DEMO} else EVALUATION


def name_of(texts: Iterable[Portion]) -> str:
    """Return texts by name, with weights where there are several.

    >>> name_of([Portion(data="c4", weight=3), Portion(data="ultrachat")])
    'c4:3,ultrachat:1'
    """
    texts = list(texts)
    if len(texts) == 1:
        return texts[0].data
    return ",".join(f"{text.data}:{text.weight:g}" for text in texts)


def is_demo(model: str) -> bool:
    """Tell whether a model is the bundled one, by name or by its folder, or was made from it."""
    if model == DEMO:
        return True
    folder = Path(model)
    if not folder.is_dir():
        return False
    record = folder / "llmprune" / "run.json"
    made_from = read_json(record).get("origin", {}).get("name") if record.is_file() else None
    return made_from == DEMO or folder.resolve() == demo_file("model").resolve()


def demo_file(name: str) -> Path:
    """Return the path of a bundled file."""
    return Path(str(resources.files("llmprune") / "demo" / name))


def place_of(data: str) -> Place:
    """Tell where a text is; a file or folder comes before a repository of the same name.

    >>> place_of("c4"), place_of("allenai/c4"), place_of("missing/text.jsonl")
    ('preset', 'hub', 'local')
    """
    if data == DEMO:
        return "demo"
    if data == RANDOM:
        return "drawn"
    if data == ON_POLICY:
        return "written"
    if data in PRESETS:
        return "preset"
    if data.startswith(HUB):
        return "hub"
    if _is_local(data) or suffix_of(data) is not None:
        return "local"
    return "hub" if _ID.fullmatch(data) else "local"


def suffix_of(name: str | Path) -> str | None:
    """Return the ending of a file name that says how to read it.

    >>> suffix_of("a/b.JSON.GZ")
    '.json.gz'
    """
    lower = str(name).lower()
    return next((end for end in reversed(SUFFIXES) if lower.endswith(end)), None)


def sibling(key: str, name: str) -> str:
    """Return the key beside a text's name: `calibration.split`, `calibration.data[1].split`."""
    return f"{key}.{name}" if key.endswith("]") else f"{key.rpartition('.')[0] or key}.{name}"


def _texts(data: str) -> tuple[Portion, ...]:
    """Return what one string names: a text, or several as in `c4:3,ultrachat:1`."""
    parts = [part.strip() for part in data.split(",")]
    found = [_WEIGHED.fullmatch(part) for part in parts]
    weighed = [match for match in found if match is not None]
    is_mix = len(parts) > 1 or (weighed and weighed[0]["weight"] is not None)
    if not is_mix or _is_local(data) or len(weighed) < len(parts):
        return (Portion(data=data),)
    for match in weighed:
        if match["weight"] is not None and float(match["weight"]) == 0:
            raise RecipeError(
                f"calibration.data: '{match[0]}' weighs nothing. Give a weight above 0, as in "
                "'c4:3,ultrachat:1', or leave it out."
            )
    return tuple(
        Portion(data=match["name"], weight=float(match["weight"] or 1)) for match in weighed
    )


def _is_local(data: str) -> bool:
    path = os.path.expanduser(data)  # names too long for a file are none
    return os.path.exists(path) or (glob.has_magic(data) and bool(glob.glob(path, recursive=True)))
