"""What stays whatever the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import read_json
from llmprune.vocabulary.contents import all_tokens
from llmprune.vocabulary.required import (
    chat_templates,
    named_ids,
    pinned_ids,
    required_ids,
    template_ids,
    template_wording,
    whole_config,
)

Opened = Callable[[Mapping[str, Any]], Any]
TEMPLATE = "{# [x] #}{% if a == \"ab\" %}<|im|>{{ 'a\\nb' }}{% endif %}"


def texts(tokenizer_json: dict[str, Any], ids: set[int]) -> set[str]:
    return {token for token, index in all_tokens(tokenizer_json).items() if index in ids}


def test_a_byte_level_vocabulary_keeps_256_bytes_digits_and_special_tokens() -> None:
    data = read_json(open_source("demo").folder / "tokenizer.json")
    found = texts(data, pinned_ids(data))
    words = {token for token in found if len(token) > 1}
    assert len(found) - len(words) == 256
    digits = {f"Ġ{digit}" for digit in "0123456789"} & all_tokens(data).keys()
    assert digits and words == {"<|bos|>", "<|eos|>"} | digits


def test_with_byte_fallback_only_ascii_and_the_mark_for_spaces_stay(
    sentencepiece_bpe: dict[str, Any],
) -> None:
    found = texts(sentencepiece_bpe, pinned_ids(sentencepiece_bpe))
    assert {token for token in found if len(token) == 1} == set("▁abc")
    assert len(found) == 256 + 3 + 4


def test_a_unigram_keeps_characters_and_its_lowest_score(unigram: dict[str, Any]) -> None:
    found = texts(unigram, pinned_ids(unigram))
    assert found == {"▁", "a", "b", "abab", "<unk>", "</s>"}


def test_a_wordpiece_keeps_characters_within_words_too(wordpiece: dict[str, Any]) -> None:
    found = texts(wordpiece, pinned_ids(wordpiece))
    assert found == {"[UNK]", "[CLS]", "[SEP]", "a", "##b", "b", "##a", "1"}


def test_special_tokens_are_found_by_name(two_letters: dict[str, Any]) -> None:
    config = {
        "bos_token": "ab",
        "pad_token": None,
        "eos_token": {"content": " ", "lstrip": False},
        "additional_special_tokens": ["b", "nowhere"],
        "add_bos_token": True,
    }
    assert named_ids(two_letters, config) == {1, 2, 3}
    assert named_ids(two_letters, {"extra_special_tokens": {"image_token": "a"}}) == {0}


def test_a_template_writes_what_stands_outside_of_tags_and_in_quotes() -> None:
    assert template_wording(TEMPLATE) == [
        "<|im|>",
        "ab",
        "a\nb",
        "system",
        "user",
        "assistant",
        "tool",
    ]


def test_the_tokens_of_templates_stay() -> None:
    tokens = ["[UNK]", "a", "b", "system", "user", "<|im|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    data = json.loads(Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")).to_str())
    assert template_ids(data, []) == set()
    assert template_ids(data, ["<|im|>{{ 'b' }}"]) == {0, 2, 3, 4, 5}  # assistant is unknown


def test_templates_are_found_wherever_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "chat_template.jinja").write_text("one")
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("two")
    named = [{"name": "default", "template": "three"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "four"}))
    assert chat_templates(tmp_path) == ["one", "two", "three", "four"]


def test_ids_that_the_config_class_fills_in_are_written_out(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 90, "pad_token_id": None, "eos_token_id": [5, 6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert whole_config(tmp_path) == config | {"bos_token_id": 1}
    config = {"model_type": "gpt2", "vocab_size": 90}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert whole_config(tmp_path) == config  # 50256 is no row of 90
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert whole_config(tmp_path)["vocab_size"] == 50257


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_what_the_files_of_a_folder_name_is_required(
    tmp_path: Path, two_letters: dict[str, Any], opened: Opened, where: str
) -> None:
    tokenizer = opened(two_letters)
    base = {"model_type": "llama", "vocab_size": 4, "bos_token_id": 0, "eos_token_id": 0}
    files = {"tokenizer.json": two_letters, "config.json": base}
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert required_ids(tmp_path, tokenizer) == {0, 1, 3}
    (tmp_path / where).write_text(json.dumps(files.get(where, {}) | {"eos_token_id": [0, 2]}))
    assert required_ids(tmp_path, tokenizer) == {0, 1, 2, 3}
    (tmp_path / where).write_text(json.dumps(files.get(where, {})))
    tokenizer.pad_token = "ab"
    assert required_ids(tmp_path, tokenizer) == {0, 1, 2, 3}
