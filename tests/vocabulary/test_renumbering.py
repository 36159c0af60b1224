"""A tokenizer with fewer tokens opens, numbers them densely, and says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from llmprune.base.errors import UnsupportedModel
from llmprune.vocabulary.agreement import round_trip
from llmprune.vocabulary.choosing import choose_tokens
from llmprune.vocabulary.contents import all_tokens
from llmprune.vocabulary.renumbering import rewrite_tokenizer

Opened = Callable[[Mapping[str, Any]], Any]


def kept_without(tokenizer_json: dict[str, Any], *tokens: str) -> list[int]:
    return sorted(i for token, i in all_tokens(tokenizer_json).items() if token not in tokens)


def test_bytes_spell_what_a_sentencepiece_bpe_lost(
    sentencepiece_bpe: dict[str, Any], opened: Opened
) -> None:
    kept = kept_without(sentencepiece_bpe, "é", "日", "日日", "abc")
    old, new = opened(sentencepiece_bpe), opened(rewrite_tokenizer(sentencepiece_bpe, kept))
    text = "ab abc é日日日 <s>a"
    assert new.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert new.tokenize("abc ab") == ["▁ab", "c", "▁ab"]
    found = round_trip(old, new, [text])
    assert found.num_bytes == len(text.encode())
    assert found.tokens_after > found.tokens_before
    assert new("a")["input_ids"] == [new.convert_tokens_to_ids(token) for token in ("<s>", "▁a")]


def test_the_post_processor_and_padding_are_renumbered(
    unigram: dict[str, Any], opened: Opened
) -> None:
    result = rewrite_tokenizer(unigram, kept_without(unigram, "ab", "▁b"))
    assert [piece for piece, _ in result["model"]["vocab"]] == [
        "▁", "a", "b", "▁ab", "abab", "ba", "<unk>",
    ]  # fmt: skip
    assert result["model"]["unk_id"] == 6
    assert result["padding"]["pad_id"] == 7
    assert result["added_tokens"][0]["id"] == 7
    assert opened(result)("ab")["input_ids"] == [3, 7]
    assert result["model"]["vocab"][3] == unigram["model"]["vocab"][4]  # with its score
    assert opened(result).decode(opened(result)("ab ba b")["input_ids"]) == "ab ba b</s>"


def test_a_unigram_that_keeps_the_tokens_of_a_text_spells_it_the_same(
    unigram: dict[str, Any], opened: Opened
) -> None:
    old = opened(unigram)
    for text in ("ab ba", "abab", "xab bab", "b bb a?a"):
        ids = set(old(text)["input_ids"])
        counts_V = torch.zeros(10, dtype=torch.int64)
        counts_V[list(ids)] = 5
        kept = choose_tokens(unigram, counts_V, num_kept=9, multiple=1)
        assert ids <= set(kept)
        assert opened(rewrite_tokenizer(unigram, kept)).tokenize(text) == old.tokenize(text)


def test_a_wordpiece_spells_the_rest_in_shorter_pieces(
    wordpiece: dict[str, Any], opened: Opened
) -> None:
    assert opened(wordpiece).tokenize("ab babb") == ["ab", "ba", "##b", "##b"]
    result = rewrite_tokenizer(wordpiece, kept_without(wordpiece, "ab", "##abb"))
    new = opened(result)
    assert new.tokenize("ab babb") == ["a", "##b", "ba", "##b", "##b"]
    assert new("b")["input_ids"] == [1, new.convert_tokens_to_ids("b"), 2]
    assert sorted(result["model"]["vocab"].values()) == list(range(9))


@pytest.mark.parametrize(("kind", "given"), [("sequence", 1), ("roberta", 3)])
def test_nested_and_other_post_processors_are_renumbered(
    sentencepiece_bpe: dict[str, Any], kind: str, given: int
) -> None:
    inner = sentencepiece_bpe["post_processor"]
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["ab", 265]}
    roberta |= {"trim_offsets": True, "add_prefix_space": True}
    processor = {"type": "Sequence", "processors": [inner]} if kind == "sequence" else roberta
    data = sentencepiece_bpe | {"post_processor": processor}
    assert all_tokens(data)["ab"] == 265
    result = rewrite_tokenizer(data, kept_without(data, "é", "日", "日日"))["post_processor"]
    if kind == "sequence":
        assert result["processors"][0] == inner
    else:
        assert (result["sep"], result["cls"]) == (["</s>", 2], ["ab", 263])


def test_added_tokens_beyond_the_model_move_with_it(
    two_letters: dict[str, Any], opened: Opened
) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(two_letters))
    tokenizer.add_special_tokens(["<x>", "<y>"])
    result = rewrite_tokenizer(json.loads(tokenizer.to_str()), [0, 1, 3, 4, 5])
    assert opened(result)("a<y>b<x>")["input_ids"] == [0, 4, 1, 3]


@pytest.mark.parametrize(
    ("fixture", "gone", "named"),
    [
        ("sentencepiece_bpe", "<s>", "post_processor.special_tokens names token 1"),
        ("sentencepiece_bpe", "</s>", "added_tokens '</s>' names token 2"),
        ("unigram", "<unk>", "model.unk_id names token 8"),
        ("wordpiece", "[UNK]", "model.unk_token names token 0"),
    ],
)
def test_a_token_that_the_tokenizer_needs_cannot_go(
    request: pytest.FixtureRequest, fixture: str, gone: str, named: str
) -> None:
    data = request.getfixturevalue(fixture)
    with pytest.raises(UnsupportedModel, match=f"tokenizer.json: .*{named}".replace("[", r"\[")):
        rewrite_tokenizer(data, kept_without(data, gone))


def test_ids_that_the_library_gives_otherwise_are_refused(two_letters: dict[str, Any]) -> None:
    two_letters["added_tokens"] = [
        {"id": 9, "content": "<x>", "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
    ]  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"'<x>' as token 9, which is given 4"):
        rewrite_tokenizer(two_letters, [0, 1, 9])


def test_unknown_kinds_and_broken_files_are_refused(two_letters: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="model of type 'Runes'"):
        rewrite_tokenizer({"model": {"type": "Runes", "vocab": {}}}, [0])
    with pytest.raises(UnsupportedModel, match="no model with a vocab"):
        rewrite_tokenizer({"version": "1.0"}, [0])
    two_letters["model"]["merges"].append(["a", "nowhere"])
    with pytest.raises(UnsupportedModel, match="does not open"):
        rewrite_tokenizer(two_letters, [0, 1])


def test_files_of_old_releases_are_read(two_letters: dict[str, Any], opened: Opened) -> None:
    del two_letters["model"]["type"]
    two_letters["model"]["merges"] = ["a b"]
    result = rewrite_tokenizer(two_letters, [0, 1, 2])
    assert opened(result).tokenize("abab") == ["ab", "ab"]


def test_text_that_does_not_come_back_is_an_error(
    two_letters: dict[str, Any], opened: Opened
) -> None:
    model = models.WordLevel({"ab": 0, "?": 1}, unk_token="?")
    with pytest.raises(UnsupportedModel, match=r"'ab ab' comes back as '\?'"):
        round_trip(opened(two_letters), opened(json.loads(Tokenizer(model).to_str())), ["abab"])


def test_a_round_trip_counts_what_is_spelt_anew(
    two_letters: dict[str, Any], opened: Opened
) -> None:
    two_letters["decoder"] = {"type": "Fuse"}
    old, new = opened(two_letters), opened(rewrite_tokenizer(two_letters, [0, 1, 3]))
    found = round_trip(old, new, ["ab a", "ba"])
    assert (found.tokens_before, found.tokens_after, found.num_changed) == (5, 6, 1)
    assert "5 tokens became 6, 1 (20.00%) spelt anew" in found.text()
