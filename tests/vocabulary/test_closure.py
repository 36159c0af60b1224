"""What a token is merged from: the library itself makes the token from these alone."""

from __future__ import annotations

import json
import string
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llmprune.vocabulary.closure import last_merge, merge_parents, symbols
from llmprune.vocabulary.renumbering import rewrite_tokenizer
from tests.reference.vocabularies import encode

LETTERS = "ab"


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a BPE with every split of its tokens as a merge, in any order, and some left out."""
    words = st.text(LETTERS, min_size=2, max_size=5)
    tokens = [*LETTERS, *draw(st.lists(words, unique=True, max_size=9))]
    splits = [
        (token[:place], token[place:]) for token in tokens[2:] for place in range(1, len(token))
    ]
    merges = [pair for pair in splits if pair[0] in tokens and pair[1] in tokens]
    merges = draw(st.permutations(merges))[: draw(st.integers(0, len(merges)))]
    vocab = {token: index for index, token in enumerate(tokens)}
    found: dict[str, Any] = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    return found


def chain(index: int, parents: dict[int, tuple[int, int]]) -> set[int]:
    return {index}.union(*(chain(part, parents) for part in parents.get(index, ())))


@given(vocabularies())
def test_a_token_is_made_from_its_chain_alone(data: dict[str, Any]) -> None:
    whole = Tokenizer.from_str(json.dumps(data))
    parents = merge_parents(data)
    for token, index in data["model"]["vocab"].items():
        if whole.encode(token).tokens == [token]:
            small = Tokenizer.from_str(
                json.dumps(rewrite_tokenizer(data, [*chain(index, parents)]))
            )
            assert small.encode(token).tokens == [token]


@given(vocabularies(), st.text(LETTERS, min_size=1, max_size=8))
def test_the_last_merge_is_that_of_the_slow_encoder(data: dict[str, Any], word: str) -> None:
    merges = [(first, second) for first, second in data["model"]["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    slow = encode(word, merges)
    assert Tokenizer.from_str(json.dumps(data)).encode(word).tokens == slow
    last = last_merge(list(word), ranks)
    if len(slow) > 1 or len(word) == 1:
        assert last is None
    else:
        assert last is not None and "".join(last) == word
        assert encode(last[0], merges) == [last[0]] and encode(last[1], merges) == [last[1]]


def test_of_several_ways_the_one_that_is_used_counts() -> None:
    vocab = {token: index for index, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    data = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    assert merge_parents(data) == {3: (0, 1), 4: (1, 2), 5: (0, 4)}


def test_tokens_that_no_merge_reaches_have_no_parents() -> None:
    vocab = {token: index for index, token in enumerate(["a", "b", "ab", "ba", "aba", "abab"])}
    merges = [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")]
    data = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    assert merge_parents(data) == {2: (0, 1), 3: (1, 0), 4: (2, 0)}


def test_marks_inside_and_at_the_end_of_words_are_understood() -> None:
    tokens = [*string.ascii_lowercase, "w</w>", "lo", "low</w>", "ow</w>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [("l", "o"), ("o", "w</w>"), ("lo", "w</w>"), ("l", "ow</w>")]
    model = models.BPE(vocab, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    data = json.loads(tokenizer.to_str())
    assert tokenizer.encode("low").tokens == ["low</w>"]
    whole = vocab["low</w>"]
    assert merge_parents(data)[whole] == (vocab["lo"], vocab["w</w>"])
    assert symbols("lo", "##", "</w>") == ["l", "##o"]


def test_parts_inside_a_word_give_their_prefix_up() -> None:
    vocab = {token: index for index, token in enumerate(["a", "##b", "##c", "ab", "##bc", "abc"])}
    merges = [("##b", "##c"), ("a", "##b"), ("a", "##bc"), ("ab", "##c")]
    model = models.BPE(vocab, merges, continuing_subword_prefix="##")
    tokenizer = Tokenizer(model)
    assert tokenizer.encode("abc").tokens == ["abc"]
    assert merge_parents(json.loads(tokenizer.to_str()))[5] == (0, 4)
