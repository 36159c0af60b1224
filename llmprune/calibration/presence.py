"""Whether the texts that a recipe names on this computer are there, before anything is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmprune.calibration.files import local_files
from llmprune.calibration.selection import AUTO, calibration_texts, place_of
from llmprune.recipe.texts import ON_POLICY, PARTS, Portion

if TYPE_CHECKING:
    from llmprune.recipe import Recipe


def check_texts(recipe: Recipe, *, calibrates: bool = True, measures: bool = False) -> None:
    """Check that files, folders and globs of a recipe hold something; nothing of them is read.

    `calibrates` tells whether the first cut reads a text. A text for perplexity counts where the
    recipe insists on that, as in the run, or `measures`. What is on the Hub is not asked for.

    Raises:
        RecipeError: a text is not there (UnknownName: nothing of its name); begins with its key.
    """
    for key, data in _named(recipe, calibrates, measures):
        if place_of(data) == "local":
            local_files(data, key)


def _named(recipe: Recipe, calibrates: bool, measures: bool) -> Iterator[tuple[str, str]]:
    """Yield keys and names of the texts that will be read."""
    trains = [step.recover for step in recipe.steps if step.recover is not None]
    if calibrates or any(wish.data == AUTO for wish in trains):
        yield from _keyed("calibration.data", calibration_texts(recipe))
        if recipe.calibration.data == ON_POLICY and recipe.calibration.prompts is not None:
            yield "calibration.prompts", recipe.calibration.prompts
    for wish in trains:
        if wish.data != AUTO:
            told = {"data": wish.data, **dict.fromkeys(PARTS)}
            text = recipe.calibration.model_copy(update=told)
            others = recipe.model_copy(update={"calibration": text})
            yield from _keyed("recover.data", calibration_texts(others))
    asked = recipe.evaluate
    if asked is not None and (measures or asked.perplexity is True) and asked.data != AUTO:
        yield "evaluate.data", asked.data


def _keyed(key: str, texts: Sequence[Portion]) -> Iterator[tuple[str, str]]:
    """Yield the key and name of each text; those of a mix are numbered, as in the run."""
    for place, text in enumerate(texts):
        yield f"{key}[{place}]" if len(texts) > 1 else key, text.data
