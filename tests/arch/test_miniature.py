"""Miniatures: every kind of block, small, deterministic, and long enough for window effects."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from llmprune.arch.miniature import SEQ_LEN, miniature_config, miniature_model
from llmprune.arch.table import row_of


def test_a_miniature_is_small_and_takes_its_sequence(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    model = miniature_model(config)
    assert type(model.config) is type(config)
    assert len(model.get_submodule(row_of(model_type).blocks)) == 2
    assert sum(value.numel() for value in model.parameters()) < 100_000
    assert not model.training
    with torch.no_grad():
        logits = model(input_ids=torch.zeros(1, SEQ_LEN, dtype=torch.int64)).logits
    assert logits.shape == (1, SEQ_LEN, 64) and logits.dtype == torch.float32


def test_one_block_of_every_kind() -> None:
    config = AutoConfig.for_model("gemma3_text")
    assert len(config.layer_types) > 2 and len(set(config.layer_types)) == 2
    small = miniature_config(config)
    assert sorted(small.layer_types) == sorted(set(config.layer_types))
    assert small.num_hidden_layers == 2
    assert 0 < small.sliding_window < SEQ_LEN


def test_the_config_given_is_not_changed() -> None:
    config = AutoConfig.for_model("llama")
    before = config.to_dict()
    miniature_config(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("num_kv", [32, 8])
def test_attention_without_groups_stays_without(num_kv: int) -> None:
    config = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=num_kv)
    small = miniature_config(config)
    grouped = small.num_key_value_heads < small.num_attention_heads
    assert grouped == (num_kv < 32)


def test_switches_of_the_config_are_kept() -> None:
    config = AutoConfig.for_model("llama", attention_bias=True, tie_word_embeddings=True)
    small = miniature_config(config)
    assert small.attention_bias and small.tie_word_embeddings


def test_the_seed_decides_and_the_global_generator_is_left_alone(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    before = torch.get_rng_state()
    one, two, other = (
        torch.cat([v.detach().flatten() for v in model.parameters()])
        for model in (miniature_model(config, seed=s) for s in (0, 0, 1))
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
