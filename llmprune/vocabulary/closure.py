"""Which two tokens each token of a BPE is merged from: it can be made only while both are there.

Why the last merge is enough: no pair across the edges of a token that ends up in the encoding is
ever merged, so inside its edges the merges run as they do on the token alone. A set that holds,
with every token, the two that it is last merged from therefore encodes every text, whose tokens it
all holds, as the whole vocabulary does.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from llmprune.vocabulary.contents import joined, merges_of, model_tokens

Pair = tuple[str, str]


def merge_parents(tokenizer_json: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Return the ids that each merged token is made from; base symbols have no entry.

    Vocabularies from SentencePiece and tiktoken list every way to split a token as a merge. Which
    one is used is found by encoding the token. Tokens that no merge reaches have no entry.

    >>> merge_parents({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2},
    ...                          "merges": [["a", "b"]]}})
    {2: (0, 1)}
    """
    ids = model_tokens(tokenizer_json)
    model = tokenizer_json["model"]
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    merges = merges_of(tokenizer_json)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    ways: dict[str, list[Pair]] = {}
    for pair in merges:
        ways.setdefault(joined(*pair, prefix), []).append(pair)
    parents = {}
    for token, pairs in ways.items():
        last = (
            pairs[0]
            if len(pairs) == 1
            else last_merge(symbols(token, prefix, suffix), ranks, prefix)
        )
        if last is not None:
            parents[ids[token]] = (ids[last[0]], ids[last[1]])
    return parents


def symbols(token: str, prefix: str | None = None, suffix: str | None = None) -> list[str]:
    """Return the characters that a token begins as, marked as those inside of a word are.

    >>> symbols("##low</w>", "##", "</w>")
    ['##l', '##o', '##w</w>']
    """
    inside = bool(prefix) and token.startswith(str(prefix))
    last = bool(suffix) and token.endswith(str(suffix)) and token != suffix
    body = token.removeprefix(str(prefix)) if inside else token
    body = body.removesuffix(str(suffix)) if last else body
    found = [
        (str(prefix) if prefix and (place or inside) else "") + letter
        for place, letter in enumerate(body)
    ]
    if last and found:
        found[-1] += str(suffix)
    return found


def last_merge(
    parts: list[str], ranks: Mapping[Pair, int], prefix: str | None = None
) -> Pair | None:
    """Merge parts by rank, the leftmost of equals first; return the last merge if one part remains.

    >>> last_merge(["a", "b", "c"], {("a", "b"): 1, ("b", "c"): 0, ("a", "bc"): 2})
    ('a', 'bc')
    """
    pair = None
    while len(parts) > 1:
        found = [
            (rank, place)
            for place, both in enumerate(pairwise(parts))
            if (rank := ranks.get(both)) is not None
        ]
        if not found:
            return None
        place = min(found)[1]
        pair = parts[place], parts[place + 1]
        parts = [*parts[:place], joined(*pair, prefix), *parts[place + 2 :]]
    return pair
