"""Text to batches of tokens: documents from files, windows of one length, seeded and hashed.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import random
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import RecipeError, UnknownName
from llmprune.base.registry import unknown

PRESETS = {"demo": "calibration.txt"}

_READERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}
_PIECE = 100_000  # characters that go to the tokenizer at once; some are quadratic in the length
_READ_AHEAD = 4  # windows read for each one drawn
_BUFFER_DOCUMENTS, _BUFFER_CHARACTERS = 1000, 16_000_000


def read_documents(
    data: str, *, seed: int, column: str | None = None, key: str = "calibration.data"
) -> Iterator[str]:
    """Yield the documents of ``data``, its files in an order drawn by ``seed``.

    ``data`` is "demo", a file (.txt, which is one document; .jsonl or .json, also with .gz;
    .parquet), a folder of such files or a glob. In tables ``column`` holds the text: by default
    "text", or else the only column of text. Nothing is read before the first document is asked for.

    Raises RecipeError (UnknownName where nothing is called so) that begins with ``key``.

    >>> next(read_documents("demo", seed=0))[:20]
    '_But who shall dwell'
    """
    files = _files(data, key)
    random.Random(seed).shuffle(files)
    return _documents(files, column, key)


def evaluation_text(data: str, *, key: str = "evaluate.data") -> str:
    """Return the text to evaluate on: "demo", or what ``read_documents`` reads, in its own order.

    Documents are joined with an empty line, as the papers join WikiText-2 for their perplexities.
    Raises RecipeError that begins with ``key``.
    """
    if data == "demo":
        return _demo("evaluation.txt").read_text(encoding="utf-8")
    return "\n\n".join(_documents(_files(data, key), None, key))


def tokenize_windows(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
) -> tuple[Tensor, str | None]:
    """Cut documents into windows of ``seq_len`` tokens; return them (N, T) int64, and a notice.

    Documents are shuffled, tokenized without special tokens, joined with the tokenizer's
    end-of-text token where it has one, and cut into windows that do not overlap. Of these
    ``num_samples`` are drawn by ``seed``. With ``bos`` each window begins with the token for the
    beginning of text. Reading stops at four times the tokens needed. The notice, else None, says
    that there were fewer windows than asked.

    Raises RecipeError where the text does not fill one window or the tokenizer has no such token.
    """
    if bos and tokenizer.bos_token_id is None:
        raise RecipeError(
            "calibration.bos: this tokenizer has no beginning-of-text token. "
            "Type `calibration.bos=false`."
        )
    body = seq_len - bos
    limit = _READ_AHEAD * num_samples * body
    stream = _stream(_shuffled(documents, seed), tokenizer, limit)
    num_windows = len(stream) // body
    if num_windows == 0:
        raise RecipeError(
            f"calibration.data: the text has {len(stream)} tokens, and one window needs {body}. "
            "Give more text, or a smaller `calibration.seq_len`."
        )
    windows_NT = torch.tensor(stream[: num_windows * body], dtype=torch.int64).view(-1, body)
    drawn = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))
    windows_NT = windows_NT[drawn[:num_samples]]
    if bos:
        windows_NT = torch.nn.functional.pad(windows_NT, (1, 0), value=tokenizer.bos_token_id)
    notice = None
    if num_windows < num_samples:
        notice = (
            f"calibration uses {num_windows} windows of {seq_len} tokens instead of {num_samples}: "
            f"the text has {len(stream)} tokens. More text, or a smaller `calibration.seq_len`, "
            "gives more windows."
        )
    return windows_NT, notice


def token_ids(text: str, tokenizer: Any, *, limit: int | None = None) -> list[int]:
    """Return the tokens of ``text`` without special tokens, the first ``limit`` where it is given.

    Long text is tokenized in pieces that end between two words, where the tokenizer allows it so
    that the tokens are those of the whole.
    """
    ids: list[int] = []
    for piece in _pieces(text, _joint(tokenizer)):
        ids += _encode(piece, tokenizer)
        if limit is not None and len(ids) >= limit:
            return ids[:limit]
    return ids


def token_hash(tokens: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of tokens as little-endian int64.

    >>> token_hash(torch.tensor([[1, 2]]))[:8]
    '0c730b69'
    """
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _files(data: str, key: str) -> list[Path]:
    """Return the files that ``data`` means, sorted; at least one."""
    if data in PRESETS:
        return [_demo(PRESETS[data])]
    path = Path(data).expanduser()
    if path.is_file():
        if _suffix(path) is None:
            raise RecipeError(f"{key}: cannot read '{data}' by its name. {_FORMATS}")
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.is_file() and _suffix(file))
    if files:
        return files
    if path.is_dir() or glob.has_magic(data):
        raise RecipeError(f"{key}: '{data}' holds no file that can be read. {_FORMATS}")
    raise UnknownName(f"{key}: {_not_found(data, path)}")


