"""Perplexity of words and bytes, which compares models with unequal tokenizers.

The whole text is scored, every token once, and the sum is divided by what the text is made of
instead of by tokens. The numbers are those of lm-evaluation-harness under the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmprune.base.errors import RecipeError
from llmprune.calibration.windows import token_ids
from llmprune.evaluation.windows import Windows, count_words, rolling_windows


@dataclass(frozen=True, kw_only=True)
class RollingPerplexity:
    """Perplexities of one text by word and byte; never to be compared with one by token."""

    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    num_words: int
    num_bytes: int
    num_tokens: int
    num_windows: int
    seq_len: int
    prefix: str
    data: str
    dtype: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.word_perplexity:.3f} by word, {self.byte_perplexity:.4f} by byte, "
            f"{self.bits_per_byte:.4f} bits per byte ({self.protocol})"
        )

    @property
    def protocol(self) -> str:
        """Return what the values were measured on."""
        return (
            f"all {self.num_tokens} tokens of {self.data} predicted once in {self.num_windows} "
            f"rolling windows of {self.seq_len}, the first after {self.prefix}; {self.num_words} "
            f"words, {self.num_bytes} bytes{'' if self.dtype == 'float32' else f', {self.dtype}'}"
        )


def predict_text(
    loss: Callable[[Windows], tuple[float, int]],
    text: str,
    tokenizer: Any,
    *,
    data: str,
    seq_len: int,
    dtype: str,
) -> RollingPerplexity:
    """Return the perplexities of a text, called `data`, every token predicted once.

    `loss` gives a model's (summed negative log-likelihood in nats, predicted tokens) of windows.

    Raises:
        RecipeError: the text is empty, or the tokenizer has neither BOS nor end-of-text.
    """
    prefix = prefix_token(tokenizer)
    windows = rolling_windows(token_ids(text, tokenizer), seq_len, prefix)
    nats, count = loss(windows)
    num_words, num_bytes = count_words(text), len(text.encode())
    return RollingPerplexity(
        **per_word_and_byte(nats, num_words=num_words, num_bytes=num_bytes),
        num_words=num_words,
        num_bytes=num_bytes,
        num_tokens=count,
        num_windows=len(windows.inputs_NT),
        seq_len=seq_len,
        prefix=str(tokenizer.convert_ids_to_tokens(prefix)),
        data=data,
        dtype=dtype,
    )


def per_word_and_byte(nats: float, *, num_words: int, num_bytes: int) -> dict[str, float]:
    """Return word_perplexity, byte_perplexity and bits_per_byte of a text that costs `nats`.

    >>> per_word_and_byte(math.log(16), num_words=1, num_bytes=4)["bits_per_byte"]
    1.0
    """
    return {
        "word_perplexity": math.exp(min(nats / num_words, 700.0)),
        "byte_perplexity": math.exp(min(nats / num_bytes, 700.0)),
        "bits_per_byte": nats / num_bytes / math.log(2),
    }


def prefix_token(tokenizer: Any) -> int:
    """Return the token that the first word is predicted from: BOS, else end-of-text.

    Raises:
        RecipeError: the tokenizer has neither.
    """
    found = tokenizer.bos_token_id
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        raise RecipeError(
            "rolling: this tokenizer has neither a BOS nor an end-of-text token to predict the "
            "first token from. Measure the perplexity of tokens instead; leave --rolling out."
        )
    return int(found)
