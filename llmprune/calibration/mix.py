"""The calibration windows of a run: its texts opened, each read for its share, put together.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmprune.base.errors import RecipeError
from llmprune.calibration.chat import Chats
from llmprune.calibration.documents import Text, open_text
from llmprune.calibration.files import local_files
from llmprune.calibration.selection import calibration_texts, name_of, place_of
from llmprune.calibration.turns import only_said
from llmprune.calibration.windows import token_hash, tokenize_asked
from llmprune.recipe.texts import ON_POLICY, WRITING

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.recipe.models import Recipe

Loss = Literal["assistant", "all", "auto"]

_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*template*")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows (N, T) int64, what a report says of them, and what the user should know.

    `asked` (N, T) bool tells which tokens a training may ask for; without it those are all.
    """

    tokens: Tensor
    record: Mapping[str, Any]
    asked: Tensor | None = None
    notices: tuple[str, ...] = ()
    is_remote: bool = False


def read_windows(recipe: Recipe, tokenizer: Any, *, seq_len: int, loss: Loss = "all") -> Windows:
    """Read the windows that a recipe asks for, the same ones for every ``loss``.

    ``loss`` says which tokens a training may ask for: all; what an assistant said and nothing else;
    or, with "auto", what an assistant said in conversations and all of plain text.

    Raises:
        RecipeError: a text is not there, cannot be reached, or is too short.
    """
    wish, seed = recipe.calibration, recipe.seed
    wishes = calibration_texts(recipe)
    if wish.data == ON_POLICY:
        raise RecipeError(
            f"calibration.data: {ON_POLICY} is what a model writes to be pruned on. Where it is "
            "trained or compared give text, such as c4 or a file (--data, recover.data)."
        )
    many = len(wishes) > 1
    keys = [
        f"calibration.data[{index}]" if many else "calibration.data" for index in range(len(wishes))
    ]
    texts = [open_text(each, key=key) for each, key in zip(wishes, keys, strict=True)]
    counts = shares([each.weight for each in wishes], wish.num_samples)
    check_shares(texts, counts)
    found, asked, notices = [], [], []
    for text, count in zip(texts, counts, strict=True):
        chats = Chats(tokenizer, marks=loss != "all")
        documents = text.documents(seed, chats)
        tokens_NT, asked_NT, notice = tokenize_asked(
            only_said(documents) if loss == "assistant" else documents,
            tokenizer,
            num_samples=count,
            seq_len=seq_len,
            seed=seed,
            bos=wish.bos,
            key=text.key,
        )
        found.append(tokens_NT)
        asked.append(asked_NT)
        notices += [f"{text.wish.data}: {notice}" if many else notice] if notice else []
        if chats.num_refused:
            read = chats.num_refused + chats.num_written
            notices.append(
                f"calibration leaves out {chats.num_refused} of {read} conversations of "
                f"'{text.wish.data}', which the chat template refuses: {chats.reason}."
            )
        if chats.num_unmarked:
            notices.append(
                f"what the assistant said is not certain in {chats.num_unmarked} of "
                f"{chats.num_written} conversations of '{text.wish.data}', as the chat template "
                f"writes them: {'none' if loss == 'assistant' else 'all'} of their tokens are "
                "asked for."
            )
    records = [
        text.record() | {"num_windows": len(tokens_NT)}
        for text, tokens_NT in zip(texts, found, strict=True)
    ]
    tokens_NT = _put_together(found, seed)
    return Windows(
        tokens=tokens_NT,
        record=window_record(name_of(wishes), tokens_NT, texts=records),
        asked=None if loss == "all" else _put_together(asked, seed),
        notices=tuple(notices),
        is_remote=any(text.is_remote for text in texts),
    )


def window_record(
    name: str, tokens_NT: Tensor, *, texts: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return what a report says of calibration windows."""
    return {
        "data": name,
        "texts": [dict(text) for text in texts],
        "num_windows": tokens_NT.shape[0],
        "seq_len": tokens_NT.shape[1],
        "tokens": token_hash(tokens_NT),
    }


def shares(weights: Iterable[float], total: int) -> list[int]:
    """Return whole numbers near ``weights``' shares of ``total``, by the largest remainder.

    Of equal remainders the first is served. The numbers add up to ``total``.

    >>> shares([3, 1], 128), shares([1, 1, 1], 8)
    ([96, 32], [3, 3, 2])
    """
    exact = [Fraction(weight) for weight in weights]
    wanted = [weight * total / sum(exact) for weight in exact]
    counts = [int(want) for want in wanted]
    rest = sorted(range(len(counts)), key=lambda index: (counts[index] - wanted[index], index))
    for index in rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def check_shares(texts: Sequence[Text], counts: Sequence[int]) -> None:
    """Check that every text of a mix gives a window.

    Raises:
        RecipeError: one is too light for the number of windows.
    """
    for text, count in zip(texts, counts, strict=True):
        if count == 0:
            raise RecipeError(
                f"{text.key}: '{text.wish.data}' with weight {text.wish.weight:g} gives none of "
                f"the {sum(counts)} windows. Raise its weight or `calibration.num_samples`, or "
                "leave it out."
            )


def _put_together(found: Sequence[Tensor], seed: int) -> Tensor:
    """Return the windows of several texts in an order drawn by ``seed``; of one, as they are."""
    import torch

    if len(found) == 1:
        return found[0]
    tokens_NT = torch.cat(list(found))
    drawn = torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))
    return tokens_NT[drawn]


def wish_hash(recipe: Recipe, seq_len: int, folder: Path) -> str:
    """Return a hash of all that decides windows but the content of texts: wish and tokenizer.

    Of files that are part of a mix it follows sizes and times.
    """
    wish, wishes = recipe.calibration, calibration_texts(recipe)
    texts = [text.model_dump(mode="json") for text in wishes]
    asked = [texts, wish.num_samples, seq_len, wish.bos, recipe.seed]
    if len(wishes) > 1:
        asked.append([_marks(text.data) for text in wishes if place_of(text.data) == "local"])
    if wish.data == ON_POLICY:
        asked.append([getattr(wish, name) for name in WRITING])
        if wish.prompts is not None and place_of(wish.prompts) == "local":
            asked.append(_marks(wish.prompts))
    digest = hashlib.sha256(json.dumps(asked).encode())
    for pattern in _TOKENIZER_FILES:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _marks(data: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files of a text."""
    marks = ((path, path.stat()) for path in local_files(data, "calibration.data"))
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in marks]
