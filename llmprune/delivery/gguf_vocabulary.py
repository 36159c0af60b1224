"""A tokenizer in the words of llama.cpp: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

llama.cpp knows pre-tokenizers by name only; a name is written where the tokenizer's own rules are
the ones that it stands for (src/llama-vocab.cpp), never by guess.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from llmprune.base.errors import CheckpointError, UnsupportedModel, first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF
NEVER = -1e9  # the score of a piece that no merge makes
SPACE = "▁"

GPT2, DIGITS = "what ByteLevel splits", "single digits"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (the splits in order, whether whole words go before merges) -> tokenizer.ggml.pre
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((CONTRACTIONS + r"\p{N}{1,3}" + REST,), True): "llama-bpe",
    ((CONTRACTIONS + r"\p{N}{1,3}" + REST,), False): "smaug-bpe",
    ((CONTRACTIONS + r"\p{N}" + REST,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}


def vocabulary_fields(folder: Path, num_vocab: int) -> tuple[dict[str, Any], list[str]]:
    """Return the `tokenizer.*` fields for a model of `num_vocab` tokens, and notes.

    Raises:
        CheckpointError: there is no tokenizer.
        UnsupportedModel: llama.cpp would split text differently.
    """
    tokenizer = _read(folder)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > num_vocab:
        _refuse(f"it has {len(tokenizer)} tokens, and the model only {num_vocab}")
    model = data["model"]
    if model.get("type") != "BPE":
        _refuse(f"its model is {model.get('type')}, not BPE")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
           if model.get(key)]  # fmt: skip
    if odd:
        _refuse(f"its BPE has a {odd[0]} ({model[odd[0]]!r})")
    own = _sentencepiece(data) if model.get("byte_fallback") else _byte_level(data)
    tokens, types = _tokens(data, num_vocab, own.pop("types", {}))
    scores = own.pop("scores", {})
    fields = {"model": own.pop("model"), "pre": own.pop("pre"), "tokens": tokens}
    if scores:
        fields["scores"] = [float(scores.get(token, NEVER)) for token in tokens]
    fields |= {"token_type": types, **own, **_specials(tokenizer)}
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        named["tokenizer.chat_template"] = template
    return named, _notes(data)


def _notes(data: Mapping[str, Any]) -> list[str]:
    """Return where llama.cpp splits text in another way, small enough to be told only."""
    notes = []
    if (data.get("normalizer") or {}).get("type") == "NFC":
        notes.append("llama.cpp takes text as it comes, where the tokenizer normalises it to NFC")
    if (data.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        notes.append("llama.cpp adds a space before text that begins with one already")
    return notes


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedModel(
        f"the tokenizer has no equal in llama.cpp: {reason}. GGUF is written for byte-level BPE "
        f"with the rules of {', '.join(PRE_TOKENIZERS.values())}, and for SentencePiece BPE; try "
        "convert_hf_to_gguf.py of llama.cpp on the folder."
    )


def _read(folder: Path) -> Any:
    """Load a tokenizer that has a tokenizer.json of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no usable tokenizer ({first_line(error)}), and a GGUF file holds one. "
            "Copy tokenizer.json and tokenizer_config.json of this model into the folder."
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        _refuse(f"{type(tokenizer).__name__} is not described by a tokenizer.json")
    return tokenizer


def _byte_level(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of byte-level BPE."""
    normalizer = data.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        _refuse(f"it normalises text with {normalizer['type']}")
    splits = _splits(data.get("pre_tokenizer"))
    whole_words = bool(data["model"].get("ignore_merges"))
    pre = PRE_TOKENIZERS.get((splits, whole_words))
    if pre is None:
        kind = "whole words first" if whole_words else "merges only"
        _refuse(f"it splits text by {' then '.join(splits)} ({kind})")
    return {"model": "gpt2", "pre": pre, "merges": _merges(data)}


def _splits(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the rules by which a byte-level tokenizer splits text, in order."""
    if pre is None:
        _refuse("it does not split text into words, and its tokens are not bytes")
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    last = steps[-1] if steps else {"type": "nothing"}
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        _refuse(f"its pre-tokenizer ends in {dict(last)}, not in plain ByteLevel")
    found = []
    for step in steps[:-1]:
        pattern = step.get("pattern", {}).get("Regex")
        cover = (step.get("behavior"), step.get("invert"))
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGITS)
        elif pattern and cover in (("Isolated", False), ("Removed", True)):
            found.append(pattern)
        else:
            _refuse(f"its pre-tokenizer has a step {dict(step)}")
    return (*found, GPT2) if last.get("use_regex", True) else tuple(found)


