"""The families that llmprune knows, one literal row each.

A tap lists all linears that read one activation in some variant of the family; a block has those
that it holds. Where variants differ in who shares an input, linears have taps of their own.
"""

from __future__ import annotations

from typing import Any, Literal

from llmprune.arch.types import Attention, Family, Ffn, Tap, Unfuse


def fused(
    linear: str, output: str, layout: Literal["stacked", "grouped"], **keys: Any
) -> Attention:
    """Return an attention whose query, key and value are rows of one linear."""
    return Attention(query=linear, key=linear, value=linear, output=output, layout=layout, **keys)


def alone(*linears: str) -> tuple[Tap, ...]:
    """Return a tap for each linear."""
    return tuple(Tap(name=f"{linear}.in", readers=(linear,)) for linear in linears)


def expert_taps(path: str) -> tuple[Tap, ...]:
    """Return the two taps of every expert of a gated mixture."""
    return (
        Tap(
            name="experts.{expert}.in",
            readers=(f"{path}.{{expert}}.gate_proj", f"{path}.{{expert}}.up_proj"),
        ),
        Tap(name="experts.{expert}.out", readers=(f"{path}.{{expert}}.down_proj",)),
    )


def stacked(
    path: str, *, transposed: bool = False, interleaved: bool = False
) -> tuple[Unfuse, ...]:
    """Return how the experts' parameters of a gated mixture come apart."""
    return (
        Unfuse(
            param=f"{path}.gate_up_proj",
            parts=(f"{path}.{{expert}}.gate_proj", f"{path}.{{expert}}.up_proj"),
            stacked=True,
            transposed=transposed,
            interleaved=interleaved,
        ),
        Unfuse(
            param=f"{path}.down_proj",
            parts=(f"{path}.{{expert}}.down_proj",),
            stacked=True,
            transposed=transposed,
        ),
    )


def gated_taps(path: str, name: str = "ffn") -> tuple[Tap, ...]:
    """Return the taps of a gated FFN."""
    return (
        Tap(name=f"{name}_in", readers=(f"{path}.gate_proj", f"{path}.up_proj")),
        Tap(name=f"{name}_out", readers=(f"{path}.down_proj",)),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    Tap(name="attn_in", readers=QKV),
    Tap(name="attn_out", readers=("self_attn.o_proj",)),
)
GATED = gated_taps("mlp")
GATED_FFN = Ffn(wide=("mlp.gate_proj", "mlp.up_proj"), narrow="mlp.down_proj")
HEADS = Attention(
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
)
QUERY_KEY_VALUE = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)

