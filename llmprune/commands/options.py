"""What several commands take: folders, and flags that are read in one way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmprune.base.errors import RecipeError

PPL, TASKS = "Perplexity", "Tasks"  # panels of help

Folder = Annotated[Path, typer.Argument(help="A folder that llmprune wrote.")]


def bos_of(policy: str) -> bool | str:
    """Return the policy that a word names; what is none is left to be refused."""
    return {"true": True, "false": False}.get(policy.lower(), policy)


def numbers_of(flag: str, text: str) -> list[int]:
    """Return the whole numbers of `1,4`.

    Raises:
        RecipeError: it is not of this form.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"{flag}: {text!r} is not a list of whole numbers. Type --{flag} 1,4."
        ) from None


def dtype_of(name: str) -> str:
    """Return the name of a dtype to compute in.

    Raises:
        RecipeError: it is none.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"dtype: {name!r} is none of float32, bfloat16, float16.")
    return name
