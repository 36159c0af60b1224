"""The text to evaluate on: bundled, of files, or a data set as the papers join it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from llmprune.base.errors import RecipeError
from llmprune.calibration.chat import Chats
from llmprune.calibration.documents import Text, open_text
from llmprune.calibration.presets import PRESETS
from llmprune.calibration.selection import AUTO, DEMO, EVALUATION, demo_file
from llmprune.recipe.texts import Portion

_MOST_CHARACTERS = 20_000_000  # of a data set that is no preset; WikiText-2's test text has 1.3e6


def evaluation_text(data: str, *, key: str = "evaluate.data", tokenizer: Any = None) -> str:
    """Return the text to evaluate on: "demo", a preset, files, or a data set on the Hub.

    wikitext2 is its test split, all lines joined with an empty line; c4 the first 1100 documents of
    a validation file, joined with a space (both as in SparseGPT, arXiv:2301.00774). The documents
    of other texts are joined with an empty line, files in their own order. Of a data set that is no
    preset the split test or validation is taken, at most 20 million characters of it.
    ``tokenizer`` brings the template of chats.

    Raises RecipeError that begins with ``key``.
    """
    if not isinstance(data, str) or not data.strip():
        raise RecipeError(
            f"{key}: {data!r} names no text. Give demo, wikitext2, c4, a file, or a data set on "
            "the Hub as OWNER/NAME."
        )
    name = EVALUATION if data == AUTO else data
    if name == DEMO:
        return demo_file("evaluation.txt").read_text(encoding="utf-8")
    text = open_text(Portion(data=name), key=key, use="evaluation")
    preset = PRESETS.get(name)
    if preset is None:
        return "\n\n".join(_some(text, Chats(tokenizer)))
    documents = text.documents(None, Chats(tokenizer))
    return preset.joint.join(islice(documents, preset.num_documents))


def most_windows(data: str) -> int | None:
    """Return how many windows of a text the papers score; none where they score all.

    >>> most_windows("c4")
    256
    """
    return PRESETS[data].num_windows if data in PRESETS else None


def _some(text: Text, chats: Chats) -> Iterator[str]:
    """Yield documents: all of files, of a data set on the Hub until there is enough."""
    size = 0
    for document in text.documents(None, chats):
        yield document
        size += len(document)
        if text.is_remote and size >= _MOST_CHARACTERS:
            return
