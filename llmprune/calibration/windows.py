"""Documents to batches of tokens: windows of one length, seeded and hashed.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from llmprune.base.errors import CheckpointError, RecipeError, first_line
from llmprune.calibration.turns import Said, Span, asked_tokens

_PIECE = 100_000  # characters that go to the tokenizer at once; some are quadratic in the length
_READ_AHEAD = 4  # windows read for each one drawn
_BUFFER_DOCUMENTS, _BUFFER_CHARACTERS = 1000, 16_000_000


def tokenize_windows(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
    key: str = "calibration.data",
) -> tuple[Tensor, str | None]:
    """Cut documents into windows of ``seq_len`` tokens; return them (N, T) int64, and a notice.

    Documents are shuffled, tokenized without special tokens, joined with the tokenizer's
    end-of-text token where it has one, and cut into windows that do not overlap. Of these
    ``num_samples`` are drawn by ``seed``. With ``bos`` each window begins with the token for the
    beginning of text, and a document that brings its own (as chat templates do) gives that up.
    Reading stops at four times the tokens needed. The notice, else None, says that there were fewer
    windows than asked.

    Raises RecipeError where the text, called ``key``, does not fill one window or the tokenizer has
    no such token.
    """
    tokens_NT, _, notice = tokenize_asked(
        *(documents, tokenizer),
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        bos=bos,
        key=key,
    )
    return tokens_NT, notice


def tokenize_asked(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = False,
    key: str = "calibration.data",
) -> tuple[Tensor, Tensor, str | None]:
    """Do as `tokenize_windows`; return also which tokens (N, T) bool a training may ask for.

    These are all of plain text, and of a conversation that knows it (`Said`) what an assistant
    said. An end-of-text token belongs to the document before it, and a conversation's own end is
    that of its turns; nothing asks for the token that begins a window.
    """
    if bos and tokenizer.bos_token_id is None:
        raise RecipeError(
            "calibration.bos: this tokenizer has no beginning-of-text token. "
            "Type `calibration.bos=false`."
        )
    body = seq_len - bos
    limit = _READ_AHEAD * num_samples * body
    stream, asked = _stream(_shuffled(documents, seed), tokenizer, limit, bos=bos)
    num_windows = len(stream) // body
    if num_windows == 0:
        raise RecipeError(
            f"{key}: the text has {len(stream)} tokens, and one window needs {body}. "
            "Give more text, or a smaller `calibration.seq_len`."
        )
    whole = num_windows * body
    drawn = torch.randperm(num_windows, generator=torch.Generator().manual_seed(seed))[:num_samples]
    windows_NT = torch.tensor(stream[:whole], dtype=torch.int64).view(-1, body)[drawn]
    asked_NT = torch.tensor(asked[:whole], dtype=torch.bool).view(-1, body)[drawn]
    if bos:
        windows_NT = torch.nn.functional.pad(windows_NT, (1, 0), value=tokenizer.bos_token_id)
        asked_NT = torch.nn.functional.pad(asked_NT, (1, 0), value=False)
    notice = None
    if num_windows < num_samples:
        notice = (
            f"calibration uses {num_windows} windows of {seq_len} tokens instead of {num_samples}: "
            f"the text has {len(stream)} tokens. More text, or a smaller `calibration.seq_len`, "
            "gives more windows."
        )
    return windows_NT, asked_NT, notice


def token_ids(text: str, tokenizer: Any, *, limit: int | None = None) -> list[int]:
    """Return the tokens of ``text`` without special tokens, the first ``limit`` where it is given.

    Long text is tokenized in pieces that end between two words, where the tokenizer allows it so
    that the tokens are those of the whole.
    """
    return _tokens(text, tokenizer, limit)[0]


def token_hash(tokens: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of tokens as little-endian int64.

    >>> token_hash(torch.tensor([[1, 2]]))[:8]
    '0c730b69'
    """
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


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


def _stream(
    documents: Iterable[str], tokenizer: Any, limit: int, *, bos: bool
) -> tuple[list[int], list[bool]]:
    """Return at most ``limit`` tokens of documents, with one end-of-text between them.

    With them, whether each may be asked for.
    """
    end = tokenizer.eos_token_id
    stream: list[int] = []
    asked: list[bool] = []
    is_plain = True
    for text in documents:
        ids, asks = _tokens(text, tokenizer, limit)
        if stream and end is not None and stream[-1] != end:  # templates may end with it
            stream.append(end)
            asked.append(is_plain)
        is_plain = not isinstance(text, Said)
        own = int(bos and ids[:1] == [tokenizer.bos_token_id])
        stream += ids[own:]
        asked += asks[own:]
        if len(stream) >= limit:
            break
    return stream[:limit], asked[:limit]


def _tokens(text: str, tokenizer: Any, limit: int | None) -> tuple[list[int], list[bool]]:
    """Return tokens of a text, and which of them may be asked for."""
    spans = text.spans if isinstance(text, Said) else None
    ids: list[int] = []
    asked: list[bool] = []
    for start, piece in _pieces(text, _joint(tokenizer)):
        if spans:
            found, offsets = _encode_with_offsets(piece, tokenizer)
            asked += asked_tokens([(a - start, b - start) for a, b in spans], offsets)
        else:
            found = _encode(piece, tokenizer)
            asked += [spans is None] * len(found)
        ids += found
        if limit is not None and len(ids) >= limit:
            break
    return ids[:limit], asked[:limit]


def _encode(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = _read(text, tokenizer)["input_ids"]
    return ids


def _encode_with_offsets(text: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Return the same tokens, and the characters that each is of."""
    found = _read(text, tokenizer, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


def _read(text: str, tokenizer: Any, **wishes: bool) -> Any:
    """Return what a tokenizer makes of a text.

    Raises:
        CheckpointError: it can make nothing of it.
        RecipeError: the text holds half a character.
    """
    _check_characters(text)
    try:
        # `verbose=False` is about the model's context length, which the windows will respect.
        return tokenizer(text, add_special_tokens=False, verbose=False, **wishes)
    except Exception as error:  # tokenizers raises bare exceptions
        raise CheckpointError(
            f"the model's tokenizer cannot read {text[:20]!r} ({first_line(error)}). Copy "
            "tokenizer.json and tokenizer_config.json of this model into its folder again."
        ) from None


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = text[max(error.start - 20, 0) : error.end]
        raise RecipeError(
            f"the text holds half a character (a surrogate without its other half) at {place!r}. "
            "Mend or leave out what it is in."
        ) from None


def _joint(tokenizer: Any) -> int:
    """Return how many of the spaces between two pieces to drop: 0 or 1.

    Byte-level tokenizers keep a word's space with it; SentencePiece ones add it to each text.
    """
    both, first = _encode("a b", tokenizer), _encode("a", tokenizer)
    return int(both != first + _encode(" b", tokenizer) and both == first + _encode("b", tokenizer))


def _pieces(text: str, joint: int) -> Iterator[tuple[int, str]]:
    """Yield pieces of a text, and where each begins."""
    start = 0
    while len(text) - start > _PIECE:
        end = _between_words(text, start + _PIECE // 2, start + _PIECE)
        yield start, text[start:end]
        start = end + joint * (text[end] == " ")
    yield start, text[start:]


def _between_words(text: str, low: int, high: int) -> int:
    """Return the last place of a single space between letters, or else of any white space."""
    place = text.rfind(" ", low, high)
    while place > low and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
        place = text.rfind(" ", low, place)
    if place > low:
        return place
    return max((text.rfind(space, low, high) for space in (" ", "\n")), default=-1) + 1 or high
