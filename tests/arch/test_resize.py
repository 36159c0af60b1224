"""Configs of fewer blocks say of each block what they said before, or are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune.arch.layout import BlockLayout, Layout
from llmprune.arch.miniature import miniature_config
from llmprune.arch.resize import as_mistral, check_blocks_alike, kind_of, resized
from llmprune.base.errors import WontLoad
from llmprune.checkpoint.skeleton import use_eager_experts
from tests.reference.shrinking import cached_tokens, logits, renamed, skip, strengthen


def layout_of(*kept: int) -> Layout:
    return Layout(blocks=tuple(BlockLayout(source=index) for index in kept))


@pytest.mark.parametrize(
    ("entry", "before", "after"),
    [
        ("layer_types", ["a", "b", "c", "d", "e"], ["a", "d", "e"]),
        ("no_rope_layers", [1, 0, 1, 0, 1], [1, 0, 1]),
        ("attn_layer_indices", [0, 1, 4], [0, 2]),
        ("mlp_only_layers", [1, 2], []),
        ("mlp_only_layers", [], []),
        ("first_k_dense_replace", 2, 1),
        ("first_k_dense_replace", 4, 2),
        ("max_window_layers", 5, 3),
        ("max_window_layers", 28, 3),
        ("rope_theta", 1e4, 1e4),
        ("eos_token_id", [1, 2], [1, 2]),
        ("full_attn_idxs", None, None),
    ],
)
def test_entries_follow_the_blocks_that_stay(entry: str, before: Any, after: Any) -> None:
    config = {"num_hidden_layers": 5, entry: before}
    found = resized(copy.deepcopy(config), layout_of(0, 3, 4), {})
    assert found == {"num_hidden_layers": 3, entry: after}


def test_where_all_blocks_stay_only_sizes_change() -> None:
    config = {"n_layer": 2, "layer_types": ["a", "b"], "max_window_layers": 28, "n_inner": None}
    found = resized(config, layout_of(0, 1), {"n_inner": 96})
    assert found == config | {"n_inner": 96}
    assert config["n_inner"] is None


MIXED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "gemma3_text": ({"layer_types": ["sliding_attention", "full_attention"] * 2}, (1, 2)),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (0, 2, 3)),
    "smollm3": ({"no_rope_layers": [1, 0, 1, 0]}, (0, 1, 3)),
    "cohere2": ({"layer_types": ["sliding_attention", "full_attention"] * 2}, (1, 3)),
    "qwen2_moe": ({"mlp_only_layers": [1], "num_experts": 4}, (1, 2)),
    "deepseek_v3": ({"first_k_dense_replace": 2}, (1, 3)),
    "gpt_oss": ({"layer_types": ["sliding_attention", "full_attention"] * 2}, (0, 3)),
}
DEEP = 4


def built(model_type: str, config: dict[str, Any]) -> Any:
    config_class = type(AutoConfig.for_model(model_type))
    model = AutoModelForCausalLM.from_config(config_class.from_dict(config), dtype=torch.float32)
    use_eager_experts(model)
    return model.eval()


def of_blocks(model_type: str, **options: Any) -> Any:
    """Build a random miniature of four blocks, of the kinds that the options say."""
    small = miniature_config(AutoConfig.for_model(model_type, num_hidden_layers=DEEP)).to_dict()
    lists = {key for key, value in small.items() if isinstance(value, list) and "layer" in key}
    small = {key: value for key, value in small.items() if key not in lists}
    torch.manual_seed(0)
    return strengthen(built(model_type, small | {"num_hidden_layers": DEEP} | options))


@pytest.mark.parametrize("model_type", MIXED)
def test_blocks_of_several_kinds_keep_theirs(tokens: Tensor, model_type: str) -> None:
    options, kept = MIXED[model_type]
    dense = of_blocks(model_type, **options)
    blocks = dense.model.layers
    assert len({str(kind_of(block)) for block in blocks}) == 2
    small = built(model_type, resized(dense.config.to_dict(), layout_of(*kept), {}))
    check_blocks_alike(blocks, small.model.layers, layout_of(*kept), {})
    places = {index: place for place, index in enumerate(kept)}
    small.load_state_dict(renamed(dense.state_dict(), "model.layers.", places))
    for index in set(range(DEEP)) - set(kept):
        skip(blocks[index], 0)
    expected = logits(dense, tokens)
    assert (logits(small, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with_cache, without = (cached_tokens(small, tokens, 8, cached=c) for c in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2, "num_experts": 4}),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 8}),
        ("jamba", {"attn_layer_period": 8, "expert_layer_period": 2, "expert_layer_offset": 1}),
    ],
)
def test_kinds_that_follow_from_a_period_are_refused(
    model_type: str, options: dict[str, Any]
) -> None:
    dense = of_blocks(model_type, **options)
    small = built(model_type, resized(dense.config.to_dict(), layout_of(0, 2, 3), {}))
    with pytest.raises(WontLoad, match=r"block \d would become block \d with .*prune\.form=masked"):
        check_blocks_alike(dense.model.layers, small.model.layers, layout_of(0, 2, 3), {})


def test_a_config_that_counts_its_blocks_nowhere_is_refused() -> None:
    blocks = of_blocks("llama").model.layers
    with pytest.raises(WontLoad, match=r"config of 2 blocks makes 4: no entry .* counts them"):
        check_blocks_alike(blocks, blocks, layout_of(0, 1), {})


def test_sizes_that_change_something_else_are_told_apart() -> None:
    dense, small = of_blocks("gpt2"), of_blocks("gpt2", n_head=2)
    says = "block 0 would have attn.head_dim 16 instead of 8 with the sizes that are left"
    with pytest.raises(WontLoad, match=says):
        check_blocks_alike(dense.transformer.h, small.transformer.h, layout_of(0, 1, 2, 3), {})


def test_a_mistral_is_a_llama_with_any_number_of_heads() -> None:
    dense = of_blocks("llama")
    config = dense.config.to_dict() | {"num_attention_heads": 3, "num_key_value_heads": 3}
    twin = as_mistral(config)
    assert {"attention_bias", "mlp_bias", "pretraining_tp"}.isdisjoint(twin)
    assert built("mistral", twin).model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
    same = built("mistral", as_mistral(dense.config.to_dict()))
    same.load_state_dict(dense.state_dict())
    tokens = torch.arange(3, 43).view(2, 20)
    assert torch.equal(logits(same, tokens), logits(dense, tokens))
