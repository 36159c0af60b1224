"""The longest sequence that a model takes, from its config."""

from __future__ import annotations

from typing import Any

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def longest_sequence(config: Any) -> int | None:
    """Return the most tokens that a model takes at once; None where its config sets no limit.

    Encoders turned decoders (they have token types) may count positions from behind the padding
    token, which takes some away.
    """
    text = config.get_text_config(decoder=True)
    found = next((size for key in KEYS if (size := getattr(text, key, None))), None)
    if found is None or found < 1:
        return None
    if getattr(text, "type_vocab_size", None):
        found -= (getattr(text, "pad_token_id", None) or 0) + 1
    return int(found)
