"""Calibration text that the model writes itself: it continues prompts, and both are what it reads.

What a model says is nearer to what it will say than what others wrote, its own chain of thought
above all. Prompts come from a file, a preset or the beginnings of texts, in an order drawn by the
seed; sequences (prompt and continuation) are put one behind the other, with the end-of-text token
between, and cut into windows.

Shapes: N windows, T tokens in each, B prompts at once, P tokens of the longest of them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import NumericalError, RecipeError, TooLarge, first_line
from llmprune.base.memory import free_bytes
from llmprune.calibration.chat import Chats
from llmprune.calibration.documents import open_text
from llmprune.calibration.mix import Windows, window_record
from llmprune.calibration.selection import CALIBRATION, DEMO, is_demo, place_of
from llmprune.calibration.turns import Message
from llmprune.calibration.windows import token_ids
from llmprune.recipe.texts import ON_POLICY, Portion

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.recipe.models import Recipe

KEY = "calibration.prompts"
CHATS = "ultrachat"  # prompts of models that chat
TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 1.0, 0.95, 256
BEGINNING = 24  # tokens of a text that are a prompt
AT_ONCE = 8  # prompts
MOST = 1000  # prompts that are read; more continuations are asked of the same ones

Author = Callable[[], AbstractContextManager[Any]]


class Asked(str):
    """A prompt that is whole: a user's words as the template writes them, or a line of a file."""


class Prompting(Chats):
    """Writes conversations up to what a user last said, for a model to answer."""

    def text(self, messages: list[Message], *, what: str, key: str) -> str | None:
        """Return the prompt of a conversation; None where no user says anything, or the template
        refuses.

        Raises:
            RecipeError: there is no template, or it refuses the first hundred.
        """
        last = max((i for i, one in enumerate(messages) if one["role"] == "user"), default=None)
        if last is None:
            return None
        asking = _Asking(self.tokenizer)
        written = replace(self, tokenizer=asking) if self.has_template else self
        found = Chats.text(written, messages[: last + 1], what=what, key=key)
        self.num_refused, self.num_written = written.num_refused, written.num_written
        self.reason = written.reason
        return None if found is None else Asked(found)

    def pair(self, question: str, answer: str, *, what: str, key: str) -> str | None:
        """Return the prompt of an instruction, whose answer is left to the model."""
        if not self.has_template:
            return Asked(question)
        return self.text([{"role": "user", "content": question}], what=what, key=key)


