"""A Llama-like model in the words of llama.cpp: its architecture, hyperparameters and tensor names.

Facts: llama.cpp, src/models/{llama,qwen2,qwen3}.cpp and conversion/llama.py. Its graphs take one
width for all blocks, and refuse tensors that they do not know.

Legend: R frequencies of a head's rotation, half of its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

Fields = dict[str, Any]  # int: uint32, float: float32, str, bool, and lists of them

TRUNK = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"
QKV_BIAS = frozenset({"attn_q.bias", "attn_k.bias", "attn_v.bias"})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one graph of llama.cpp computes, beyond what all Llama-like graphs do.

    `extra` are the tensors of a block that it takes beside the seven weights and two norms.
    `permuted`: it rotates neighbouring rows of a head, where transformers rotates its halves.
    `square`: the heads together must be as wide as the model.
    """

    name: str
    extra: frozenset[str]
    permuted: bool = False
    square: bool = False


LLAMA = Architecture(
    name="llama",
    extra=QKV_BIAS | {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"},
    permuted=True,
)
QWEN2 = Architecture(name="qwen2", extra=QKV_BIAS, square=True)
QWEN3 = Architecture(name="qwen3", extra=QKV_BIAS | {"attn_q_norm.weight", "attn_k_norm.weight"})

# The first that can hold a model is taken. Qwen2 computes what Llama with biases does, so that the
# graph of llama takes what that of qwen2 is too narrow for.
ARCHITECTURES: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (LLAMA,),
    "mistral": (LLAMA,),
    "qwen2": (QWEN2, LLAMA),
    "qwen3": (QWEN3,),
}


def check_family(data: Mapping[str, Any], name: str) -> None:
    """Check, from config.json alone, that a model is stock, uniform and of a known family.

    Raises:
        UnsupportedModel: it is not.
    """
    model_type = str(data.get("model_type"))
    unequal = [key for key in ("block_configs", "per_layer_config") if data.get(key)]
    if unequal or model_type.startswith("llmprune_"):
        found = f"has {unequal[0]}" if unequal else f"is of type {model_type}"
        raise UnsupportedModel(
            f"{name} {found}: its blocks are of different widths, and the graphs of llama.cpp for "
            f"{', '.join(ARCHITECTURES)} take one width for all. Prune again so that all blocks "
            "keep equal widths and export that; of unequal folders, those of DeciLM alone may be "
            "read by convert_hf_to_gguf.py of llama.cpp."
        )
    if "AutoModelForCausalLM" in (data.get("auto_map") or {}):
        raise UnsupportedModel(
            f"{name} brings its own Python code (auto_map in config.json), and llama.cpp would not "
            "run it. GGUF is written for stock checkpoints only."
        )
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{name} is of type {model_type!r}. GGUF is written for {', '.join(ARCHITECTURES)}; "
            "for other families use convert_hf_to_gguf.py of llama.cpp on the folder."
        )


def tensor_name(parameter: str) -> str | None:
    """Return llama.cpp's name of a parameter; None where it has none.

    >>> tensor_name("model.layers.3.self_attn.q_proj.bias")
    'blk.3.attn_q.bias'
    """
    module, _, leaf = parameter.rpartition(".")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        module = BLOCK.get(found[2], "")
        return f"blk.{found[1]}.{module}.{leaf}" if module else None
    return f"{TRUNK[module]}.{leaf}" if module in TRUNK else None


def choose_architecture(config: Any, parameters: Iterable[str]) -> tuple[Architecture, str]:
    """Return the architecture that holds a model, and why not the family's own where that is so.

    Raises:
        UnsupportedModel: none does.
    """
    parameters = list(parameters)
    reasons: list[str] = []
    for architecture in ARCHITECTURES[config.model_type]:
        reason = _obstacle(architecture, config, parameters)
        if reason is None:
            note = f"written as {architecture.name}: {reasons[0]}" if reasons else ""
            return architecture, note
        reasons.append(f"{architecture.name} of llama.cpp {reason}")
    raise UnsupportedModel(f"this {config.model_type} model cannot be a GGUF: {reasons[-1]}.")


