"""The families that llmprune knows, one literal row each."""

from __future__ import annotations

from llmprune.arch.types import Coupling, Family, Span, Tap, Unfuse

ATTENTION_TAPS = (
    Tap(name="attn_in", readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Tap(name="attn_out", readers=("self_attn.o_proj",)),
)
GATED_FFN_TAPS = (
    Tap(name="ffn_in", readers=("mlp.gate_proj", "mlp.up_proj")),
    Tap(name="ffn_out", readers=("mlp.down_proj",)),
)
GATED_FFN = Coupling(
    name="ffn",
    spans=(
        Span(linear="mlp.gate_proj", axis="out"),
        Span(linear="mlp.up_proj", axis="out"),
        Span(linear="mlp.down_proj", axis="in"),
    ),
    config_key="intermediate_size",
    module_sizes=(
        ("mlp", "intermediate_size"),
        ("mlp.gate_proj", "out_features"),
        ("mlp.up_proj", "out_features"),
        ("mlp.down_proj", "in_features"),
    ),
)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

FAMILIES = (
    Family(
        model_types=("llama",),
        blocks="model.layers",
        taps=ATTENTION_TAPS + GATED_FFN_TAPS,
        couplings=(GATED_FFN,),
        shape_keys=SMALL,
    ),
    Family(
        model_types=("qwen3",),
        blocks="model.layers",
        taps=ATTENTION_TAPS + GATED_FFN_TAPS,
        couplings=(GATED_FFN,),
        shape_keys=SMALL,
        kind_keys=("layer_types",),
    ),
    Family(
        model_types=("gemma3_text",),
        blocks="model.layers",
        taps=ATTENTION_TAPS + GATED_FFN_TAPS,
        couplings=(GATED_FFN,),
        shape_keys=SMALL | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        kind_keys=("layer_types",),
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        taps=(
            Tap(name="attn_in", readers=("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")),
            Tap(name="attn_out", readers=("attn.c_proj",)),
            Tap(name="ffn_in", readers=("mlp.c_fc",)),
            Tap(name="ffn_out", readers=("mlp.c_proj",)),
        ),
        shape_keys={
            "vocab_size": 64,
            "n_embd": 32,
            "n_inner": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
        },
        unfuse=(
            Unfuse(
                param="attn.c_attn.weight",
                parts=("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v"),
                transposed=True,
            ),
            Unfuse(param="attn.c_proj.weight", parts=("attn.c_proj",), transposed=True),
            Unfuse(param="mlp.c_fc.weight", parts=("mlp.c_fc",), transposed=True),
            Unfuse(param="mlp.c_proj.weight", parts=("mlp.c_proj",), transposed=True),
        ),
    ),
    Family(
        model_types=("mixtral",),
        blocks="model.layers",
        taps=(
            *ATTENTION_TAPS,
            Tap(
                name="experts.{expert}.in",
                readers=("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
            ),
            Tap(name="experts.{expert}.out", readers=("mlp.experts.{expert}.down_proj",)),
        ),
        shape_keys=SMALL
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        unfuse=(
            Unfuse(
                param="mlp.experts.gate_up_proj",
                parts=("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
                stacked=True,
            ),
            Unfuse(
                param="mlp.experts.down_proj",
                parts=("mlp.experts.{expert}.down_proj",),
                stacked=True,
            ),
        ),
    ),
)