class _Asking:
    """A tokenizer whose template opens the assistant's turn."""

    def __init__(self, tokenizer: Any) -> None:
        self.chat_template = tokenizer.chat_template
        self._write = tokenizer.apply_chat_template

    def apply_chat_template(self, messages: list[Message], *, tokenize: bool) -> str:
        """Return a conversation with the beginning of the answer to it."""
        return str(self._write(messages, tokenize=tokenize, add_generation_prompt=True))


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a model is asked: prompts by name, and how its next token is drawn from `seed`.

    A temperature of 0 always takes the likeliest token.
    """

    prompts: str
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int

    def record(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "prompts": self.prompts,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
        }


def manner_of(recipe: Recipe, *, chats: bool) -> Manner:
    """Return what a recipe asks for; `chats` tells whether the tokenizer has a chat template.

    >>> from llmprune.recipe import build, default_steps
    >>> wish = {"model": "demo", "calibration": {"data": "on-policy"},
    ...     "steps": [{"prune": {"sparsity": 0.5}}]}
    >>> manner_of(build(wish), chats=False).prompts
    'demo'
    """
    wish = recipe.calibration
    default = DEMO if is_demo(recipe.model) else CHATS if chats else CALIBRATION
    return Manner(
        prompts=wish.prompts or default,
        temperature=TEMPERATURE if wish.temperature is None else wish.temperature,
        top_p=TOP_P if wish.top_p is None else wish.top_p,
        max_new_tokens=wish.max_new_tokens or MAX_NEW_TOKENS,
        seed=recipe.seed,
    )


def read_prompts(manner: Manner, tokenizer: Any, *, most: int) -> list[list[int]]:
    """Return the tokens of at most `MOST` prompts in an order drawn by the seed, `most` in each.

    A line of a .txt file is a prompt, as is a row of a table; of chats it is what precedes the last
    answer, and with a chat template every one is written as a user's words. Of the bundled text,
    presets of plain text and data sets it is the beginning of a passage.

    Raises:
        RecipeError: there is none; begins with `calibration.prompts`.
    """
    found = list(islice(_prompt_texts(manner, tokenizer), MOST))
    prompts = []
    for text in found:
        limit = most if isinstance(text, Asked) else min(most, BEGINNING)
        ids = token_ids(text, tokenizer)
        prompts.append(ids[-limit:] if isinstance(text, Asked) else ids[:limit])
    prompts = [ids for ids in prompts if ids]
    if not prompts:
        raise RecipeError(
            f"{KEY}: '{manner.prompts}' holds no prompt. Give a .txt file with one in each line, a "
            ".jsonl of prompts or chats, or a preset such as ultrachat."
        )
    random.Random(manner.seed).shuffle(prompts)
    return prompts


def prompts_hash(prompts: Sequence[Sequence[int]]) -> str:
    """Return the SHA-256, in hexadecimal, of prompts as tokens.

    >>> prompts_hash([[1, 2], [3]])[:8]
    'bb3de9f2'
    """
    text = json.dumps([list(ids) for ids in prompts], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def wanted_prompts(
    recipe: Recipe, tokenizer: Any, config: Any, *, seq_len: int
) -> tuple[Manner, list[list[int]]]:
    """Return how a model is asked, and the prompts as tokens, no longer than it can continue.

    Raises:
        RecipeError: there is no prompt.
    """
    manner = manner_of(recipe, chats=Chats(tokenizer).has_template)
    longest = longest_sequence(config) or 2**31
    most = max(1, min(longest // 2, 4 * seq_len))
    return manner, read_prompts(manner, tokenizer, most=most)


def written_windows(
    recipe: Recipe,
    tokenizer: Any,
    author: Author,
    *,
    seq_len: int,
    device: torch.device,
    asked: tuple[Manner, list[list[int]]] | None = None,
) -> Windows:
    """Return the windows that a model writes; `author` holds it in memory while it does.

    Deterministic for a seed on one machine. Windows count as remote: they are kept for a resumed
    run, which does not write them again. `asked` is what `wanted_prompts` has read already.

    Raises:
        RecipeError: no prompts, or a model that does not generate.
        TooLarge: the model does not fit into memory.
        NumericalError: what it predicts is not finite.
    """
    import torch

    wish = recipe.calibration
    body = seq_len - wish.bos
    if wish.bos and tokenizer.bos_token_id is None:
        raise RecipeError(
            "calibration.bos: this tokenizer has no beginning-of-text token. "
            "Type `calibration.bos=false`."
        )
    needed = wish.num_samples * body
    with author() as model:
        longest = longest_sequence(model.config) or 2**31
        manner, prompts = asked or wanted_prompts(recipe, tokenizer, model.config, seq_len=seq_len)
        stream: list[int] = []
        num_written = 0
        end = tokenizer.eos_token_id
        at_once = min(AT_ONCE, -(-needed // manner.max_new_tokens))
        for written in continuations(
            model, tokenizer, prompts, manner, at_once=at_once, longest=longest, device=device
        ):
            if stream and end is not None and stream[-1] != end:
                stream.append(end)
            stream += written
            num_written += 1
            if len(stream) >= needed:
                break
    tokens_NT = torch.tensor(stream[:needed], dtype=torch.int64).view(-1, body)
    if wish.bos:
        tokens_NT = torch.nn.functional.pad(tokens_NT, (1, 0), value=tokenizer.bos_token_id)
    text = {"data": manner.prompts, "num_windows": len(tokens_NT)}
    used = [prompts[i % len(prompts)] for i in range(num_written)]
    record = window_record(ON_POLICY, tokens_NT, texts=[text]) | {
        "on_policy": manner.record() | {"hash": prompts_hash(used), "num_sequences": num_written}
    }
    return Windows(tokens=tokens_NT, record=record, is_remote=True)


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    *,
    at_once: int,
    longest: int,
    device: torch.device,
) -> Iterator[list[int]]:
    """Yield prompt and continuation as tokens, without end, the prompts over and over.

    A continuation ends with the end of text, which stays, or after `max_new_tokens`; with its
    prompt it is no longer than the model takes.
    """
    import torch

    if not callable(getattr(model, "generate", None)):
        raise RecipeError(
            f"calibration.data: {type(model).__name__} does not generate text. Give text instead, "
            "such as --calib c4."
        )
    ends = ends_of(model, tokenizer)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else min(ends, default=0)
    start = 0
    while True:
        batch = [list(prompts[(start + i) % len(prompts)]) for i in range(at_once)]
        width = max(map(len, batch))
        ids_BP = torch.full((at_once, width), pad, dtype=torch.int64)
        seen_BP = torch.zeros_like(ids_BP)
        for row, ids in enumerate(batch):
            ids_BP[row, width - len(ids) :] = torch.tensor(ids)
            seen_BP[row, width - len(ids) :] = 1
        new = max(1, min(manner.max_new_tokens, longest - width))
        with _drawing_from(manner.seed, start, device), torch.no_grad():
            settings = settings_of(manner, new=new, pad=pad, ends=ends)
            found = _generate(model, ids_BP.to(device), seen_BP.to(device), settings)
        for ids, row in zip(batch, found[:, width:].tolist(), strict=True):
            yield ids + until_end(row, ends)
        start += at_once


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text, as the model's own settings and the tokenizer say."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = set(said) if isinstance(said, list) else {said}
    vocab = model.config.get_text_config().vocab_size
    found.add(tokenizer.eos_token_id)
    return sorted(token for token in found if token is not None and token < vocab)


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return tokens up to the first that ends a text, which stays.

    >>> until_end([4, 5, 1, 0, 0], [1])
    [4, 5, 1]
    """
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return list(tokens[: place + 1])


