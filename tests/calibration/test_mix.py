"""Shares of a mix add up, are reproducible, and every text gives its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import RecipeError
from llmprune.calibration.mix import read_windows, shares, wish_hash
from llmprune.calibration.windows import token_hash
from llmprune.recipe import Recipe, build


def recipe(data: Any, **others: Any) -> Recipe:
    calibration = {"data": data, "num_samples": 8, **others}
    steps = [{"prune": {"sparsity": 0.5}}]
    return build({"model": "owner/name", "steps": steps, "calibration": calibration})


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 2000)
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


@given(
    st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=9),
    st.integers(min_value=0, max_value=2000),
)
def test_shares_add_up_and_are_near_their_weights(weights: list[float], total: int) -> None:
    found = shares(weights, total)
    assert sum(found) == total
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_a_mix_holds_its_shares_in_seeded_order(files: tuple[str, str], tokenizer: Any) -> None:
    wish = [{"data": files[0], "weight": 3}, {"data": files[1]}]
    found = read_windows(recipe(wish), tokenizer, seq_len=16)
    again = read_windows(recipe(wish), tokenizer, seq_len=16)
    letters = ["".join(tokenizer.convert_ids_to_tokens(row))[0] for row in found.tokens.tolist()]
    assert sorted(letters) == ["a"] * 6 + ["b"] * 2
    assert letters != sorted(letters)
    assert torch.equal(found.tokens, again.tokens)
    assert found.record["tokens"] == token_hash(found.tokens)
    assert [text["num_windows"] for text in found.record["texts"]] == [6, 2]
    short = read_windows(recipe(f"{files[0]}:3,{files[1]}:1"), tokenizer, seq_len=16)
    assert torch.equal(short.tokens, found.tokens)
    assert not found.is_remote


def test_a_mix_of_one_is_the_text_alone(files: tuple[str, str], tokenizer: Any) -> None:
    alone = read_windows(recipe(files[0]), tokenizer, seq_len=16)
    assert torch.equal(read_windows(recipe([files[0]]), tokenizer, seq_len=16).tokens, alone.tokens)


def test_a_text_too_light_for_a_window_is_refused(files: tuple[str, str], tokenizer: Any) -> None:
    wish = [{"data": files[0], "weight": 1000}, {"data": files[1]}]
    with pytest.raises(RecipeError, match=r"^calibration\.data\[1\]: .*gives none of the 8"):
        read_windows(recipe(wish), tokenizer, seq_len=16)


def test_a_text_too_short_is_named(files: tuple[str, str], tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("short")
    with pytest.raises(RecipeError, match=r"^calibration\.data\[1\]: the text has 5 tokens"):
        read_windows(recipe([files[0], str(tmp_path / "c.txt")]), tokenizer, seq_len=16)
    (tmp_path / "c.txt").write_text("c" * 40)
    found = read_windows(recipe([files[0], str(tmp_path / "c.txt")]), tokenizer, seq_len=16)
    (notice,) = found.notices
    assert "c.txt: calibration uses 2 windows of 16 tokens instead of 4" in notice
    assert len(found.tokens) == 6


def test_the_hash_of_a_wish_follows_all_that_decides_windows(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    first = wish_hash(recipe("c4"), 16, tmp_path)
    assert wish_hash(recipe("auto"), 16, tmp_path) == first
    others = [
        wish_hash(recipe("ultrachat"), 16, tmp_path),
        wish_hash(recipe("c4", split="validation"), 16, tmp_path),
        wish_hash(recipe("c4", bos=True), 16, tmp_path),
        wish_hash(recipe("c4", num_samples=9), 16, tmp_path),
        wish_hash(recipe("c4").model_copy(update={"seed": 1}), 16, tmp_path),
        wish_hash(recipe("c4"), 32, tmp_path),
    ]
    (tmp_path / "tokenizer.json").write_text("{} ")
    others.append(wish_hash(recipe("c4"), 16, tmp_path))
    assert len({first, *others}) == len(others) + 1


def test_the_hash_of_a_wish_follows_the_files_of_a_mix(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("some words")
    first = wish_hash(recipe(f"c4,{own}"), 16, tmp_path)
    assert wish_hash(recipe(f"c4,{own}"), 16, tmp_path) == first
    own.write_text("some other words")
    assert wish_hash(recipe(f"c4,{own}"), 16, tmp_path) != first
