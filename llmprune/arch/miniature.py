"""Miniature random models of a family: the same code paths at a size that costs nothing."""

from __future__ import annotations

from typing import Any

from llmprune.arch.types import Family

SEQ_LEN = 24


def miniature_config(config: Any, family: Family) -> Any:
    """Return a copy of a config shrunk to the family's miniature.

    It has one block of every kind and two at least. The sliding window of a family that
    has one is far shorter than `SEQ_LEN`, so window effects show.
    """
    data = config.to_dict()
    small: dict[str, Any] = {k: value for k, value in family.shape_keys.items() if k in data}
    if data.get("num_key_value_heads") == data.get("num_attention_heads"):
        small["num_key_value_heads"] = small.get("num_attention_heads")
    for key in family.kind_keys:
        if kinds := data.get(key):
            distinct = list(dict.fromkeys(kinds))
            small[key] = distinct if len(distinct) > 1 else distinct * 2
            small["num_hidden_layers"] = len(small[key])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in data:
            small[key] = None
    small = {key: value for key, value in small.items() if key in data}
    for key in ("architectures", "auto_map", "transformers_version", "dtype", "model_type"):
        data.pop(key, None)
    return type(config)(**(data | small))


def miniature_model(config: Any, family: Family, *, seed: int = 0) -> Any:
    """Return a random float32 model of `miniature_config`, in evaluation mode, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # about rope scaling, which a small context cannot fit
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            small = miniature_config(config, family)
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)
    return model.eval()
