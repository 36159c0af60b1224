"""What a config says of a model's use."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from llmprune.arch.limits import active_share, longest_sequence


@pytest.mark.parametrize(
    ("model_type", "keys", "longest"),
    [
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("gpt2", {"n_positions": 1024}, 1024),
        ("mpt", {"max_seq_len": 2048}, 2048),
        ("mamba", {}, None),  # no limit
        ("xlnet", {}, None),  # says -1
        ("roberta", {"max_position_embeddings": 514, "pad_token_id": 1}, 512),
    ],
)
def test_the_longest_sequence_is_the_config_s(
    model_type: str, keys: dict[str, Any], longest: int | None
) -> None:
    assert longest_sequence(AutoConfig.for_model(model_type, **keys)) == longest


@pytest.mark.parametrize(
    ("model_type", "keys", "share"),
    [
        ("llama", {}, 1.0),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, 0.25),
        ("deepseek_v3", {"n_routed_experts": 256, "num_experts_per_tok": 8}, 1 / 32),
        ("qwen3_moe", {"num_experts": 128, "num_experts_per_tok": 8}, 1 / 16),
    ],
)
def test_a_token_meets_some_of_the_experts(
    model_type: str, keys: dict[str, Any], share: float
) -> None:
    assert active_share(AutoConfig.for_model(model_type, **keys)) == share
