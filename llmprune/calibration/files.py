"""Rows of files: text, JSON and Parquet, here or on the Hub."""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.calibration.presets import PRESETS
from llmprune.calibration.selection import DEMO, SUFFIXES, demo_file, place_of, suffix_of
from llmprune.recipe.texts import ON_POLICY

Row = dict[str, Any]

_BATCH_ROWS = 256
_BUFFER_BYTES = 4 << 20  # read at once of a column in a large row group
_FORMATS = f"Give files that end in {', '.join(SUFFIXES)}."


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that have the same columns: of one file, or of a split on the Hub."""

    name: str
    read: Callable[[], Iterator[Row]]
    column: str | None = None  # the one that holds the text, where the format fixes it


def local_files(data: str, key: str) -> list[Path]:
    """Return the files that a path, folder or glob means, sorted; at least one.

    Raises:
        RecipeError: there is nothing to read (UnknownName: nothing of that name).
    """
    if place_of(data) == "demo":
        return [demo_file("calibration.txt")]
    path = Path(data).expanduser()
    if os.path.isfile(path):  # also for a name too long for a file
        if suffix_of(path) is None:
            raise RecipeError(f"{key}: cannot read '{data}' by its name. {_FORMATS}")
        return [path]
    is_folder = os.path.isdir(path)
    found = path.rglob("*") if is_folder else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.is_file() and suffix_of(file))
    if files:
        return files
    if is_folder or glob.has_magic(data):
        raise RecipeError(f"{key}: '{data}' holds no file that can be read. {_FORMATS}")
    raise UnknownName(f"{key}: {_not_found(data, path)}")


def local_parts(
    files: Sequence[Path], *, columns: Sequence[str] | None, seed: int | None, key: str
) -> Iterator[Part]:
    """Yield files as parts, in an order drawn by ``seed``, or else in their own."""
    order = list(files)
    if seed is not None:
        random.Random(seed).shuffle(order)
    for file in order:
        yield _part(file, columns, key)


def table_rows(file: IO[bytes], name: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of an open table, of the kind that its name ends in.

    Of Parquet only ``columns`` are read, where the file has them all.
    """
    suffix = suffix_of(name) or ""
    if suffix == ".parquet":
        yield from _parquet_rows(file, columns)
    elif suffix.endswith(".gz"):
        with gzip.open(file) as unpacked:
            yield from _json_rows(cast(IO[bytes], unpacked))
    else:
        yield from _json_rows(file)


def _parquet_rows(file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    """Yield the rows of a Parquet file, reading no row group before it is needed.

    pyarrow's scanner, which `datasets` streams with, reads tens of megabytes ahead in threads of
    its own, and ends the process with an abort when it is left in the middle.
    """
    from pyarrow import parquet

    table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES)
    names = set(table.schema_arrow.names)
    wanted = list(columns) if columns and names.issuperset(columns) else None
    for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted, use_threads=False):
        yield from batch.to_pylist()


def _json_rows(file: IO[bytes]) -> Iterator[Row]:
    """Yield the objects of JSON lines, or of one array; strings are texts."""
    first = next((line for line in file if line.strip()), b"").removeprefix(codecs.BOM_UTF8)
    if first.lstrip().startswith(b"["):
        values = iter(json.loads(first + file.read()))
    else:
        values = (json.loads(line) for line in itertools.chain([first], file) if line.strip())
    for value in values:
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, dict):
            raise ValueError(f"a row is {type(value).__name__}, not an object with columns")
        yield row


def _part(file: Path, columns: Sequence[str] | None, key: str) -> Part:
    if suffix_of(file) == ".txt":
        return Part(name=str(file), read=lambda: _text(file, key), column="text")
    return Part(name=str(file), read=lambda: _table(file, columns, key))


def _text(file: Path, key: str) -> Iterator[Row]:
    try:
        yield {"text": file.read_text(encoding="utf-8-sig")}
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{key}: cannot read '{file}': {error}. Give text in UTF-8.") from error


def _table(file: Path, columns: Sequence[str] | None, key: str) -> Iterator[Row]:
    """Yield the rows of a table; say which cannot be read. An empty file has none."""
    try:
        if file.stat().st_size:
            with file.open("rb") as handle:
                yield from table_rows(handle, file.name, columns)
    except Exception as error:  # each format's library raises its own
        raise RecipeError(
            f"{key}: cannot read '{file}': {type(error).__name__}: {error}. "
            "Give a whole file, in the format that its name ends in."
        ) from error


def _not_found(data: str, path: Path) -> str:
    folder = path.parent
    files = [file.name for file in folder.iterdir()] if os.path.isdir(folder) else []
    if path.name in files:
        return f"'{data}' is no file but a device, a pipe or a link to nothing. {_FORMATS}"
    known = [DEMO, *PRESETS]
    near_files = difflib.get_close_matches(path.name, sorted(files), n=1)
    near = difflib.get_close_matches(data, [*known, ON_POLICY], n=1) or [
        str(folder / n) for n in near_files
    ]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return (
        f"'{data}' is neither a known text ({', '.join(known)}) nor a file.{hint} "
        "Give one of these, a file, a folder, or a data set on the Hub as OWNER/NAME."
    )
