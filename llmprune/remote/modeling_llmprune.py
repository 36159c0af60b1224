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
"""Any causal language model of transformers, with blocks that differ in width, lack a half, or
have two linears in place of one.

`per_layer_config` in config.json says, by block, which entries differ (`{"intermediate_size": 64}`)
and which halves are gone (`{"skip": ["attention", "mlp"]}`), and `ranks`, a list with an entry per
block, the values between two linears (`{"mlp.up_proj": 96}`). The classes of a family are made when
they are asked for: `LlmpruneLlamaConfig` and `LlmpruneLlamaForCausalLM` from those of Llama.
Legend: B batch, T tokens, D width, I inputs, O outputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

PREFIX = "Llmprune"
HALVES: Mapping[str, tuple[tuple[str, ...], ...]] = {  # the modules of a half, family by family
    "attention": (("self_attn",), ("attn",), ("attention",), ("self_attention",)),
    "mlp": (("mlp",), ("feed_forward",), ("ffn",), ("block_sparse_moe",), ("fc1", "fc2")),
}
PAIRS = ("GptOssMLP",)  # feed-forward modules that return a pair

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError(
        f"transformers {transformers.__version__} knows no blocks that differ. This model needs "
        "5.17 or newer: pip install -U transformers"
    )


class BlockConfig:
    """The config as one block sees it: what is the block's own first, then what all share.

    Entries that are set later, such as the implementation of attention, are seen as well.
    """

    def __init__(self, config: Any, own: Mapping[str, Any]) -> None:
        plain = {config.attribute_map.get(key, key): value for key, value in own.items()}
        self.__dict__.update(plain, _shared=config)

    def __getattr__(self, key: str) -> Any:
        if key == "_shared" or key.startswith("__"):
            raise AttributeError(key)
        plain = self._shared.attribute_map.get(key, key)
        return self.__dict__[plain] if plain in self.__dict__ else getattr(self._shared, key)


class Nothing(nn.Module):
    """Stands where a half of a block was, and adds nothing to the residual stream.

    Attention that is gone still tells the cache how many tokens went by, with two zeros for each,
    for lengths and masks are read off the cache of single blocks.
    """

    def __init__(self, gone: nn.Module, *, attention: bool) -> None:
        super().__init__()
        self.layer_idx: Any = getattr(gone, "layer_idx", None) if attention else None
        self.adds_residual = "residual" in inspect.signature(gone.forward).parameters
        self.pair = attention or type(gone).__name__ in PAIRS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if self.layer_idx is not None:
            self._count(hidden_BTD, (*args, *kwargs.values()))
        out_BTD = torch.zeros_like(hidden_BTD)
        if self.adds_residual:
            out_BTD = args[1] if len(args) > 1 else kwargs["residual"]
        return (out_BTD, None) if self.pair else out_BTD

    def _count(self, hidden_BTD: Tensor, given: tuple[Any, ...]) -> None:
        """Let the cache, if one is among what was given, count the tokens."""
        for cache in given:
            if isinstance(cache, Cache):
                zeros = hidden_BTD.new_zeros(hidden_BTD.shape[0], 1, hidden_BTD.shape[1], 1)
                cache.update(zeros, zeros, self.layer_idx)


class DifferingConfig:
    """What is added to the config of a family."""

    def validate(self) -> None:
        """Accept what the checks of the family refuse: they know one width for all blocks."""


class DifferingModel:
    """What is added to the causal language model of a family."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        differing = config.__dict__.pop("_heterogeneity_spec", None)  # none is to read one for all
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            if differing is not None:
                config._heterogeneity_spec = differing
        if differing is not None:
            rebuild(self, config)
        if getattr(config, "ranks", None):
            factor(self, config.ranks)

    def _get_static_cache_init_shape(self) -> None:
        """Let every block's static cache take the shape of the first keys it is given."""


def rebuild(model: Any, config: Any) -> None:
    """Build every block again, as wide as its own config says, without the halves it skips."""
    blocks = blocks_of(model)
    for index, stock in enumerate(blocks):
        seen = config.per_layer_config[index]
        own = {key: getattr(seen, key) for key in config.per_layer_attributes}
        block = type(stock)(BlockConfig(config, own), index)
        for half in seen.skip:
            take_out(block, half)
        blocks[index] = block
    model.post_init()


class LowRank(nn.Module):
    """Two linears in place of one, with `rank` values between them; a bias is added once."""

    def __init__(self, whole: Any, rank: int) -> None:
        super().__init__()
        sides = whole.weight.shape if isinstance(whole, nn.Linear) else whole.weight.shape[::-1]
        self.out_features, self.in_features = int(sides[0]), int(sides[1])
        self.right = nn.Linear(self.in_features, rank, bias=False)
        self.left = nn.Linear(rank, self.out_features, bias=False)
        self.bias: Tensor | None = whole.bias

    def forward(self, hidden_BTI: Tensor) -> Tensor:
        out_BTO: Tensor = self.left(self.right(hidden_BTI))
        return out_BTO if self.bias is None else out_BTO + self.bias


def factor(model: Any, ranks: Any) -> None:
    """Put two linears in place of those that `ranks` names, block by block."""
    for block, own in zip(blocks_of(model), ranks, strict=True):
        for name, rank in own.items():
            whole = block.get_submodule(name)
            if not isinstance(whole, (nn.Linear, Conv1D)):
                raise ValueError(
                    f"{name} is a {type(whole).__name__}, which no two linears replace"
                )
            block.set_submodule(name, LowRank(whole, rank))
    model.post_init()


def blocks_of(model: Any) -> Any:
    """Return the list of a model's blocks."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {model.config.num_hidden_layers} blocks"
    )


def modules_of(block: Any, half: str) -> tuple[str, ...]:
    """Return the names of the modules that are a half of a block; none where it lacks it."""
    held = {name for name, _ in block.named_children()}
    return next((names for names in HALVES.get(half, ()) if held.issuperset(names)), ())


def take_out(block: Any, half: str) -> None:
    """Put nothing in place of a half of a block."""
    names = modules_of(block, half)
    if not names:
        raise ValueError(f"{type(block).__name__} has no {half} that could be skipped")
    for name in names:
        gone = getattr(block, name)
        setattr(block, name, Nothing(gone, attention=half == "attention"))


def __getattr__(name: str) -> Any:
    """Make the class of that name from the one of transformers, once."""
    stock: Any = getattr(transformers, name.removeprefix(PREFIX), None)
    if not name.startswith(PREFIX) or not hasattr(stock, "from_pretrained"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own: dict[str, Any] = {"__module__": __name__}
    if stock_config := getattr(stock, "config_class", None):
        own["config_class"] = __getattr__(PREFIX + stock_config.__name__)
        share_conversions(stock.__name__, name)
        return globals().setdefault(name, type(name, (DifferingModel, stock), own))
    own["model_type"] = f"llmprune_{stock.model_type}"
    share_conversions(stock.model_type, own["model_type"])
    return globals().setdefault(name, type(name, (DifferingConfig, stock), own))


def share_conversions(stock: str, own: str) -> None:
    """Let tensors be renamed and stacked on loading as those of the family are."""
    from transformers import conversion_mapping as conversions

    found = conversions.get_checkpoint_conversion_mapping(stock)
    if found is not None:
        conversions.register_checkpoint_conversion_mapping(own, found, overwrite=True)
