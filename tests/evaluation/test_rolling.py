"""Perplexity by word and byte is that of lm-evaluation-harness, streamed and in memory."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmprune.api import load, rolling_perplexity
from llmprune.base.errors import RecipeError
from llmprune.evaluation.rolling import per_word_and_byte, prefix_token
from tests.evaluation.conftest import DEMO

NAMES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def by_the_harness(model: Any, tokenizer: Any, path: Path, *, add_bos: bool | None) -> list[float]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "words",
        "dataset_path": "text",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "sample_by": "document"},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in NAMES],
    }
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=128, add_bos_token=add_bos)
    tasks = TaskManager(include_defaults=False).load([task])
    found = lm_eval.evaluate(lm, tasks, log_samples=False, bootstrap_iters=0)
    return [found["results"]["words"][f"{name},none"] for name in NAMES]


def test_words_and_bytes_cost_what_the_harness_says(book: Path) -> None:
    """Told to add no BOS it agrees to rounding; else a second BOS shifts its windows by a token."""
    model = load("demo", dtype="float32", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    streamed = rolling_perplexity("demo", data=str(book), seq_len=128, device="cpu")
    resident = rolling_perplexity(model, tokenizer, str(book), seq_len=128, micro_batch=4)
    expected = by_the_harness(model, tokenizer, book, add_bos=False)
    for found in (streamed, resident):
        assert [getattr(found, name) for name in NAMES] == pytest.approx(expected, rel=1e-5)
    with_bos = by_the_harness(model, tokenizer, book, add_bos=None)
    assert with_bos[0] != expected[0] and with_bos == pytest.approx(expected, rel=2e-3)
    text = book.read_text(encoding="utf-8")
    assert streamed.num_bytes == len(text.encode()) > len(text)
    assert (streamed.num_windows - 1) * 128 < streamed.num_tokens <= streamed.num_windows * 128
    assert streamed.prefix == "<|bos|>" and "by word" in str(streamed)


def test_a_text_that_costs_four_bits_a_word() -> None:
    found = per_word_and_byte(3 * math.log(16), num_words=3, num_bytes=12)
    assert found["word_perplexity"] == pytest.approx(16)
    assert found["byte_perplexity"] == pytest.approx(2)
    assert found["bits_per_byte"] == pytest.approx(1)


def test_the_first_token_follows_bos_or_the_end_of_a_text() -> None:
    assert prefix_token(SimpleNamespace(bos_token_id=0, eos_token_id=3)) == 0
    assert prefix_token(SimpleNamespace(bos_token_id=None, eos_token_id=3)) == 3
    with pytest.raises(RecipeError, match="neither a BOS nor an end-of-text"):
        prefix_token(SimpleNamespace(bos_token_id=None, eos_token_id=None))