FAMILIES = (
    Family(
        model_types=(
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "llama",
            "mistral",
            "olmo2",
            "olmo3",
            "qwen2",
            "qwen3",
            "stablelm",
        ),
        blocks="model.layers",
        taps=(*ATTENTION, *GATED),
        ffns=(GATED_FFN,),
        attentions=(HEADS,),
    ),
    Family(
        model_types=("cohere", "cohere2"),
        blocks="model.layers",
        taps=(
            Tap(name="block_in", readers=(*QKV, "mlp.gate_proj", "mlp.up_proj")),
            Tap(name="attn_out", readers=("self_attn.o_proj",)),
            Tap(name="ffn_out", readers=("mlp.down_proj",)),
        ),
        ffns=(GATED_FFN,),
        attentions=(HEADS,),
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        taps=alone("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        ffns=(Ffn(wide=("mlp.gate_up_proj",), narrow="mlp.down_proj", parts=2),),
        attentions=(fused("self_attn.qkv_proj", "self_attn.o_proj", "stacked"),),
    ),
    Family(
        model_types=("starcoder2",),
        blocks="model.layers",
        taps=(*ATTENTION, *alone("mlp.c_fc", "mlp.c_proj")),
        ffns=(Ffn(wide=("mlp.c_fc",), narrow="mlp.c_proj"),),
        attentions=(HEADS,),
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        taps=(Tap(name="attn_in", readers=QKV), *alone("self_attn.out_proj", "fc1", "fc2")),
        ffns=(Ffn(wide=("fc1",), narrow="fc2", config_key="ffn_dim"),),
        attentions=(
            Attention(
                query="self_attn.q_proj",
                key="self_attn.k_proj",
                value="self_attn.v_proj",
                output="self_attn.out_proj",
                groups_key=None,
                dim_key=None,
            ),
        ),
    ),
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        taps=(
            Tap(name="attn_in", readers=("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")),
            *alone("attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ),
        ffns=(Ffn(wide=("mlp.c_fc",), narrow="mlp.c_proj", config_key="n_inner"),),
        attentions=(
            Attention(
                query="attn.c_attn.q",
                key="attn.c_attn.k",
                value="attn.c_attn.v",
                output="attn.c_proj",
                heads_key="n_head",
                groups_key=None,
                dim_key=None,
            ),
        ),
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
        model_types=("gptj",),
        blocks="transformer.h",
        taps=(
            Tap(
                name="block_in",
                readers=("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
            ),
            *alone("attn.out_proj", "mlp.fc_out"),
        ),
        ffns=(Ffn(wide=("mlp.fc_in",), narrow="mlp.fc_out", config_key="n_inner"),),
        attentions=(
            Attention(
                query="attn.q_proj",
                key="attn.k_proj",
                value="attn.v_proj",
                output="attn.out_proj",
                heads_key="n_head",
                groups_key=None,
                dim_key=None,
            ),
        ),
        returns=2,
    ),
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        taps=alone(
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        ),
        ffns=(Ffn(wide=("mlp.dense_h_to_4h",), narrow="mlp.dense_4h_to_h"),),
        attentions=(
            fused(
                *("attention.query_key_value", "attention.dense", "grouped"),
                groups_key=None,
                dim_key=None,
            ),
        ),
    ),
    Family(
        model_types=("falcon",),
        blocks="transformer.h",
        taps=alone(*QUERY_KEY_VALUE),
        ffns=(
            Ffn(
                wide=("mlp.dense_h_to_4h",),
                narrow="mlp.dense_4h_to_h",
                config_key="ffn_hidden_size",
            ),
        ),
        attentions=(
            fused(
                *("self_attention.query_key_value", "self_attention.dense", "grouped"),
                groups_key="num_kv_heads",
                dim_key=None,
            ),
        ),
        returns=2,
    ),
    Family(
        model_types=("bloom",),
        blocks="transformer.h",
        taps=alone(*QUERY_KEY_VALUE),
        ffns=(Ffn(wide=("mlp.dense_h_to_4h",), narrow="mlp.dense_4h_to_h", config_key=""),),
        attentions=(
            fused(
                *("self_attention.query_key_value", "self_attention.dense", "grouped"),
                heads_key="n_head",
                groups_key=None,
                dim_key=None,
            ),
        ),
        returns=2,
    ),
    Family(
        model_types=("mpt",),
        blocks="transformer.blocks",
        taps=alone("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"),
        ffns=(Ffn(wide=("ffn.up_proj",), narrow="ffn.down_proj", config_key=""),),
        attentions=(
            fused(
                *("attn.Wqkv", "attn.out_proj", "stacked"),
                heads_key="n_heads",
                groups_key=None,
                dim_key=None,
            ),
        ),
        returns=2,
    ),
    Family(
        model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
        blocks="model.layers",
        taps=(
            *ATTENTION,
            *GATED,
            *gated_taps("mlp.shared_expert", "shared"),
            *expert_taps("mlp.experts"),
        ),
        ffns=(GATED_FFN,),
        attentions=(HEADS,),
        unfuse=stacked("mlp.experts"),
    ),
    Family(
        model_types=("gpt_oss",),
        blocks="model.layers",
        taps=(*ATTENTION, *expert_taps("mlp.experts")),
        attentions=(HEADS,),
        unfuse=stacked("mlp.experts", transposed=True, interleaved=True),
    ),
    Family(
        model_types=("deepseek_v2", "deepseek_v3"),
        blocks="model.layers",
        taps=(
            Tap(
                name="attn_in",
                readers=(
                    "self_attn.q_proj",
                    "self_attn.q_a_proj",
                    "self_attn.kv_a_proj_with_mqa",
                ),
            ),
            *alone("self_attn.q_b_proj", "self_attn.kv_b_proj"),
            Tap(name="attn_out", readers=("self_attn.o_proj",)),
            *GATED,
            *gated_taps("mlp.shared_experts", "shared"),
            *expert_taps("mlp.experts"),
        ),
        unfuse=stacked("mlp.experts"),
    ),
    Family(
        model_types=("jamba",),
        blocks="model.layers",
        taps=(
            *alone("mamba.in_proj", "mamba.x_proj", "mamba.out_proj"),
            *ATTENTION,
            *gated_taps("feed_forward"),
            *expert_taps("feed_forward.experts"),
        ),
        ffns=(
            Ffn(
                wide=("feed_forward.gate_proj", "feed_forward.up_proj"),
                narrow="feed_forward.down_proj",
            ),
        ),
        attentions=(HEADS,),
        unfuse=stacked("feed_forward.experts"),
    ),
    Family(
        model_types=("mamba",),
        blocks="backbone.layers",
        taps=alone("mixer.in_proj", "mixer.x_proj", "mixer.out_proj"),
    ),
)


def row_of(model_type: str) -> Family | None:
    """Return the row of a model type, if there is one.

    >>> row_of("llama").blocks
    'model.layers'
    """
    return next((row for row in FAMILIES if model_type in row.model_types), None)