def _obstacle(architecture: Architecture, config: Any, parameters: list[str]) -> str | None:
    """Return what a graph lacks for a model, if anything."""
    width = config.num_attention_heads * head_dim(config)
    if architecture.square and width != config.hidden_size:
        return (
            f"needs heads as wide as the model ({config.hidden_size}), and these have "
            f"{config.num_attention_heads} x {head_dim(config)} = {width}"
        )
    for parameter in parameters:
        name = tensor_name(parameter)
        if name is None or name == "output.bias":
            return f"has no place for {parameter}"
        optional = name.endswith(".bias") or "_q_norm" in name or "_k_norm" in name
        if optional and name.split(".", 2)[2] not in architecture.extra:
            return f"has no place for {parameter}"
    return None


def head_dim(config: Any) -> int:
    """Return the rows of a head; pruned models say it, as theirs do not fill the width."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def heads_of(name: str, architecture: Architecture, config: Any) -> int:
    """Return the heads within which a tensor's rows change places; 0 where they stay."""
    if not architecture.permuted or not re.match(r"blk\.\d+\.attn_[qk]\.", name):
        return 0
    key = "num_key_value_heads" if ".attn_k." in name else "num_attention_heads"
    return int(getattr(config, key))


def hyperparameters(config: Any, architecture: Architecture) -> tuple[Fields, list[str]]:
    """Return the fields that describe the network, and what a user should know of them.

    Raises:
        UnsupportedModel: an activation or rotation that llama.cpp computes differently.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModel(
            f"hidden_act is {config.hidden_act!r}, and the graph {architecture.name} of llama.cpp "
            "always computes silu. This model cannot be a GGUF of that architecture."
        )
    context, notes = int(config.max_position_embeddings), []
    window = _window(config)
    if window is not None and window < context:
        notes.append(
            f"context length {window} instead of {context}: llama.cpp computes no sliding window "
            f"in {architecture.name}, and within {window} tokens none is needed"
        )
        context = window
    size = head_dim(config)
    fields: Fields = {
        "vocab_size": int(config.vocab_size),
        "context_length": context,
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        **_rotation(config.rope_parameters or {}),
    }
    return {f"{architecture.name}.{key}": value for key, value in fields.items()}, notes


def _window(config: Any) -> int | None:
    """Return the sliding window of a model; None where every block sees all tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _rotation(rope: Mapping[str, Any]) -> Fields:
    """Return the fields of a rotary embedding."""
    fields: Fields = {"rope.freq_base": float(rope.get("rope_theta", 10_000.0))}
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}: llama.cpp rotates whole "
            "heads in this architecture, so the model cannot be a GGUF of it."
        )
    if kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn" and _plain_yarn(rope):
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    elif kind not in ("default", "llama3"):  # llama3 is a tensor of factors
        raise UnsupportedModel(
            f"rope_type {kind!r} with {dict(rope)} is not what llama.cpp computes. GGUF is written "
            "for default, linear, llama3, and yarn without settings of its own."
        )
    return fields


def _plain_yarn(rope: Mapping[str, Any]) -> bool:
    """Tell whether YaRN has only the settings that llama.cpp computes with unasked."""
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    special = any(rope.get(key) not in (None, value) for key, value in usual.items())
    own = any(rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    return not special and not own and bool(rope.get("original_max_position_embeddings"))


def rope_factors(config: Any) -> Tensor | None:
    """Return what llama.cpp divides the rotary frequencies by, for rope_type llama3: factors_R.

    Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1;
    transformers, modeling_rope_utils.py). None for other types.
    """
    import torch

    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return None
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    size = head_dim(config)
    power_R = torch.arange(0, size, 2, dtype=torch.float32) / size
    turns_R = original / (2 * math.pi * rope["rope_theta"] ** power_R)  # in the original context
    smooth_R = ((turns_R - low) / (high - low)).clamp(0, 1)
    factors_R: Tensor = 1 / ((1 - smooth_R) / factor + smooth_R)
    return factors_R
