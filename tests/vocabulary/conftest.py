"""Small tokenizers of every kind, as the data that tokenizer.json holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
Made = tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]


@pytest.fixture
def as_json() -> Callable[[Tokenizer], dict[str, Any]]:
    return lambda tokenizer: json.loads(tokenizer.to_str())


@pytest.fixture
def opened() -> Callable[[Mapping[str, Any]], PreTrainedTokenizerFast]:
    """Open the data of a tokenizer.json as transformers does."""

    def open_data(data: Mapping[str, Any]) -> PreTrainedTokenizerFast:
        inner = Tokenizer.from_str(json.dumps(data))
        return PreTrainedTokenizerFast(tokenizer_object=inner)

    return open_data


@pytest.fixture
def two_letters(as_json: Callable[[Tokenizer], dict[str, Any]]) -> dict[str, Any]:
    """The vector of the reference: a, b, a space, and the merge of a and b."""
    model = models.BPE({"a": 0, "b": 1, "ab": 2, " ": 3}, [("a", "b")])
    return as_json(Tokenizer(model))


@pytest.fixture
def sentencepiece_bpe(as_json: Callable[[Tokenizer], dict[str, Any]]) -> dict[str, Any]:
    """A BPE as Llama's first: three special tokens, 256 bytes, characters and merges of them."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *"▁abcé日", "ab", "▁a", "▁ab", "abc", "日日"]
    merges = [("a", "b"), ("▁", "ab"), ("▁", "a"), ("ab", "c"), ("▁a", "b"), ("日", "日")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return as_json(tokenizer)


@pytest.fixture
def unigram(as_json: Callable[[Tokenizer], dict[str, Any]]) -> dict[str, Any]:
    """A Unigram without bytes, its unknown token at the end and its cheapest piece amidst."""
    scores = {"▁": -3.0, "a": -4.0, "b": -4.5, "ab": -5.0, "▁ab": -4.2, "abab": -11.0, "▁b": -6.0}
    vocab = [*scores.items(), ("ba", -5.5), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=8))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 9)])
    tokenizer.enable_padding(pad_id=9, pad_token="</s>")
    return as_json(tokenizer)


@pytest.fixture
def wordpiece(as_json: Callable[[Tokenizer], dict[str, Any]]) -> dict[str, Any]:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "a", "##b", "ab", "##abb", "b", "##a", "ba", "1"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return as_json(tokenizer)
