"""Where token ids stand in the small files of a checkpoint: found, and written anew.

Configs name ids in many keys, single or in lists of lists; `_visit` alone knows these keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llmprune.base.errors import UnsupportedModel

Change = Callable[[str, int], int]  # key path and id -> new id

ID_KEY = re.compile(
    r".*_token_(ids?|index)|(bos|eos|pad|unk|sep|cls|mask|eod)_ids?|stop_ids|stop_tokens"
    r"|(begin_)?suppress_tokens|(bad|force)_words_ids"
)
SIZE_KEY = re.compile(r"(.*_)?vocab_size(_.*)?|n_words")


def find_ids(data: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the ids that a config names, by key path; negative ones mean none and are left out.

    >>> find_ids({"eos_token_id": [2, 5], "text_config": {"pad_token_id": 0}, "pad_token_id": None})
    {'eos_token_id': [2, 5], 'text_config.pad_token_id': [0]}
    """
    found: dict[str, list[int]] = {}

    def collect(path: str, index: int) -> int:
        found.setdefault(path, []).append(index)
        return index

    _visit(data, collect, "")
    return found


def rewrite_ids(
    data: Mapping[str, Any], mapping: Mapping[int, int], *, where: str, num_before: int
) -> dict[str, Any]:
    """Return a config with every id in new numbering and every size of the vocabulary set.

    `mapping` is old id -> new id of all kept rows; `where` names the file in errors.

    Raises:
        UnsupportedModel: a key names an id that is not kept, or there is a second vocabulary.

    >>> rewrite_ids({"eos_token_id": 5, "vocab_size": 8}, {0: 0, 5: 1}, where="c", num_before=8)
    {'eos_token_id': 1, 'vocab_size': 2}
    """
    found = _visit(data, renumbering(mapping, where), "")
    assert isinstance(found, dict)
    return _sized(found, num_before, len(mapping), where)


def renumbering(mapping: Mapping[int, int], where: str) -> Change:
    """Return what turns an old id into the new one, and refuses one that is gone."""

    def change(path: str, index: int) -> int:
        if index not in mapping:
            raise UnsupportedModel(
                f"{where}: {path} names token {index}, which the smaller vocabulary lacks. Keep "
                f"the token, or take it out of {path} if no such row was there before."
            )
        return mapping[index]

    return change


def find_processor_ids(tokenizer_json: Mapping[str, Any]) -> set[int]:
    """Return the ids that the post-processor and the padding of a tokenizer.json set."""
    found: set[int] = set()

    def collect(path: str, index: int) -> int:
        found.add(index)
        return index

    change_processor(tokenizer_json, collect)
    return found


def change_processor(tokenizer_json: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return the post-processor and the padding of a tokenizer.json with their ids changed."""
    padding = tokenizer_json.get("padding")
    if padding and "pad_id" in padding:
        padding = {**padding, "pad_id": change("padding.pad_id", padding["pad_id"])}
    return {
        "post_processor": _processor(tokenizer_json.get("post_processor"), change),
        "padding": padding,
    }


def _processor(processor: Any, change: Change) -> Any:
    if not isinstance(processor, Mapping):
        return processor
    result = dict(processor)
    if "processors" in result:  # a sequence
        result["processors"] = [_processor(part, change) for part in result["processors"]]
    for key in ("sep", "cls"):  # of BERT and RoBERTa: [token, id]
        if key in result:
            token, index = result[key]
            result[key] = [token, change(f"post_processor.{key}", index)]
    if isinstance(tokens := result.get("special_tokens"), Mapping):  # of a template
        path = "post_processor.special_tokens"
        result["special_tokens"] = {
            name: {**token, "ids": [change(path, index) for index in token["ids"]]}
            for name, token in tokens.items()
        }
    return result


def _visit(value: Any, change: Change, path: str) -> Any:
    """Return JSON data with `change` applied to all that stands where ids stand."""
    if isinstance(value, Mapping):
        return {
            key: _entry(str(key), item, change, f"{path}.{key}" if path else str(key))
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_visit(item, change, path) for item in value]
    return value


def _entry(key: str, value: Any, change: Change, path: str) -> Any:
    if key == "added_tokens_decoder" and isinstance(value, Mapping):
        return {str(change(path, int(index))): token for index, token in value.items()}
    if key == "forced_decoder_ids" and isinstance(value, list):  # [place, id] each
        return [[place, _numbers(index, change, path)] for place, index in value]
    if key == "sequence_bias" and isinstance(value, list):  # [ids, bias] each
        return [[_numbers(ids, change, path), bias] for ids, bias in value]
    if ID_KEY.fullmatch(key) and not isinstance(value, Mapping):
        return _numbers(value, change, path)
    return _visit(value, change, path)


def _numbers(value: Any, change: Change, path: str) -> Any:
    if isinstance(value, list):
        return [_numbers(item, change, path) for item in value]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return change(path, value)
    return value


def _sized(data: Mapping[str, Any], before: int, after: int, where: str) -> dict[str, Any]:
    """Return a config with the sizes of its vocabulary set, those of nested configs too."""
    result = dict(data)
    for key, value in data.items():
        if isinstance(value, Mapping) and key.endswith("_config"):
            result[key] = _sized(value, before, after, where)
        elif SIZE_KEY.fullmatch(key) and value:
            if value != before:
                raise UnsupportedModel(
                    f"{where}: {key} is {value}, while the vocabulary has {before} rows. A model "
                    "with a second vocabulary cannot be cut by one list of tokens; leave the "
                    "vocabulary as it is."
                )
            result[key] = after
    return result
