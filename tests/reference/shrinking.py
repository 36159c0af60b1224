"""What is left of a model whose units are silent, in modules of the old shape; and models to try.

Units are silent when nothing reads them: columns of zeros. A block is gone when it hands on what it
was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.miniature import miniature_model

GROUPED = {"num_hidden_layers": 3, "num_key_value_heads": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, GROUPED)
    for name in (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "stablelm"),
        *("cohere", "cohere2", "phi3", "starcoder2", "mixtral"),
    )
} | {
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "num_key_value_heads": 4}),
    "gemma3_text": ("gemma3_text", {"num_hidden_layers": 6, "num_key_value_heads": 2}),
    "opt": ("opt", {"num_hidden_layers": 3}),
    "gpt2": ("gpt2", {"n_layer": 3}),
    "gptj": ("gptj", {"n_layer": 3}),
    "gpt_neox": ("gpt_neox", {"num_hidden_layers": 3}),
    "falcon multi-query": ("falcon", {"num_hidden_layers": 3}),
    "falcon newer": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "falcon with biases": (
        "falcon",
        {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "bloom": ("bloom", {"n_layer": 3}),
    "mpt": ("mpt", {"n_layers": 3}),
}


def random_model(name: str, **options: Any) -> Any:
    """Build a miniature of a family whose blocks have an effect and whose biases are not zero."""
    model_type, sizes = FAMILIES.get(name, (name, {}))
    return strengthen(miniature_model(AutoConfig.for_model(model_type, **sizes, **options)))


def strengthen(model: Any) -> Any:
    """Give a random model weights and biases that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif value.dim() > 1:
                value.mul_(5)
    return model.eval()


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Load a folder the stock way; nothing may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, experts_implementation="eager", **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def silence(block: Any, anatomy: Anatomy, kind: str, gone: Sequence[int]) -> None:
    """Let nothing read the units of one kind."""
    coupling = anatomy.coupling(kind)
    assert coupling is not None and gone
    for span in (span for span in coupling.spans if span.axis == "in"):
        linear = anatomy.linears[span.linear]
        weight_OI = linear.view(block.get_parameter(linear.param).data)
        for unit in gone:
            first = span.offset + unit * span.width
            weight_OI[:, first : first + span.width] = 0


def skip(block: Any, returns: int) -> None:
    """Let a block hand on what it was given."""

    def forward(hidden_BTD: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_BTD, *[None] * (returns - 1)) if returns else hidden_BTD

    block.forward = forward


def logits(model: Any, tokens_NT: Tensor) -> Tensor:
    """Return logits_NTV computed without a cache."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return found


def cached_tokens(model: Any, tokens_NT: Tensor, num_new: int, *, cached: bool) -> Tensor:
    """Return what a model goes on with, greedily."""
    return model.generate(
        tokens_NT, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False,
        use_cache=cached, pad_token_id=0, eos_token_id=None,
    )[:, tokens_NT.shape[1] :]  # fmt: skip


def renamed(state: Mapping[str, Tensor], inside: str, places: Mapping[int, int]) -> dict:
    """Return a state dict with the blocks that stay under their new numbers."""
    found = {}
    for name, value in state.items():
        head, _, rest = name.removeprefix(inside).partition(".")
        if not name.startswith(inside):
            found[name] = value
        elif int(head) in places:
            found[f"{inside}{places[int(head)]}.{rest}"] = value
    return found