def _merges(data: Mapping[str, Any]) -> list[str]:
    """Return the merges as texts of two pieces."""
    return [" ".join(_pair(merge)) for merge in data["model"]["merges"]]


def _pair(merge: Any) -> tuple[str, str]:
    """Return the two pieces of a merge, which older files write as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _sentencepiece(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of SentencePiece BPE, which ranks pieces where merges rank pairs.

    llama.cpp joins whatever two neighbours make a known piece, best score first. That is the same
    where all pairs that make a piece are merges, one rank after the other.
    """
    model = data["model"]
    prefix = _space_prefix(data)
    ranks: dict[str, list[int]] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(_pair(merge)), []).append(rank)
    vocab, special = model["vocab"], {token["content"] for token in data["added_tokens"]}
    for piece, found in ranks.items():
        pairs = sum(piece[:i] in vocab and piece[i:] in vocab for i in range(1, len(piece)))
        if len(found) != pairs or found[-1] - found[0] != len(found) - 1:
            _refuse(f"its merges rank pairs for {piece!r} that SentencePiece ranks as one")
    types = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    if missing := types.keys() - vocab.keys():
        _refuse(f"byte {sorted(missing)[0]} is no token of it")
    alone = [t for t in vocab if len(t) > 1 and t not in ranks | types and t not in special]
    for piece in alone:
        if any(piece[:i] in vocab and piece[i:] in vocab for i in range(1, len(piece))):
            _refuse(f"no merge makes {piece!r}, and SentencePiece would make it")
    unknown = model.get("unk_token")
    return {
        "model": "llama",
        "pre": "default",
        "types": types | ({unknown: UNKNOWN} if unknown else {}),
        "scores": {piece: -found[0] for piece, found in ranks.items()} | dict.fromkeys(types, 0.0),
        "add_space_prefix": prefix,
    }


def _space_prefix(data: Mapping[str, Any]) -> bool:
    """Tell whether text is given a leading space; refuse any other normalisation."""
    steps = [data.get("normalizer"), data.get("pre_tokenizer")]
    flat = [part for step in steps if step for part in
            (step.get("normalizers") or step.get("pretokenizers") or [step])]  # fmt: skip
    prefix = escaped = False
    for step in flat:
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == (
            {"String": " "},
            SPACE,
        ):
            escaped = True
        elif step["type"] == "Metaspace" and not step.get("split", True):
            prefix |= step.get("prepend_scheme", "always") != "never"
            escaped = step.get("replacement") == SPACE
        else:
            _refuse(f"it has a step {step}")
    if not escaped:
        _refuse(f"it does not write spaces as {SPACE}")
    return prefix


def _tokens(
    data: Mapping[str, Any], num_vocab: int, own: Mapping[str, int]
) -> tuple[list[str], list[int]]:
    """Return the text and type of every row of the embeddings; rows without a token are unused."""
    tokens = [f"[PAD{index}]" for index in range(num_vocab)]
    types = [UNUSED] * num_vocab
    for token, index in data["model"]["vocab"].items():
        tokens[index], types[index] = token, own.get(token, NORMAL)
    for added in data["added_tokens"]:
        index, text = added["id"], added["content"]
        if types[index] == UNKNOWN:
            continue
        special = added["special"]
        tokens[index] = text if special else text.replace(SPACE, " ")
        types[index] = CONTROL if special else USER_DEFINED
    if len(set(tokens)) < num_vocab:
        twice = Counter(tokens).most_common(1)[0][0]
        _refuse(f"token {twice!r} is there twice")
    return tokens, types


def _specials(tokenizer: Any) -> dict[str, Any]:
    """Return the ids of special tokens, and whether text gets some before and behind it."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        f"{name}_token_id": int(index)
        for ours, name in names.items()
        if (index := getattr(tokenizer, f"{ours}_token_id")) is not None
    }
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    places = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
    if not places:
        _refuse("text is split differently when special tokens are added")
    before, behind = full[: places[0]], full[places[0] + len(plain) :]
    for found, kind in ((before, "bos"), (behind, "eos")):
        if found not in ([], [ids.get(f"{kind}_token_id")]):
            _refuse(f"it adds tokens {found} to a text, and only one {kind} can be added")
    return ids | {"add_bos_token": bool(before), "add_eos_token": bool(behind)}
