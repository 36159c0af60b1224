"""Rows to documents: which column holds the text, and chats through the template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.base.errors import RecipeError
from llmprune.base.registry import unknown
from llmprune.calibration.chat import COLUMNS, PAIRS, Chats, messages_of
from llmprune.calibration.files import Part, Row, local_files, local_parts
from llmprune.calibration.hub import HubText, Use, open_hub_text
from llmprune.calibration.presets import PRESETS
from llmprune.calibration.selection import place_of, sibling
from llmprune.recipe.texts import Portion

Reader = Callable[[Row], str | None]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that is there and can be read: files, or a split on the Hub at one commit."""

    wish: Portion
    key: str
    source: HubText | tuple[Path, ...]

    @property
    def is_remote(self) -> bool:
        """Tell whether reading needs the Hub."""
        return isinstance(self.source, HubText)

    @property
    def lines(self) -> bool:
        """Tell whether the rows are the lines of one text."""
        return self.wish.data in PRESETS and PRESETS[self.wish.data].lines

    def documents(self, seed: int | None = None, chats: Chats | None = None) -> Iterator[str]:
        """Yield documents, files in an order drawn by ``seed``, or in their own.

        The lines of one text are one document. ``chats`` writes conversations.

        Raises:
            RecipeError: there is no text, or it cannot be read; begins with the key.
        """
        chats = Chats() if chats is None else chats
        rows = self.rows(seed, chats)
        found = iter(["\n\n".join(rows)]) if self.lines else (text for text in rows if text.strip())
        empty = True
        for text in found:
            empty = empty and not text.strip()
            yield text
        if empty and chats.num_refused:
            raise chats.refused(f"'{self.wish.data}'", self.key)
        if empty:
            raise RecipeError(f"{self.key}: there is no text in it. Give a file that holds some.")

    def rows(self, seed: int | None, chats: Chats) -> Iterator[str]:
        """Yield the text of every row that has one, blank ones too."""
        for part in self._parts(seed):
            read: Reader | None = None
            for row in part.read():
                read = read or self._reader(row, part, chats)
                text = read(row)
                if text is not None:
                    yield text

    def record(self) -> dict[str, Any]:
        """Return what a report says of the text."""
        asked = self.wish.model_dump(include={"data", "weight", "column"})
        if isinstance(self.source, HubText):
            return asked | self.source.record()
        return asked | {"files": [path.name for path in self.source[:16]]}

    def _parts(self, seed: int | None) -> Iterator[Part]:
        if isinstance(self.source, HubText):
            return self.source.parts(seed)
        columns = (self.wish.column,) if self.wish.column else None
        return local_parts(self.source, columns=columns, seed=seed, key=self.key)

    def _reader(self, row: Row, part: Part, chats: Chats) -> Reader:
        """Return what makes a document of a row, decided by the first one."""
        asked = part.column or self.wish.column
        if asked is not None and asked not in row:
            raise unknown(sibling(self.key, "column"), asked, row)
        names = (asked,) if asked is not None else _columns(row, part.name, self.key)
        if len(names) == 2:
            return lambda row: self._pair(row, names, part, chats)
        return lambda row: self._cell(row.get(names[0]), names[0], part, chats)

    def _cell(self, value: object, column: str, part: Part, chats: Chats) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if value == []:  # a conversation without a message
            return None
        what = f"column '{column}' of '{part.name}'"
        messages = messages_of(value)
        if messages is None:
            raise RecipeError(
                f"{self.key}: {what} holds {type(value).__name__}, not text. Give a column of text "
                "or of chats: lists of messages with role and content."
            )
        return chats.text(messages, what=what, key=self.key)

    def _pair(self, row: Row, names: tuple[str, ...], part: Part, chats: Chats) -> str | None:
        question, answer = row.get(names[0]), row.get(names[1])
        if not isinstance(question, str) or not isinstance(answer, str):
            return None
        more = row.get("input")
        if names[0] == "instruction" and isinstance(more, str) and more.strip():
            question = f"{question}\n\n{more}"
        return chats.pair(question, answer, what=f"'{part.name}'", key=self.key)


def open_text(wish: Portion, *, key: str = "calibration.data", use: Use = "calibration") -> Text:
    """Find a text: a bundled one, files, or on the Hub, where its commit and split are resolved.

    Raises:
        RecipeError: it is not there, or cannot be reached; begins with ``key``.
    """
    if place_of(wish.data) in ("preset", "hub"):
        return Text(wish=wish, key=key, source=open_hub_text(wish, key, use=use))
    wrong = next((name for name in ("split", "config", "revision") if getattr(wish, name)), None)
    files = tuple(local_files(wish.data, key))
    if wrong is not None:
        raise RecipeError(
            f"{sibling(key, wrong)}: '{wish.data}' is no data set on the Hub, and has no {wrong}. "
            "Leave that out, or name the file that is meant."
        )
    return Text(wish=wish, key=key, source=files)


def read_documents(
    data: str, *, seed: int, column: str | None = None, key: str = "calibration.data"
) -> Iterator[str]:
    """Yield the documents of ``data``, its files in an order drawn by ``seed``.

    ``data`` is "demo", a preset, a file (.txt, which is one document; .jsonl or .json, also with
    .gz; .parquet), a folder of such files, a glob, or a data set on the Hub. In tables ``column``
    holds the text; by default "text", a column of chats, an instruction with its output, or else
    the only column of text. Nothing is read before the first document is asked for.

    Raises RecipeError (UnknownName where nothing is called so) that begins with ``key``.

    >>> next(read_documents("demo", seed=0))[:20]
    '_But who shall dwell'
    """
    yield from open_text(Portion(data=data, column=column), key=key).documents(seed)


def _columns(row: Row, name: str, key: str) -> tuple[str, ...]:
    """Return the column of a table that holds text or chats, or two: a question and its answer."""
    texts = [column for column, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return ("text",)
    for column in COLUMNS:
        if row.get(column) == [] or messages_of(row.get(column)) is not None:
            return (column,)
    for pair in PAIRS:
        if set(pair) <= set(texts):
            return pair
    if len(texts) == 1:
        return (texts[0],)
    raise RecipeError(
        f"{key}: which column of '{name}' holds the text is not clear. The columns: "
        f"{', '.join(row)}. Name it 'text', or type `calibration.column=NAME` for calibration."
    )
