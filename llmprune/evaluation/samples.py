"""Texts that models write: the same prompts, continued by each with its likeliest tokens.

They are shown, never judged: whatever fails says so in their place, and costs no result.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import first_line
from llmprune.base.memory import free_bytes
from llmprune.base.progress import human_bytes

if TYPE_CHECKING:
    import torch

    from llmprune.checkpoint.source import Source

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a small",
    "To make a cup of tea, first",
)
ROOM = 2  # weights may take the free memory this many times over


def prompts_of(asked: Sequence[str] | None, perplexity: str | bool) -> tuple[str, ...]:
    """Return the prompts to go on from; by default ours, where anything is measured at all.

    >>> prompts_of(None, False), prompts_of(["Hello"], False)
    ((), ('Hello',))
    """
    if asked is None:
        return () if perplexity is False else PROMPTS
    return tuple(asked)


def write_samples(
    models: Mapping[str, Source],
    prompts: Sequence[str],
    *,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return what each model, held in memory one at a time, writes after the same prompts.

    The result has a row of `texts` for each prompt with what each of `models` wrote, `new_tokens`
    tokens at most; where a model is too large or fails, `why` says so and there is no text.
    """
    rows: list[dict[str, str]] = [{"prompt": prompt} for prompt in prompts]
    for name, source in models.items():
        why = _too_large(source, dtype, device)
        if why is None:
            try:
                written = _written(source, prompts, num_tokens, device, dtype, trust_remote_code)
            except Exception as error:  # of transformers, of a tokenizer, of a model's own code
                why = f"{source.name} wrote nothing ({type(error).__name__}: {first_line(error)})."
            gc.collect()
        if why is not None:
            return {"why": why}
        for row, text in zip(rows, written, strict=True):
            row[name] = text
    return {"texts": rows, "models": list(models), "new_tokens": num_tokens}


def _written(
    source: Source,
    prompts: Sequence[str],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> list[str]:
    """Return the continuation of every prompt, without the prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    for file in sorted({entry.file for entry in source.entries.values()}):
        source.path(file)  # fetched where the source is on the Hub
    told = {"trust_remote_code": trust_remote_code}
    with _quiet(), torch.no_grad():
        words: Any = AutoTokenizer.from_pretrained(source.folder, **told)
        model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype, **told)
        model = model.to(device).eval()
        stop = model.generation_config.eos_token_id
        stop = words.eos_token_id if stop is None else stop
        first = stop[0] if isinstance(stop, list) else stop
        model.generation_config = GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0 if first is None else first,
        )
        found = []
        for prompt in prompts:
            asked = words(prompt, return_tensors="pt").to(device)
            ids = asked["input_ids"]
            out = model.generate(ids, attention_mask=asked["attention_mask"])
            found.append(str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def _too_large(source: Source, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a model is not held in memory for this; None where there is ample room."""
    needed = sum(entry.num_params for entry in source.entries.values()) * dtype.itemsize
    if ROOM * needed <= min(free_bytes(device).values()):
        return None
    return (
        f"{source.name} takes {human_bytes(needed)} in memory as a whole, and samples are written "
        f"where {ROOM} times that is free."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers logs and its progress bars away."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
