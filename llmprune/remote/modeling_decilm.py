# Copyright 2026 The llmprune authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# This file was copied beside the weights; it needs nothing but transformers and torch.
"""Llama with blocks of different FFN widths, some without attention, as DeciLM describes them.

`block_configs` in config.json is the one description: vLLM's own class reads it as attributes,
converters to GGUF as JSON, and transformers through `per_layer_config`, which is derived from it.
Legend: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaMLP

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError(
        f"transformers {transformers.__version__} knows no blocks that differ. This model needs "
        "5.17 or newer: pip install -U transformers"
    )


class Entry(dict[str, Any]):
    """A part of `block_configs`: a dict in JSON, read as attributes; a missing one is no None."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None


class DeciLMConfig(LlamaConfig):
    """The config of Llama, and for every block its attention and its FFN."""

    model_type = "nemotron-nas"
    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("per_layer_config", None)  # derived, so never read
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        blocks = self.block_configs or []
        if self.block_configs is not None and len(blocks) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs describes {len(blocks)} blocks, num_hidden_layers says "
                f"{self.num_hidden_layers}: config.json was edited, take the original one"
            )
        self.block_configs = [
            Entry({part: Entry(entries) for part, entries in block.items()}) for block in blocks
        ]
        self.per_layer_config = {
            index: {"intermediate_size": block.ffn.intermediate_size}
            | ({"skip": ["attention"]} if block.attention.no_op else {})
            for index, block in enumerate(self.block_configs)
        }
        self.allow_global_per_layer_attribute_access = True  # the widest, to size buffers by


class NoAttention(nn.Module):
    """Stands where attention was, and adds nothing to the residual stream.

    It still tells the cache how many tokens went by, with two zeros for each, for lengths and masks
    are read off the cache of single blocks.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            zeros = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(zeros, zeros, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama, of whose blocks each has the FFN and the attention that its config says."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        differing = config.__dict__.pop("_heterogeneity_spec")  # Llama reads one width for all
        try:
            super().__init__(config)
        finally:
            config._heterogeneity_spec = differing
        for index, block in enumerate(self.model.layers):
            own = config.per_layer_config[index]
            block.mlp = LlamaMLP(own)
            if "attention" in own.skip:
                block.self_attn = NoAttention(index)
                block.input_layernorm = nn.Identity()
            elif getattr(config, "qkv_bias", config.attention_bias) != config.attention_bias:
                set_biases(block.self_attn, config.qkv_bias)
        self.post_init()  # type: ignore[no-untyped-call]

    def _get_static_cache_init_shape(self) -> None:
        """Let every block's static cache take the shape of the first keys it is given."""


def set_biases(attention: Any, present: bool) -> None:
    """Give query, key and value a bias, or none, whatever the output has."""
    for name in ("q_proj", "k_proj", "v_proj"):
        old = getattr(attention, name)
        setattr(attention, name, nn.Linear(old.in_features, old.out_features, bias=present))
