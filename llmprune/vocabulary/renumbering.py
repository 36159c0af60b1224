"""A tokenizer.json with fewer tokens, numbered densely in the order that they had."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.base.errors import UnsupportedModel, first_line
from llmprune.vocabulary.contents import all_tokens, joined, kind_of, merges_of, model_tokens
from llmprune.vocabulary.identifiers import Change, change_processor, renumbering

WHERE = "tokenizer.json"


def new_numbers(kept: Sequence[int]) -> dict[int, int]:
    """Return old id -> new id of the kept ids.

    >>> new_numbers([0, 3, 4])
    {0: 0, 3: 1, 4: 2}
    """
    return {old: new for new, old in enumerate(sorted(set(kept)))}


def rewrite_tokenizer(tokenizer_json: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer of the kept ids: tokens, merges, scores, added tokens, post-processor.

    A merge stays where both its parts and the token that it makes do. The result is opened, and
    must give every token the id of its row.

    Raises:
        UnsupportedModel: a token that the tokenizer needs is not kept, or ids come out otherwise.
    """
    kind_of(tokenizer_json)
    _check_numbers(tokenizer_json, "holds")
    mapping = new_numbers(kept)
    change = renumbering(mapping, WHERE)
    result = dict(tokenizer_json) | change_processor(tokenizer_json, change)
    result["model"] = _model(tokenizer_json, mapping, change)
    result["added_tokens"] = [
        {**token, "id": change(f"added_tokens {token['content']!r}", token["id"])}
        for token in tokenizer_json.get("added_tokens") or []
    ]
    _check_numbers(result, "would hold")
    return result


def _model(
    tokenizer_json: Mapping[str, Any], mapping: Mapping[int, int], change: Change
) -> dict[str, Any]:
    """Return the model part with the kept tokens."""
    model = dict(tokenizer_json["model"])
    if kind_of(tokenizer_json) == "Unigram":
        model["vocab"] = [row for index, row in enumerate(model["vocab"]) if index in mapping]
        if model.get("unk_id") is not None:
            model["unk_id"] = change("model.unk_id", model["unk_id"])
        return model
    tokens = model_tokens(tokenizer_json)
    if (unknown := model.get("unk_token")) in tokens:
        change("model.unk_token", tokens[unknown])
    model["vocab"] = {token: mapping[index] for token, index in tokens.items() if index in mapping}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix")
        model["merges"] = [
            [first, second]
            for first, second in merges_of(tokenizer_json)
            if {first, second, joined(first, second, prefix)} <= model["vocab"].keys()
        ]
    return model


def _check_numbers(tokenizer_json: Mapping[str, Any], verb: str) -> None:
    """Check that the tokenizer gives its tokens the ids that are written in the file.

    Raises:
        UnsupportedModel: it does not open, or gives others.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
    except Exception as error:  # the library raises Exception itself
        raise UnsupportedModel(
            f"{WHERE} {verb} what the tokenizers library does not open: {first_line(error)}. "
            "Leave the vocabulary as it is."
        ) from error
    given = tokenizer.get_vocab(with_added_tokens=True)
    for token, index in all_tokens(tokenizer_json).items():
        if given.get(token) != index:
            raise UnsupportedModel(
                f"{WHERE} {verb} {token!r} as token {index}, which is given {given.get(token)} "
                "when the file is opened, so its row cannot be told. Leave the vocabulary as it is."
            )
