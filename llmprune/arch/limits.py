"""What a config says of a model in use: its longest sequence, the experts that a token meets."""

from __future__ import annotations

from typing import Any

from llmprune.base.errors import RecipeError

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk",
          "top_k_experts")  # fmt: skip


def active_share(config: Any) -> float:
    """Return the share of a model's routed experts that one token goes through; 1 without any."""
    text = config.get_text_config(decoder=True)
    active = next((n for key in ACTIVE if (n := getattr(text, key, None))), None)
    experts = next((n for key in EXPERTS if (n := getattr(text, key, None))), None)
    return min(1.0, active / experts) if active and experts else 1.0


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


def window_length(asked: int | None, config: Any, *, usual: int, key: str) -> int:
    """Return the tokens of a window: as asked, or `usual`, and no more than the model takes.

    `key` is that of the recipe which asked.

    Raises:
        RecipeError: longer than the model's maximum.
    """
    most = longest_sequence(config)
    if asked is None:
        return min(usual, most or usual)
    if most and asked > most:
        raise RecipeError(
            f"{key}: {asked} is longer than the {most} tokens that this model takes. Type "
            f"--seq-len {most} or less."
        )
    return asked
