"""Choosing: exact sizes, the most used, whole chains, and never what must stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llmprune.base.errors import RecipeError, UnsupportedModel
from llmprune.vocabulary.choosing import choose_tokens, count_texts, count_tokens
from llmprune.vocabulary.closure import merge_parents
from llmprune.vocabulary.renumbering import rewrite_tokenizer
from llmprune.vocabulary.required import pinned_ids
from tests.reference.vocabularies import rarest_dropped

Opened = Callable[[Mapping[str, Any]], Any]


@st.composite
def merged(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """Draw a BPE whose tokens each come from two before them, and counts."""
    tokens, merges = list("abc"), []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(pair)
    vocab = {token: index for index, token in enumerate(tokens)}
    counts = draw(st.lists(st.integers(0, 6), min_size=len(tokens), max_size=len(tokens)))
    return json.loads(Tokenizer(models.BPE(vocab, merges)).to_str()), counts


@given(merged(), st.data())
def test_chains_are_whole_sizes_exact_and_the_slow_version_agrees(
    drawn: tuple[dict[str, Any], list[int]], data: st.DataObject
) -> None:
    tokenizer_json, counts = drawn
    size = data.draw(st.integers(3, len(counts)))
    kept = choose_tokens(tokenizer_json, torch.tensor(counts), num_kept=size, multiple=1)
    parents = merge_parents(tokenizer_json)
    assert len(kept) == size and kept == sorted(set(kept))
    assert all(part in kept for index in kept for part in parents.get(index, ()))
    assert kept == rarest_dropped(counts, parents, pinned_ids(tokenizer_json), size)


@given(merged(), st.data())
def test_text_is_spelt_the_same_wherever_its_tokens_are_kept(
    drawn: tuple[dict[str, Any], list[int]], data: st.DataObject
) -> None:
    tokenizer_json, counts = drawn
    size = data.draw(st.integers(3, len(counts)))
    kept = choose_tokens(tokenizer_json, torch.tensor(counts), num_kept=size, multiple=1)
    old = Tokenizer.from_str(json.dumps(tokenizer_json))
    new = Tokenizer.from_str(json.dumps(rewrite_tokenizer(tokenizer_json, kept)))
    words = st.lists(st.sampled_from(list(tokenizer_json["model"]["vocab"])), max_size=4)
    for word in data.draw(st.lists(words.map("".join), max_size=10)):
        before, after = old.encode(word), new.encode(word)
        assert "".join(after.tokens) == word
        assert max(after.ids, default=0) < size
        if set(before.ids) <= set(kept):
            assert after.tokens == before.tokens


def test_a_token_that_is_gone_is_spelt_with_what_it_was_merged_from(
    two_letters: dict[str, Any], opened: Opened
) -> None:
    old = opened(two_letters)
    assert old.tokenize("ab ab") == ["ab", " ", "ab"]
    counts_V = count_texts(["ab ab"], old, num_ids=4)
    assert counts_V.tolist() == [0, 0, 2, 1]
    kept = choose_tokens(two_letters, counts_V, num_kept=3, multiple=1)
    assert kept == [0, 1, 3]
    new = opened(rewrite_tokenizer(two_letters, kept))
    assert new.tokenize("ab ab") == ["a", "b", " ", "a", "b"]
    assert new("ab ab")["input_ids"] == [0, 1, 2, 0, 1]


def test_counts_pass_to_the_parts() -> None:
    tokens = ["a", "b", "ab", "aba", "abb", "ba"]
    merges = [("a", "b"), ("ab", "a"), ("ab", "b"), ("b", "a")]
    vocab = {token: index for index, token in enumerate(tokens)}
    data = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    counts_V = torch.tensor([0, 0, 0, 3, 3, 4])  # without aba and abb, ab occurs 6 times
    assert choose_tokens(data, counts_V, num_kept=3, multiple=1) == [0, 1, 2]


def test_of_equals_the_lower_id_stays(unigram: dict[str, Any]) -> None:
    kept = choose_tokens(unigram, torch.zeros(10), num_kept=8, multiple=1)
    # pinned: ▁ a b (characters), abab (the lowest score), <unk>, </s>; free: ab ▁ab ▁b ba
    assert kept == [0, 1, 2, 3, 4, 5, 8, 9]


def test_rows_without_a_token_go_first_and_padding_after_holes(two_letters: dict[str, Any]) -> None:
    two_letters["model"]["vocab"] = {"a": 0, "b": 1, "ab": 3, " ": 4}
    counts_V = torch.zeros(8)
    for size, kept in ((7, [0, 1, 3, 4, 5, 6, 7]), (5, [0, 1, 3, 4, 5]), (3, [0, 1, 4])):
        assert choose_tokens(two_letters, counts_V, num_kept=size, multiple=1) == kept


def test_sizes_round_down_to_a_multiple_and_shares_are_of_all_rows(
    sentencepiece_bpe: dict[str, Any],
) -> None:
    size = len(sentencepiece_bpe["model"]["vocab"])
    counts_V = torch.zeros(640)
    assert size < 320
    assert len(choose_tokens(sentencepiece_bpe, counts_V, num_kept=639)) == 576
    assert len(choose_tokens(sentencepiece_bpe, counts_V, share=0.55)) == 320
    assert len(choose_tokens(sentencepiece_bpe, counts_V, share=0.55, multiple=1)) == 352
    assert choose_tokens(sentencepiece_bpe, counts_V, share=1.0) == list(range(640))


def test_too_few_names_the_smallest_size_that_works(sentencepiece_bpe: dict[str, Any]) -> None:
    counts_V = torch.zeros(len(sentencepiece_bpe["model"]["vocab"]))
    with pytest.raises(RecipeError, match=r"64 of 270 ids are too few.* are 263\. .*least 320"):
        choose_tokens(sentencepiece_bpe, counts_V, num_kept=127)
    assert len(choose_tokens(sentencepiece_bpe, counts_V, num_kept=263, multiple=1)) == 263


@pytest.mark.parametrize(
    "asked", [{}, {"num_kept": 3, "share": 0.5}, {"num_kept": 0}, {"share": 1.5}, {"num_kept": 5}]
)
def test_sizes_that_make_no_sense_are_refused(
    two_letters: dict[str, Any], asked: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="vocabulary: "):
        choose_tokens(two_letters, torch.zeros(4), multiple=1, **asked)


def test_required_ids_stay_with_their_chain(two_letters: dict[str, Any]) -> None:
    counts_V = torch.tensor([9, 9, 0, 9])
    with pytest.raises(RecipeError, match="are 4"):
        choose_tokens(two_letters, counts_V, num_kept=3, multiple=1, required=[2])


def test_a_token_without_a_row_is_refused(two_letters: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="token 3 has no row: the embeddings have 3"):
        choose_tokens(two_letters, torch.zeros(3), num_kept=2, multiple=1)
    with pytest.raises(UnsupportedModel, match="token 9 has no row"):
        choose_tokens(two_letters, torch.zeros(4), num_kept=3, multiple=1, required=[9])


def test_windows_are_counted() -> None:
    windows_NT = torch.tensor([[0, 3, 3], [1, 3, 0]])
    assert count_tokens(windows_NT, num_ids=6).tolist() == [2, 1, 0, 3, 0, 0]