_FORMATS = f"Give files that end in {', '.join(_READERS)}."


def _not_found(data: str, path: Path) -> str:
    folder = path.parent
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    near_files = difflib.get_close_matches(path.name, sorted(names), n=1)
    near = difflib.get_close_matches(data, PRESETS, n=1) or [str(folder / n) for n in near_files]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return (
        f"'{data}' is neither a bundled text ({', '.join(PRESETS)}) nor a file.{hint} "
        "Data sets on the Hub are not read yet: download one to a file and give its path."
    )


def _suffix(path: Path) -> str | None:
    return next((end for end in _READERS if path.name.lower().endswith(end)), None)


def _demo(name: str) -> Path:
    return Path(str(resources.files("llmprune") / "demo" / name))


def _documents(files: Iterable[Path], column: str | None, key: str) -> Iterator[str]:
    """Yield the documents that hold more than white space; there must be one."""
    empty = True
    for file in files:
        plain = _READERS[_suffix(file) or ".txt"] == "text"
        for text in _plain(file, key) if plain else _rows(file, column, key):
            if text.strip():
                empty = False
                yield text
    if empty:
        raise RecipeError(f"{key}: there is no text in it. Give a file that holds some.")


def _plain(file: Path, key: str) -> Iterator[str]:
    try:
        yield file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{key}: cannot read '{file}': {error}. Give text in UTF-8.") from error


def _rows(file: Path, column: str | None, key: str) -> Iterator[str]:
    """Yield the text column of a table, row by row."""
    load_dataset = _load_dataset(file, key)
    try:
        name = _READERS[_suffix(file) or ""]
        rows = load_dataset(name, data_files=[str(file)], split="train", streaming=True)
        chosen = None
        for row in rows:
            chosen = chosen or _text_column(row, column, file, key)
            if row.get(chosen) is not None:
                yield _checked(row[chosen], chosen, file, key)
    except RecipeError:
        raise
    except Exception as error:  # each format's library raises its own
        if file.stat().st_size == 0:
            return
        raise RecipeError(
            f"{key}: cannot read '{file}': {type(error).__name__}: {error}. "
            "Give a whole file, in the format that its name ends in."
        ) from error


def _load_dataset(file: Path, key: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RecipeError(
            f"{key}: reading '{file}' needs a package that is not installed. "
            "Type `pip install datasets`, or give a .txt file."
        ) from error
    return load_dataset


def _text_column(row: dict[str, Any], asked: str | None, file: Path, key: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    listed = ", ".join(row)
    if asked in row:
        return asked
    if asked is not None:
        raise unknown("calibration.column", asked, row)
    if "text" in row:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise RecipeError(
        f"{key}: which column of '{file}' holds the text is not clear. The columns: {listed}. "
        "Name it 'text', or type `calibration.column=NAME` for calibration."
    )


def _checked(value: Any, column: str, file: Path, key: str) -> str:
    if isinstance(value, str):
        return value
    raise RecipeError(
        f"{key}: column '{column}' of '{file}' holds {type(value).__name__}, not text. "
        "Give a column of text."
    )


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    """Yield documents in seeded order, drawn from a buffer that holds the next ones."""
    draw = random.Random(seed)
    buffer: list[str] = []
    size = 0
    for text in documents:
        buffer.append(text)
        size += len(text)
        while len(buffer) > _BUFFER_DOCUMENTS or (size > _BUFFER_CHARACTERS and len(buffer) > 1):
            position = draw.randrange(len(buffer))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            size -= len(buffer[-1])
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


def _stream(documents: Iterable[str], tokenizer: Any, limit: int) -> list[int]:
    """Return at most ``limit`` tokens of documents, with end-of-text between them."""
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in documents:
        stream += (between if stream else []) + token_ids(text, tokenizer, limit=limit)
        if len(stream) >= limit:
            break
    return stream[:limit]


def _encode(text: str, tokenizer: Any) -> list[int]:
    # `verbose=False` is about the model's context length, which the windows will respect.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _joint(tokenizer: Any) -> int:
    """Return how many of the spaces between two pieces to drop: 0 or 1.

    Byte-level tokenizers keep a word's space with it; SentencePiece ones add it to each text.
    """
    both, first = _encode("a b", tokenizer), _encode("a", tokenizer)
    return int(both != first + _encode(" b", tokenizer) and both == first + _encode("b", tokenizer))


def _pieces(text: str, joint: int) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        end = _between_words(text, start + _PIECE // 2, start + _PIECE)
        yield text[start:end]
        start = end + joint * (text[end] == " ")
    yield text[start:]


def _between_words(text: str, low: int, high: int) -> int:
    """Return the last place of a single space between letters, or else of any white space."""
    place = text.rfind(" ", low, high)
    while place > low and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
        place = text.rfind(" ", low, place)
    if place > low:
        return place
    return max((text.rfind(space, low, high) for space in (" ", "\n")), default=-1) + 1 or high
