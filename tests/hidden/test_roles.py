"""Who reads and writes the residual stream is seen, and what cannot be cut exactly is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from llmprune.base.errors import UnsupportedModel
from llmprune.hidden.proof import prove_narrowing
from llmprune.hidden.tracing import norm_offset

EXACT = (
    "apertus", "arcee", "deepseek_v3", "gemma", "glm", "gpt_oss", "granite", "llama", "mistral",
    "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
REFUSED = {
    "bloom": "no RMS norm",
    "cohere": "no RMS norm",
    "gemma2": "stands behind a sublayer",
    "gemma3_text": "stands behind a sublayer",
    "gpt2": "no RMS norm",
    "gpt_neox": "no RMS norm",
    "jamba": "follow from the hidden size",
    "olmo2": "without a weighted norm before it",
    "olmoe": "follow from the hidden size",
    "opt": "no RMS norm",
    "stablelm": "no RMS norm",
}


def test_the_roles_of_a_llama() -> None:
    found = prove_narrowing(AutoConfig.for_model("llama", attention_bias=True, mlp_bias=True))
    first, second = "input_layernorm.weight", "post_attention_layernorm.weight"
    assert found.readers == {
        "self_attn.q_proj.weight": (1, first),
        "self_attn.k_proj.weight": (1, first),
        "self_attn.v_proj.weight": (1, first),
        "mlp.gate_proj.weight": (1, second),
        "mlp.up_proj.weight": (1, second),
    }
    assert found.writers == {
        "self_attn.o_proj.weight": 0,
        "self_attn.o_proj.bias": 0,
        "mlp.down_proj.weight": 0,
        "mlp.down_proj.bias": 0,
    }
    assert found.norms == {first: 0.0, second: 0.0}
    assert (found.embedding, found.norm, found.head, found.offset) == (
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", 0.0),
    )


def test_routers_and_stacked_experts_read_and_write_too() -> None:
    mixtral = prove_narrowing(AutoConfig.for_model("mixtral"))
    norm = "post_attention_layernorm.weight"
    assert mixtral.readers["mlp.gate.weight"] == (1, norm)
    assert mixtral.readers["mlp.experts.gate_up_proj"] == (2, norm)
    assert mixtral.writers["mlp.experts.down_proj"] == 1
    oss = prove_narrowing(AutoConfig.for_model("gpt_oss"))  # its experts are transposed
    assert oss.readers["mlp.experts.gate_up_proj"] == (1, norm)
    assert oss.writers["mlp.experts.down_proj"] == 2
    assert oss.writers["mlp.experts.down_proj_bias"] == 1


def test_a_norm_s_offset_is_what_it_multiplies_with_beside_its_weight() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert norm_offset(LlamaRMSNorm(16), 16) == 0.0
    assert norm_offset(GemmaRMSNorm(16), 16) == 1.0
    assert norm_offset(nn.LayerNorm(16, bias=False), 16) is None
    assert norm_offset(nn.LayerNorm(16), 16) is None


@pytest.mark.parametrize("model_type", EXACT)
def test_families_that_can_be_cut_exactly(model_type: str) -> None:
    found = prove_narrowing(AutoConfig.for_model(model_type))
    assert found.readers and found.writers and found.norms
    assert found.offset == (1.0 if model_type == "gemma" else 0.0)


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_cannot_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[model_type]) as error:
        prove_narrowing(AutoConfig.for_model(model_type))
    assert "--pattern ffn-channels" in str(error.value)


def test_a_model_that_uses_its_hidden_size_otherwise_fails_the_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaMLP.forward

    def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = plain(self, x) * self.config.hidden_size / 32
        return result

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", scaled)
    with pytest.raises(UnsupportedModel, match="not what it should be"):
        prove_narrowing(AutoConfig.for_model("llama"))


def test_a_block_with_something_unseen_is_refused(traced: Callable[..., Any]) -> None:
    model, family, blueprint = traced("llama")
    block = model.get_submodule(family.blocks)[0]
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    assert len(blueprint.block(shapes, 32).axes) == 9
    with pytest.raises(UnsupportedModel, match=r"side\.weight"):
        blueprint.block(shapes | {"side.weight": (32, 4)}, 32)
    with pytest.raises(UnsupportedModel, match="the 40 channels"):
        blueprint.block(shapes, 40)
