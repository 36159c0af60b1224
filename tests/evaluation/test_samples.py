"""Models continue the same prompts; what fails says so and costs nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmprune.base.errors import RecipeError
from llmprune.checkpoint.source import open_folder
from llmprune.evaluation.samples import prompts_of, write_samples
from llmprune.recipe import build
from tests.conftest import Pico

PROMPTS = ("Hello", "a b c", "d")
HOW: dict[str, Any] = {"num_tokens": 6, "device": torch.device("cpu"), "dtype": torch.float32}


def greedy(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    """Return the likeliest tokens one by one, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length, stop = ids.shape[1], model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    for _ in range(num_tokens):
        with torch.no_grad():
            token = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if int(token) == stop:
            break
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))


def test_every_model_goes_on_with_its_likeliest_tokens(
    pico: Pico, stock: Callable[[Path], Any], tokenizer: Any
) -> None:
    folders = {"dense": pico("llama"), "pruned": pico("qwen3")}
    models = {name: open_folder(folder) for name, folder in folders.items()}
    found = write_samples(models, PROMPTS, **HOW)
    assert (found["models"], found["new_tokens"]) == (["dense", "pruned"], 6)
    assert [row["prompt"] for row in found["texts"]] == list(PROMPTS)
    for name, folder in folders.items():
        model = stock(folder)
        for row in found["texts"]:
            assert row[name] == greedy(model, tokenizer, row["prompt"], 6)
    assert any(len(row[name]) > 4 for row in found["texts"] for name in folders)
    assert write_samples(models, PROMPTS, **HOW) == found


def test_a_model_without_a_tokenizer_writes_nothing(pico: Pico, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    found = write_samples({"dense": open_folder(folder)}, PROMPTS, **HOW)
    assert set(found) == {"why"}
    assert str(folder) in found["why"]


def test_a_model_that_hardly_fits_is_not_loaded(
    pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    found = write_samples({"dense": open_folder(pico("llama"))}, PROMPTS, **HOW)
    assert "in memory as a whole" in found["why"]


def test_prompts_are_ours_unless_some_are_given_or_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmprune.evaluation.samples.PROMPTS", ("one",))
    assert prompts_of(None, "auto") == prompts_of(None, True) == ("one",)
    assert prompts_of(None, False) == prompts_of([], True) == ()
    assert prompts_of(["mine"], False) == ("mine",)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"prompts": ["a", " "]}, "nothing to go on from"),
        ({"new_tokens": 0}, "greater than or equal to 1"),
        ({"prompts": 3}, "prompts"),
    ],
)
def test_prompts_that_are_none_are_refused(wish: dict[str, Any], says: str) -> None:
    steps = [{"prune": {"sparsity": 0.5}}, {"evaluate": wish}]
    with pytest.raises(RecipeError, match=says):
        build({"model": "demo", "steps": steps})
