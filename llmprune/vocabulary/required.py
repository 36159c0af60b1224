"""The tokens that stay whatever the text: bytes, digits, special tokens, and what files name."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint.sink import TEMPLATES
from llmprune.checkpoint.skeleton import read_config
from llmprune.checkpoint.source import read_json
from llmprune.vocabulary.contents import (
    all_tokens,
    falls_back_to_bytes,
    is_byte_level,
    kind_of,
    model_tokens,
    parts_of,
)
from llmprune.vocabulary.identifiers import SIZE_KEY, find_ids, find_processor_ids

SPACES = "▁Ġ"  # how SentencePiece and byte-level vocabularies mark a word's beginning
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
DIGITS = frozenset("0123456789")
MARKS = ("content", "replacement", "prepend")
ASCII = frozenset(map(chr, range(32, 127)))
ROLES = ("system", "user", "assistant", "tool")
TAGS = re.compile(r"\{#.*?#\}|(\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)
LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def required_ids(folder: Path, tokenizer: Any, *, trust_remote_code: bool = False) -> set[int]:
    """Return the ids that a checkpoint's tokenizer, configs and chat templates cannot do without.

    `tokenizer` is the folder's as transformers opens it: its class may name special tokens itself.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModel: the tokenizer or the model is of a kind that is not known.
    """
    tokenizer_json = read_json(folder / "tokenizer.json")
    found = pinned_ids(tokenizer_json) | set(tokenizer.all_special_ids)
    found.update(*find_ids(whole_config(folder, trust_remote_code=trust_remote_code)).values())
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found.update(*find_ids(read_json(folder / name)).values())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            found |= named_ids(tokenizer_json, read_json(folder / name))
    return found | template_ids(tokenizer_json, chat_templates(folder))


def whole_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return config.json, with the ids and sizes that its class fills in where it names none.

    A default that lies beyond the vocabulary, as GPT-2's does in a small one, names no token.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    num_ids = config.get_text_config(decoder=True).vocab_size
    return _filled(read_json(folder / "config.json"), config.to_dict(), num_ids)


def _filled(data: Mapping[str, Any], defaults: Mapping[str, Any], num_ids: int) -> dict[str, Any]:
    result = dict(data)
    for key, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(data.get(key), Mapping):
            result[key] = _filled(data[key], value, num_ids)
        elif key not in data and value is not None:
            ids = find_ids({key: value}).get(key, [])
            if SIZE_KEY.fullmatch(key) or (ids and max(ids) < num_ids):
                result[key] = value
    return result


def pinned_ids(tokenizer_json: Mapping[str, Any]) -> set[int]:
    """Return the ids without which some text could not be spelt, or the tokenizer not run.

    These are added tokens, the unknown token, those that the post-processor and padding set, the
    256 bytes, single characters (with byte fallback ASCII alone: bytes spell the others), single
    digits, and of a Unigram the piece with the lowest score, which sets the price of the unknown.
    """
    kind, model = kind_of(tokenizer_json), tokenizer_json["model"]
    found = {int(token["id"]) for token in tokenizer_json.get("added_tokens") or []}
    found |= find_processor_ids(tokenizer_json)
    tokens = model_tokens(tokenizer_json)
    if kind == "Unigram":
        scores = [float(score) for _, score in model["vocab"]]
        found |= {scores.index(min(scores))} if scores else set()
        found |= set() if model.get("unk_id") is None else {int(model["unk_id"])}
    elif model.get("unk_token") in tokens:
        found.add(tokens[model["unk_token"]])
    return found | _alphabet(tokenizer_json, tokens)


def _alphabet(tokenizer_json: Mapping[str, Any], tokens: Mapping[str, int]) -> set[int]:
    """Return the ids of bytes, of digits, and of the characters that nothing else can spell."""
    model = tokenizer_json["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    letters = _irreplaceable(tokenizer_json)
    found = set()
    for token, index in tokens.items():
        letter = token.removeprefix(prefix).removesuffix(suffix) or token
        spelt = len(letter) == 1 and (letters is None or letter in letters)
        if spelt or letter.lstrip(SPACES) in DIGITS or BYTE.fullmatch(token):
            found.add(index)
    return found


def _irreplaceable(tokenizer_json: Mapping[str, Any]) -> set[str] | None:
    """Return the characters that bytes cannot stand for, or None where that is all of them.

    A mark that the pipeline puts in for a space has a meaning that its bytes lack.
    """
    if is_byte_level(tokenizer_json) or not falls_back_to_bytes(tokenizer_json):
        return None
    marks = set(SPACES)
    for part in parts_of(tokenizer_json):
        marks.update(*(part[key] for key in MARKS if isinstance(part.get(key), str)))
    return marks | ASCII


def named_ids(tokenizer_json: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> set[int]:
    """Return the ids of the special tokens that a config names by their text.

    >>> named_ids({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}}, {"bos_token": "b"})
    {1}
    """
    tokens = all_tokens(tokenizer_json)
    found: set[str] = set()
    for key, value in tokenizer_config.items():
        if key.endswith("_token"):
            found |= _texts([value])
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            found |= _texts(value.values() if isinstance(value, Mapping) else value or [])
    return {tokens[token] for token in found if token in tokens}


def _texts(values: Iterable[Any]) -> set[str]:
    """Return tokens as text, whether written as such or as an object with its content."""
    texts = [value.get("content") if isinstance(value, Mapping) else value for value in values]
    return {text for text in texts if isinstance(text, str)}


def chat_templates(folder: Path) -> list[str]:
    """Return the chat templates of a checkpoint, wherever they are written."""
    paths = [folder / "chat_template.jinja", *sorted((folder / TEMPLATES).glob("*.jinja"))]
    found = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            own = read_json(folder / name).get("chat_template")
            parts = own if isinstance(own, list) else [{"template": own}]
            found += [str(part["template"]) for part in parts if part.get("template")]
    return found


def template_ids(tokenizer_json: Mapping[str, Any], templates: Iterable[str]) -> set[int]:
    """Return the ids that the wording of chat templates is encoded as."""
    from tokenizers import Tokenizer

    wording = [text for template in templates for text in template_wording(template)]
    if not wording:
        return set()
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json))
    found = tokenizer.encode_batch(wording, add_special_tokens=False)
    return {index for encoding in found for index in encoding.ids}


def template_wording(template: str) -> list[str]:
    """Return the texts that a chat template can write: outside its tags, and quoted in them.

    The names of the roles come from the conversation, and belong to it as well.

    >>> template_wording("{# a #}<s>{{ '[INST] ' + text }}")
    ['<s>', '[INST] ', 'system', 'user', 'assistant', 'tool']
    """
    pieces = TAGS.split(template)  # text, tag, text, ...; a comment leaves None
    found = pieces[::2]
    for tag in pieces[1::2]:
        found += [_literal(quoted) for quoted in LITERAL.findall(tag or "")]
    return [text for text in (*found, *ROLES) if text]


def _literal(quoted: str) -> str:
    try:
        return str(ast.literal_eval(quoted.replace("\n", "\\n")))
    except (ValueError, SyntaxError):
        return quoted[1:-1]
