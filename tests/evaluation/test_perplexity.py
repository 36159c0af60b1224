"""Perplexity three ways: streamed, in memory, and as its definition reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.api import perplexity, prune
from llmprune.base.errors import NumericalError, RecipeError
from llmprune.evaluation.perplexity import Perplexity
from llmprune.evaluation.windows import cut_windows
from llmprune.walk.resident import in_memory
from llmprune.walk.streamed import Streamed
from tests.reference.perplexities import of_blocks, of_model

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
    strided = replace(found, bos=False, stride=4, tokenizer_adds_bos=True)
    assert str(strided) == (
        "7.123 (3 windows of 8 tokens of x, stride 4, no BOS (the tokenizer would add it))"
    )


def test_the_dtype_is_named_where_it_is_not_float32(pico: Pico, text_file: Path) -> None:
    options: dict[str, Any] = {"seq_len": 24, "num_windows": 2, "device": "cpu"}
    found = perplexity(pico("llama"), data=text_file, dtype="bfloat16", **options)
    assert str(found).endswith("no BOS, bfloat16)") and found.data == str(text_file)
    assert str(perplexity(pico("llama"), data=text_file, **options)).endswith("no BOS)")
    with pytest.raises(RecipeError, match="micro_batch: 0 measures nothing"):
        perplexity(pico("llama"), data=text_file, micro_batch=0, **options)


def test_a_strange_value_without_the_bos_that_belongs_there_is_questioned() -> None:
    found = Perplexity(value=7e4, num_windows=3, seq_len=8, num_predicted=21, bos=False, data="x")
    assert found.warning is None
    assert "--bos auto" in str(replace(found, tokenizer_adds_bos=True).warning)
    assert replace(found, tokenizer_adds_bos=True, bos=True).warning is None
    assert replace(found, tokenizer_adds_bos=True, value=7.0).warning is None


def test_auto_begins_windows_as_the_tokenizer_begins_texts(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's tokenizer adds BOS; a pico tokenizer has none."""
    options = {"data": str(text_file), "seq_len": 32, "num_windows": 2, "device": "cpu"}
    auto, plain = perplexity("demo", bos="auto", **options), perplexity("demo", **options)
    assert auto.bos and auto.value == perplexity("demo", bos=True, **options).value
    assert not plain.bos and plain.tokenizer_adds_bos and plain.value != auto.value
    assert plain.value > 100 and "warning: a perplexity of" in capsys.readouterr().err


@torch.no_grad()
def as_hugging_face_documents(model: Any, ids: list[int], seq_len: int, stride: int) -> float:
    """The loop of the transformers documentation on perplexity of fixed-length models."""
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + seq_len, len(ids))
        new = end - before
        window = torch.tensor(ids[begin:end])
        logits_TV = model(input_ids=window[None]).logits[0].double()
        losses += [
            -float(logits_TV[place - 1].log_softmax(-1)[window[place]])
            for place in range(len(window))
            if place and place >= len(window) - new
        ]
        before = end
        if end == len(ids):
            break
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("seq_len", "stride"), [(24, 24), (24, 8), (24, 7), (16, 1)])
def test_strides_are_those_of_hugging_face(
    pico: Pico,
    stock: Callable[[Path], Any],
    streamed: Callable[..., Streamed],
    seq_len: int,
    stride: int,
) -> None:
    """Gemma slides its own window, so that the filling of the last one would show."""
    folder, num_tokens = pico("gemma3_text"), 61
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 64, (num_tokens,), generator=generator).tolist()
    expected = as_hugging_face_documents(stock(folder), ids, seq_len, stride)
    windows = cut_windows(ids, seq_len, stride=stride)
    for value, count in (
        of_model(stock(folder), *windows, micro_batch=4),
        of_blocks(streamed(folder), *windows, micro_batch=3),
    ):
        assert value == pytest.approx(expected, rel=1e-5)
        assert count == num_tokens - (3 if stride == seq_len else 1)


def test_more_context_lowers_the_perplexity_of_a_trained_model(text_file: Path) -> None:
    book = Path(str(resources.files("llmprune") / "demo" / "evaluation.txt"))
    text = text_file.with_name("book.txt")
    text.write_text(book.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    options = {"data": str(text), "seq_len": 64, "device": "cpu"}
    strided = perplexity("demo", stride=16, **options)
    assert strided.value < 0.95 * perplexity("demo", **options).value
    assert "windows of 64 tokens" in str(strided) and "stride 16" in str(strided)


def test_windows_walked_in_groups_give_the_same(
    streamed: Any, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = streamed(pico("llama"))
    windows = torch.randint(0, 64, (5, 16), generator=torch.Generator().manual_seed(0))
    whole = of_blocks(blocks, windows, micro_batch=2)
    monkeypatch.setattr("llmprune.evaluation.perplexity.HIDDEN_BYTES", 1)
    assert of_blocks(blocks, windows, micro_batch=2) == pytest.approx(whole)


def test_the_text_is_the_recipe_s_for_a_result_and_the_demo_s_for_the_demo(
    pico: Callable[..., Path], tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    out = tmp_path / "out"
    prune(
        pico("llama"), sparsity=0.5, method="magnitude", out=out, quiet=True, seq_len=16,
        settings=[f"evaluate.data={text_file}", "evaluate.perplexity=false"],
    )  # fmt: skip
    assert perplexity(out, seq_len=16, num_windows=2).data == str(text_file)
    assert perplexity("demo", seq_len=16, num_windows=1).data == "demo"


def test_the_text_of_other_models_is_wikitext2(
    pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, make_model: Any, tokenizer: Any
) -> None:
    def read(data: str, **options: Any) -> str:
        assert data == "wikitext2"
        return "some words " * 20

    monkeypatch.setattr("llmprune.measuring.evaluation_text", read)
    assert perplexity(pico("llama"), seq_len=16, num_windows=1).data == "wikitext2"
    found = perplexity(make_model("llama"), tokenizer, seq_len=16, num_windows=1)
    assert found.data == "wikitext2"