def settings_of(manner: Manner, *, new: int, pad: int, ends: Sequence[int]) -> Any:
    """Return the settings of transformers; what a model's own say of sampling does not count."""
    from transformers import GenerationConfig

    drawn: Mapping[str, Any] = (
        {"do_sample": True, "temperature": manner.temperature, "top_p": manner.top_p, "top_k": 0}
        if manner.temperature > 0
        else {"do_sample": False}
    )
    return GenerationConfig(
        **drawn,
        max_new_tokens=new,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
        use_cache=True,
    )


def check_room(name: str, num_params: int, itemsize: int, device: torch.device) -> None:
    """Check that a model finds room in memory, which writing needs.

    Raises:
        TooLarge: it does not.
    """
    needed = num_params * itemsize
    place, available = list(free_bytes(device).items())[-1]  # where it writes
    if needed > available:
        raise TooLarge(
            f"calibration.data: to write its own text {name} must be in memory whole: "
            f"{needed / 1e9:.2f} GB, and of {place} {available / 1e9:.2f} GB are free. "
            "--dtype bfloat16 halves float32. Or let it write elsewhere, into a .jsonl file, "
            "and give that: --calib FILE."
        )


def _prompt_texts(manner: Manner, tokenizer: Any) -> Iterator[str]:
    """Yield prompts as text: those that are whole as `Asked`."""
    text = open_text(Portion(data=manner.prompts), key=KEY)
    chats = Prompting(tokenizer)
    is_local = place_of(manner.prompts) == "local"
    for document in text.documents(manner.seed, chats):
        if isinstance(document, Asked):
            yield document
        elif is_local:
            yield from _from_file(document, manner.prompts, chats)
        else:
            yield from _passages(document)


def _from_file(document: str, name: str, chats: Prompting) -> Iterator[str]:
    """Yield the prompts of a user's file: the lines of plain text, or a row as it is."""
    rows = document.splitlines() if name.lower().endswith(".txt") else [document]
    for row in filter(str.strip, rows):
        if not chats.has_template:
            yield Asked(row)
            continue
        said = chats.text([{"role": "user", "content": row}], what=f"'{name}'", key=KEY)
        if said is not None:
            yield said


def _passages(document: str) -> Iterator[str]:
    """Yield passages of a text, the paragraphs that are long enough to begin from."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", document)]
    yield from (part for part in paragraphs if len(part) >= 120)


def _generate(model: Any, ids_BP: Tensor, seen_BP: Tensor, settings: Any) -> Tensor:
    training = model.training
    model.eval()
    try:
        found: Tensor = model.generate(
            input_ids=ids_BP, attention_mask=seen_BP, generation_config=settings
        )
    except (RuntimeError, ValueError) as error:
        if "probability tensor" in str(error):
            raise NumericalError(
                "the model predicts NaN or infinity while it writes calibration text. In float16 "
                "use --dtype bfloat16."
            ) from None
        if isinstance(error, RuntimeError):
            raise
        raise RecipeError(
            f"calibration.data: this model does not generate ({first_line(error)}). Give text "
            "instead, such as --calib c4."
        ) from None
    finally:
        model.train(training)
    return found.cpu()


def _drawing_from(seed: int, batch: int, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which a batch's tokens follow from the seed; others' draws are kept."""
    from contextlib import contextmanager

    import torch

    @contextmanager
    def drawing() -> Iterator[None]:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed * 1_000_003 + batch)
            yield

    return drawing()
