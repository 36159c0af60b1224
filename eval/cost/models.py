"""Random Llama checkpoints of a wished size, written block by block, for measurements of cost."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from llmprune.checkpoint.sink import shard_name, write_index

DEMO = Path(__file__).resolve().parents[2] / "llmprune" / "demo" / "model"


def write_llama(
    folder: Path,
    *,
    blocks: int,
    hidden: int = 1536,
    ffn: int = 4096,
    vocab: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a random Llama with the demo model's tokenizer; one shard per block."""
    folder.mkdir(parents=True)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        shard = {
            f"{prefix}{name}.weight": random(shape, generator, dtype)
            for name, shape in shapes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        weight_map |= save(folder, shard_name(index, blocks), shard)
    trunk = {
        "model.embed_tokens.weight": random((vocab, hidden), generator, dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": random((vocab, hidden), generator, dtype),
    }
    weight_map |= save(folder, shard_name(-1, blocks), trunk)
    write_index(folder, weight_map, num_params=0, num_bytes=0)
    return folder


def random(shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Return normal weights of the usual scale."""
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def save(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Write a shard; return its part of the weight map."""
    save_file(tensors, str(folder / name), metadata={"format": "pt"})
    return dict.fromkeys(tensors, name)
