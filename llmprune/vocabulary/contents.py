"""What a tokenizer.json holds: its kind of model, its tokens by id, its merges.

V is the number of ids, that is of embedding rows; a tokenizer may have tokens for fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.base.errors import UnsupportedModel

KINDS = ("BPE", "Unigram", "WordPiece", "WordLevel")


def kind_of(tokenizer_json: Mapping[str, Any]) -> str:
    """Return the kind of a tokenizer's model; files of old releases do not name it.

    Raises:
        UnsupportedModel: a kind that is not known here.
    """
    model = tokenizer_json.get("model")
    if not isinstance(model, Mapping) or "vocab" not in model:
        raise UnsupportedModel(
            "tokenizer.json has no model with a vocab, so its tokens cannot be told. Save the "
            "tokenizer once with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    guess = "BPE" if "merges" in model else "WordPiece" if _counts_chars(model) else "WordLevel"
    guess = "Unigram" if isinstance(model["vocab"], list) else guess
    kind = model.get("type") or guess
    if kind not in KINDS:
        raise UnsupportedModel(
            f"tokenizer.json holds a model of type {kind!r}; the vocabulary is cut for "
            f"{', '.join(KINDS)}. Leave the vocabulary as it is."
        )
    return str(kind)


def _counts_chars(model: Mapping[str, Any]) -> bool:
    return "max_input_chars_per_word" in model


def model_tokens(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the tokens of the model, added ones left out.

    >>> model_tokens({"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}})
    {'a': 0, 'b': 1}
    """
    vocab = tokenizer_json["model"]["vocab"]
    if kind_of(tokenizer_json) == "Unigram":
        return {str(piece): index for index, (piece, _) in enumerate(vocab)}
    return {str(token): int(index) for token, index in vocab.items()}


def all_tokens(tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of all tokens, those of the model and the added ones."""
    added = tokenizer_json.get("added_tokens") or []
    return model_tokens(tokenizer_json) | {token["content"]: int(token["id"]) for token in added}


def merges_of(tokenizer_json: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges of a BPE in order of rank; old files write them as one text.

    >>> merges_of({"model": {"type": "BPE", "vocab": {}, "merges": ["a b", ["ab", " c"]]}})
    [('a', 'b'), ('ab', ' c')]
    """
    if kind_of(tokenizer_json) != "BPE":
        return []
    merges = tokenizer_json["model"].get("merges") or []
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]
    return [(str(first), str(second)) for first, second in pairs]


def joined(first: str, second: str, prefix: str | None) -> str:
    """Return the token that a merge makes; the second part gives its prefix up.

    >>> joined("a", "##b", "##")
    'ab'
    """
    return first + second.removeprefix(prefix or "")


def parts_of(tokenizer_json: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every part of the pipeline around the model, those inside a sequence too."""
    for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        yield from _parts(tokenizer_json.get(key))


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        yield value
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            yield from _parts(value.get(key))
    elif isinstance(value, list):
        for item in value:
            yield from _parts(item)


def is_byte_level(tokenizer_json: Mapping[str, Any]) -> bool:
    """Tell whether text is spelt in 256 characters that stand for bytes, as GPT-2's is."""
    return any(part.get("type") == "ByteLevel" for part in parts_of(tokenizer_json))


def falls_back_to_bytes(tokenizer_json: Mapping[str, Any]) -> bool:
    """Tell whether unknown characters become tokens such as `<0xE2>`, as SentencePiece's do."""
    return bool(tokenizer_json["model"].get("byte_fallback"))
