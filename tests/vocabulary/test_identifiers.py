"""Every place where ids stand is renumbered, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from llmprune.base.errors import UnsupportedModel
from llmprune.vocabulary.identifiers import find_ids, rewrite_ids

MAPPING = {0: 0, 2: 1, 5: 2, 7: 3}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 3}),
        ({"eos_token_id": [7, 2]}, {"eos_token_id": [3, 1]}),
        ({"pad_token_id": None, "bos_token_id": -1}, {"pad_token_id": None, "bos_token_id": -1}),
        ({"bad_words_ids": [[5], [2, 7]]}, {"bad_words_ids": [[2], [1, 3]]}),
        ({"force_words_ids": [[[5], [2]]]}, {"force_words_ids": [[[2], [1]]]}),
        (
            {"suppress_tokens": [5], "max_new_tokens": 5},
            {"suppress_tokens": [2], "max_new_tokens": 5},
        ),
        ({"begin_suppress_tokens": [2, 5]}, {"begin_suppress_tokens": [1, 2]}),
        ({"forced_decoder_ids": [[1, 5], [2, None]]}, {"forced_decoder_ids": [[1, 2], [2, None]]}),
        ({"sequence_bias": [[[5, 7], -1.5]]}, {"sequence_bias": [[[2, 3], -1.5]]}),
        ({"decoder_start_token_id": 2}, {"decoder_start_token_id": 1}),
        ({"image_token_index": 7, "n_head": 7}, {"image_token_index": 3, "n_head": 7}),
        (
            {"added_tokens_decoder": {"5": {"content": "x"}}},
            {"added_tokens_decoder": {"2": {"content": "x"}}},
        ),
        ({"vocab_size": 9, "hidden_size": 9}, {"vocab_size": 4, "hidden_size": 9}),
        (
            {"text_config": {"vocab_size": 9, "eos_token_id": 5}},
            {"text_config": {"vocab_size": 4, "eos_token_id": 2}},
        ),
        ({"params": {"x": {"eos_token_id": 5}}}, {"params": {"x": {"eos_token_id": 2}}}),
        ({"add_eos_token_id": True}, {"add_eos_token_id": True}),
    ],
)
def test_ids_and_sizes_are_renumbered(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert rewrite_ids(before, MAPPING, where="config.json", num_before=9) == after


def test_the_data_given_is_not_changed() -> None:
    data = {"eos_token_id": [7], "text_config": {"vocab_size": 9}}
    rewrite_ids(data, MAPPING, where="config.json", num_before=9)
    assert data == {"eos_token_id": [7], "text_config": {"vocab_size": 9}}


def test_an_id_that_is_gone_is_an_error_with_its_key() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"generation_config.json: a_config.eos_token_id .* 3"
    ):
        rewrite_ids(
            {"a_config": {"eos_token_id": [2, 3]}},
            MAPPING,
            where="generation_config.json",
            num_before=9,
        )


def test_a_second_vocabulary_is_an_error() -> None:
    data = {"vocab_size": 9, "vocab_size_per_layer_input": 8}
    with pytest.raises(UnsupportedModel, match="vocab_size_per_layer_input is 8"):
        rewrite_ids(data, MAPPING, where="config.json", num_before=9)


def test_ids_are_found_by_path() -> None:
    data = {"eos_token_id": [7, 2], "text_config": {"bad_words_ids": [[5]]}, "num_heads": 4}
    assert find_ids(data) == {"eos_token_id": [7, 2], "text_config.bad_words_ids": [5]}
