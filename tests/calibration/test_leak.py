"""What evaluation shares with calibration is measured as plain comparison would."""

from __future__ import annotations

from importlib import resources

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from transformers import AutoTokenizer

from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.leak import shared_share
from llmprune.calibration.mix import read_windows
from llmprune.calibration.windows import token_ids
from llmprune.recipe import build


def compared_one_by_one(known: torch.Tensor, asked: torch.Tensor, length: int) -> float:
    runs = {
        tuple(row[start : start + length])
        for row in known.tolist()
        for start in range(len(row) - length + 1)
    }
    covered = 0
    for row in asked.tolist():
        places = {
            start + step
            for start in range(len(row) - length + 1)
            if tuple(row[start : start + length]) in runs
            for step in range(length)
        }
        covered += len(places)
    return covered / asked.numel()


@st.composite
def windows(draw: DrawFn) -> torch.Tensor:
    num, size = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    numbers = draw(st.lists(st.integers(0, 2), min_size=num * size, max_size=num * size))
    return torch.tensor(numbers).view(num, size)


@settings(deadline=None)
@given(windows(), windows(), st.integers(1, 6))
def test_the_share_is_that_of_plain_comparison(
    known: torch.Tensor, asked: torch.Tensor, length: int
) -> None:
    found = shared_share(known, asked, length=length)
    assert found == compared_one_by_one(known, asked, length)


def test_the_same_text_is_shared_wholly_and_another_not_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 1000, (4, 64), generator=generator)
    assert shared_share(text, text) == 1
    assert shared_share(text, text.flip(0)) == 1
    assert shared_share(text, text + 1000) == 0
    assert shared_share(text, text.flip(1)) == 0
    assert shared_share(text[:, :20], text) == 0  # shorter than a run


def test_the_bundled_texts_share_nothing() -> None:
    folder = str(resources.files("llmprune") / "demo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps = [{"prune": {"sparsity": 0.5}}]
    found = read_windows(build({"model": "demo", "steps": steps}), tokenizer, seq_len=512)
    ids = token_ids(evaluation_text("demo"), tokenizer)
    evaluated = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)
    assert found.tokens.shape == (128, 512)
    assert shared_share(found.tokens, evaluated) == 0
