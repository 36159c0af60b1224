"""Configs as they are published: each is understood whole, and shrinks to a miniature that walks.

Numbers are those of the models' config.json; nothing of full size is computed.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from llmprune.arch.anatomy import left_out
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.calibration.replay import check_replay
from llmprune.checkpoint.skeleton import Skeleton, build_skeleton, use_eager_experts

LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (model type, config, weights of the linears in its blocks)
    "Llama-3.1-8B": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3,
         "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
        6_979_321_856,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
         "max_position_embeddings": 32768, "sliding_window": 32768, "max_window_layers": 24,
         "use_sliding_window": False, "tie_word_embeddings": True},
        24 * (2 * 896 * 896 + 2 * 128 * 896 + 3 * 896 * 4864),
    ),
    "Gemma-2-9b": (
        "gemma2",
        {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
         "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        42 * (2 * 4096 * 3584 + 2 * 2048 * 3584 + 3 * 3584 * 14336),
    ),
    "Phi-3-mini-128k": (
        "phi3",
        {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
         "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48,
                          "long_factor": [1.5] * 48},
         "sliding_window": 262144, "pad_token_id": 32000, "eos_token_id": 32000},
        32 * (3 * 3072 * 3072 + 3072 * 3072 + 3 * 3072 * 8192),
    ),
    "phi-2": (
        "phi",
        {"vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240,
         "num_hidden_layers": 32, "num_attention_heads": 32, "partial_rotary_factor": 0.4},
        32 * (4 * 2560 * 2560 + 2 * 2560 * 10240),
    ),
    "opt-350m": (
        "opt",
        {"vocab_size": 50272, "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        24 * (4 * 1024 * 1024 + 2 * 1024 * 4096),
    ),
    "pythia-160m": (
        "gpt_neox",
        {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072,
         "num_hidden_layers": 12, "num_attention_heads": 12, "rotary_pct": 0.25,
         "max_position_embeddings": 2048},
        12 * (4 * 768 * 768 + 2 * 768 * 3072),
    ),
    "falcon-7b": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32,
         "num_attention_heads": 71, "multi_query": True, "parallel_attn": True,
         "new_decoder_architecture": False, "bias": False},
        32 * (4672 * 4544 + 4544 * 4544 + 8 * 4544 * 4544),
    ),
    "falcon-40b": (
        "falcon",
        {"vocab_size": 65024, "hidden_size": 8192, "num_hidden_layers": 60,
         "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
         "bias": False},
        60 * (9216 * 8192 + 8192 * 8192 + 8 * 8192 * 8192),
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
        32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 8 * 3 * 4096 * 14336),
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
         "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
        48 * (2 * 4096 * 2048 + 2 * 512 * 2048 + 128 * 3 * 2048 * 768),
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
         "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
         "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
         "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None,
         "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
         "v_head_dim": 128, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
        27 * (3072 * 2048 + 576 * 2048 + 4096 * 512 + 2048 * 2048)
        + 3 * 2048 * 10944
        + 26 * (66 * 3 * 2048 * 1408),
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
         "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
         "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
         "sliding_window": 128},
        24 * (2 * 4096 * 2880 + 2 * 512 * 2880 + 32 * 3 * 2880 * 2880),
    ),
    "recurrentgemma-2b": (
        "recurrent_gemma",
        {"vocab_size": 256000, "hidden_size": 2560, "intermediate_size": 15360, "lru_width": 2560,
         "num_hidden_layers": 26, "num_attention_heads": 10, "num_key_value_heads": 1,
         "block_types": ["recurrent", "recurrent", "attention"]},
        18 * (3 * 2560 * 2560 + 2 * 10 * 256 * 256) + 8 * (2 * 2560 * 2560 + 2 * 256 * 2560)
        + 26 * (3 * 2560 * 7680),
    ),
    "bamba-9b": (
        "bamba",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64},
        3 * (2 * 4096 * 4096 + 2 * 1024 * 4096) + 32 * (3 * 4096 * 14336)
        + 29 * ((2 * 8192 + 2 * 256 + 128) * 4096 + 8192 * 4096),
    ),
}  # fmt: skip


def skeleton(name: str) -> Skeleton:
    import torch

    model_type, data, _ = CONFIGS[name]
    return build_skeleton(AutoConfig.for_model(model_type, **data), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_of_its_blocks_is_eligible_or_a_router(name: str) -> None:
    from llmprune.arch.anatomy import anatomy_of

    found = skeleton(name)
    eligible = 0
    for index, block in enumerate(found.blocks):
        anatomy = anatomy_of(found.family, found.shapes(index))
        rest = left_out(anatomy, found.shapes(index))
        plain = {f"{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        assert {param for param in plain & rest.keys() if rest[param] != "router"} == set()
        eligible += sum(row.shape[0] * row.shape[1] for row in anatomy.linears.values())
    assert eligible == CONFIGS[name][2]


@pytest.mark.parametrize("name", CONFIGS)
def test_its_miniature_is_walked_like_the_model(name: str) -> None:
    model_type, data, _ = CONFIGS[name]
    config = AutoConfig.for_model(model_type, **data)
    model = miniature_model(config)
    use_eager_experts(model)
    family = skeleton(name).family
    kinds = {frozenset(n for n, _ in b.named_parameters()) for b in skeleton(name).blocks}
    blocks = model.get_submodule(family.blocks)
    assert {frozenset(n for n, _ in b.named_parameters()) for b in blocks} == kinds
    assert sum(value.numel() for value in model.parameters()) < 300_000
    check_replay(model, blocks, SEQ_LEN, returns=family.returns)
