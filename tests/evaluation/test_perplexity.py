"""Perplexity three ways: streamed, in memory, and as its definition reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.api import perplexity
from llmprune.base.errors import NumericalError, RecipeError
from llmprune.evaluation.perplexity import Perplexity, cut_windows, of_blocks, of_model
from llmprune.walk.resident import in_memory
from llmprune.walk.streamed import Streamed

Pico = Callable[..., Path]


@torch.no_grad()
def by_definition(model: Any, windows_NT: Tensor) -> tuple[float, int]:
    losses = []
    for window in windows_NT:
        probability_TV = model(input_ids=window[None]).logits[0].double().softmax(-1)
        for position in range(len(window) - 1):
            losses.append(-math.log(float(probability_TV[position, window[position + 1]])))
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_streamed_resident_and_definition_agree(
    pico: Pico,
    stock: Callable[[Path], Any],
    streamed: Callable[..., Streamed],
    tokens: Tensor,
    model_type: str,
) -> None:
    folder = pico(model_type)
    expected, count = by_definition(stock(folder), tokens)
    assert count == 6 * 23
    assert abs(expected - 64) > 1  # not a model that predicts nothing
    for micro_batch in (1, 4):
        assert of_model(stock(folder), tokens, micro_batch=micro_batch) == (
            pytest.approx(expected, rel=1e-5),
            count,
        )
        assert of_blocks(streamed(folder), tokens, micro_batch=micro_batch) == (
            pytest.approx(expected, rel=1e-5),
            count,
        )


@pytest.mark.parametrize("size", [1, 64, 64 * 23, 64 * 24 * 2])
def test_chunks_of_logits_change_nothing(
    pico: Pico,
    streamed: Callable[..., Streamed],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    blocks = streamed(pico("llama"))
    whole = of_blocks(blocks, tokens, micro_batch=2)
    monkeypatch.setattr("llmprune.walk.forward.LOGITS", size)
    value, count = of_blocks(blocks, tokens, micro_batch=2)
    assert (pytest.approx(value, rel=1e-6), count) == whole


def test_training_mode_comes_back(make_model: Callable[..., Any], tokens: Tensor) -> None:
    model = make_model("gpt2").train()
    assert model.config.resid_pdrop > 0
    assert of_model(model, tokens) == of_model(model, tokens)
    assert model.training


def test_windows_do_not_overlap_and_the_rest_is_left() -> None:
    windows = cut_windows(list(range(11)), 4)
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and windows.dtype == torch.int64
    assert cut_windows(list(range(11)), 4, num_windows=1).tolist() == [[0, 1, 2, 3]]
    assert len(cut_windows(list(range(11)), 4, num_windows=9)) == 2


def test_every_window_begins_with_bos_where_asked() -> None:
    windows = cut_windows(list(range(11)), 4, bos_id=99)
    assert windows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


@pytest.mark.parametrize(("num_tokens", "bos_id"), [(3, None), (2, 99)])
def test_a_text_shorter_than_a_window_is_refused(num_tokens: int, bos_id: int | None) -> None:
    with pytest.raises(RecipeError, match=rf"has {num_tokens} tokens, fewer than one window of 4"):
        cut_windows(list(range(num_tokens)), 4, bos_id=bos_id)
    assert len(cut_windows(list(range(num_tokens + 1)), 4, bos_id=bos_id)) == 1


def test_a_loss_that_is_not_finite_is_an_error(
    make_model: Callable[..., Any], tokens: Tensor
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinite"):
        of_model(model, tokens)
    with in_memory(model) as blocks, pytest.raises(NumericalError, match="NaN or infinite"):
        of_blocks(blocks, tokens)


def test_a_hopeless_model_is_bad_and_not_an_overflow(
    make_model: Callable[..., Any], tokens: Tensor
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.mul_(1e6)
    value, _ = of_model(model, tokens)
    assert 1e300 < value < math.inf


def test_a_folder_and_its_model_in_memory_have_one_perplexity(
    pico: Pico, stock: Callable[[Path], Any], tokenizer: Any, text_file: Path
) -> None:
    folder, options = pico("llama"), {"seq_len": 24, "num_windows": 7}
    one = perplexity(str(folder), data=str(text_file), device="cpu", **options)
    two = perplexity(stock(folder), tokenizer, data=str(text_file), **options)
    ids = tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"][: 7 * 24]
    expected, count = by_definition(stock(folder), torch.tensor(ids).view(7, 24))
    for found in (one, two):
        assert found.value == pytest.approx(expected, rel=1e-5)
        assert (found.num_windows, found.num_predicted, found.bos) == (7, count, False)


def test_bos_is_asked_of_a_tokenizer_that_has_one(
    pico: Pico, stock: Callable[[Path], Any], tokenizer: Any, text_file: Path
) -> None:
    with pytest.raises(RecipeError, match="has no BOS token"):
        perplexity(str(pico("llama")), data=str(text_file), seq_len=24, bos=True, device="cpu")
    with pytest.raises(RecipeError, match="pass the model's tokenizer"):
        perplexity(stock(pico("llama")), data=str(text_file), seq_len=24)


def test_it_says_what_it_was_measured_on() -> None:
    found = Perplexity(value=7.1234, num_windows=3, seq_len=8, num_predicted=21, bos=True, data="x")
    assert str(found) == "7.123 (3 windows of 8 tokens of x, BOS first)"


def test_windows_walked_in_groups_give_the_same(
    streamed: Any, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = streamed(pico("llama"))
    windows = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = of_blocks(blocks, windows, micro_batch=2)
    monkeypatch.setattr("llmprune.evaluation.perplexity.HIDDEN_BYTES", 1)
    assert of_blocks(blocks, windows, micro_batch=2) == pytest.approx(whole)
