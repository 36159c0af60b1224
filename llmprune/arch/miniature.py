"""Miniature random models of a family: the same code paths at a size that costs nothing.

A config is shrunk by the names of its keys, which the families share to a large part. What a
miniature leaves out (depth, width, vocabulary) decides no shape of argument and no tap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.arch.limits import ACTIVE
from llmprune.base.errors import UnsupportedModel, first_line

SEQ_LEN = 24

SMALL: Mapping[str, int] = {
    key: value
    for value, keys in {
        # widths: 4 heads of 8, in 2 groups
        32: "hidden_size n_embd d_model dim n_embed model_dim lru_width",
        64: "vocab_size vocab_size_per_layer_input intermediate_size intermediate_size_mlp n_inner "
        "ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff d_ff inner_dim dim_ff d_inner "
        "mamba_d_ssm "
        "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length",
        40: "shared_expert_intermediate_size shared_intermediate_size",
        24: "moe_intermediate_size expert_intermediate_size expert_ffn_hidden_size",
        8: "head_dim kv_channels d_kv d_head attention_head_dim dim_head attention_head_size "
        "hidden_size_per_layer_input qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank "
        "query_pre_attn_scalar index_topk "
        "linear_key_head_dim linear_value_head_dim linear_head_dim "
        # state spaces: 8 heads of 8
        "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_n_heads "
        "mamba_num_heads mamba_chunk_size chunk_size "
        # windows, far below SEQ_LEN
        "sliding_window attention_window window_size attention_chunk_size",
        16: "q_lora_rank qk_head_dim index_head_dim",
        4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads rotary_dim "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "linear_num_value_heads linear_num_heads mamba_d_conv mamba_dt_rank time_step_rank "
        "num_experts num_local_experts n_routed_experts moe_num_experts",
        2: "num_key_value_heads num_kv_heads linear_num_key_heads index_n_heads mamba_expand "
        "attn_layer_period expert_layer_period zero_expert_num",
        1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group "
        "n_groups num_expert_group mamba_n_groups first_k_dense_replace attn_layer_offset "
        "expert_layer_offset encoder_layers num_encoder_layers",
    }.items()
    for key in keys.split()
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
          "num_decoder_layers")  # fmt: skip
EMBEDDINGS = ("embedding_size", "embedding_dim", "emb_dim", "word_embed_proj_dim",
              "input_embedding_size", "output_embedding_size")  # fmt: skip
NEEDED = ("head_dim",)  # without which some models fail
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FOREIGN = ("architectures", "transformers_version", "dtype", "model_type")


def miniature_config(config: Any) -> Any:
    """Return a copy of a config shrunk to a miniature.

    It has one block of every kind and two at least. A sliding window is far shorter than `SEQ_LEN`,
    so window effects show.
    """
    data = {key: value for key, value in config.to_dict().items() if key not in FOREIGN}
    return type(config)(**_shrunk(data))


def miniature_model(config: Any, *, seed: int = 0, trust_remote_code: bool = False) -> Any:
    """Return a random float32 model of `miniature_config`, in evaluation mode, on the CPU.

    Raises:
        UnsupportedModel: transformers cannot build it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # about rope scaling, which a small context cannot fit
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                miniature_config(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # configs are validated in many ways, by many kinds of error
        first = first_line(error)
        raise UnsupportedModel(
            f"no miniature of {config.model_type!r} could be built, on which it is checked before "
            f"anything is pruned ({first}). A key that its small size breaks belongs into "
            "llmprune/arch/miniature.py."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return model.eval()


def _shrunk(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a config, or of a part of one, with small sizes."""
    small: dict[str, Any] = {k: SMALL[k] for k in data.keys() & SMALL.keys() if data[k]}
    small |= {key: SMALL[key] for key in NEEDED if key in data}
    for groups, heads in (
        ("num_key_value_heads", "num_attention_heads"),
        ("num_kv_heads", "num_attention_heads"),
        ("linear_num_key_heads", "linear_num_value_heads"),
    ):
        if groups in data and data[groups] in (None, 1, data.get(heads)):
            small[groups] = 1 if data[groups] == 1 else small[heads]
    small |= {key: min(2, data[key] or 2) for key in ACTIVE if key in data}
    if {"expand", "num_heads"} <= data.keys():  # of a state space: heads of 8 fill its width
        small["num_heads"] = int(data["expand"]) * 4
    hidden = data.get("hidden_size", data.get("d_model"))
    small |= {key: 32 if data[key] == hidden else 16 for key in EMBEDDINGS if data.get(key)}
    for key, value in data.items():
        if key in TOKENS and value is not None:
            small[key] = TOKENS[key]
        elif key.endswith("_config") and isinstance(value, Mapping):
            small[key] = _shrunk({k: v for k, v in value.items() if k not in FOREIGN[:-1]})
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            small[key] = _rope(value)
        elif key == "partial_rotary_factor" and value:
            small[key] = _quarters(value)
    return {**data, **small, **_kinds(data)}


def _rope(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings, one set or one per kind of attention, that fit 8 values per head."""
    if "short_factor" in data or "long_factor" in data:  # one factor per frequency: too many
        data = {"rope_type": "default", "rope_theta": data.get("rope_theta", 10_000.0)}
    small: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            small[key] = _rope(value)
        elif key == "partial_rotary_factor" and value:
            small[key] = _quarters(value)
        elif key == "mrope_section":
            small[key] = [2, 1, 1]
    return {**data, **small}


def _quarters(share: float) -> float:
    """Return a share of 8 values that is an even number of them."""
    return max(0.25, round(4 * share) / 4)


def _kinds(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the depth, and lists with an entry per block cut to one block of every kind."""
    depths = {key: data[key] for key in DEPTHS if isinstance(data.get(key), int) and data[key]}
    if not depths:
        return {}
    depth = next(iter(depths.values()))
    lists = {key: v for key, v in data.items() if isinstance(v, list) and len(v) == depth}
    own = {int(index): part for index, part in (data.get("per_layer_config") or {}).items()}
    first: dict[str, int] = {}
    for index in range(depth):
        kind = [value[index] for value in lists.values()], own.get(index)
        first.setdefault(str(kind), index)
    kept = sorted(first.values()) if lists or own else [0] * _period(data, depth)
    small: dict[str, Any] = {}
    if shared := data.get("num_kv_shared_layers"):  # the last blocks read what the first computed
        kept = kept * 2
        small["num_kv_shared_layers"] = min(shared, len(kept) // 2)
    kept = kept * 2 if len(kept) == 1 else kept
    for key, value in lists.items():
        small[key] = [SMALL[key] if key in SMALL else value[index] for index in kept]
    for key, value in data.items():
        if _are_indices(key, value, depth):
            small[key] = [len(kept) - 1]
    if own:
        parts = {new: own[old] for new, old in enumerate(kept) if old in own}
        small["per_layer_config"] = {new: _shrunk(part) for new, part in parts.items()}
    return dict.fromkeys(depths, len(kept)) | small


def _period(data: Mapping[str, Any], depth: int) -> int:
    """Return the blocks after which kinds repeat, where a shorter list names those of a period."""
    periods = [value for key, value in data.items() if key.endswith("block_types")]
    return max(
        (len(v) for v in periods if isinstance(v, list | tuple) and 0 < len(v) < depth), default=1
    )


def _are_indices(key: str, value: Any, depth: int) -> bool:
    """Tell whether a list names some of the blocks."""
    return (
        key.endswith(("_indices", "_ids", "_idxs", "_layers"))
        and isinstance(value, list)
        and 0 < len(value) < depth
        and all(isinstance(index, int) and 0 <= index < depth for index in value)
    )
