"""A narrower residual stream of a Llama as papers write it: fold, turn, cut, rescale, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Params = dict[str, Tensor]
AFTER = {"q_proj": "input", "k_proj": "input", "v_proj": "input",
         "gate_proj": "post_attention", "up_proj": "post_attention"}  # fmt: skip
INTO = ("o_proj", "down_proj")
NORM = "layernorm.weight"


def kind(name: str) -> str:
    """Return the last part of a parameter's name but for `weight` or `bias`."""
    return name.split(".")[-2]


def fold_norms(params: Mapping[str, Tensor]) -> Params:
    """Multiply what follows a norm by its weight, column by column, and make the weight one."""
    found = {name: value.clone() for name, value in params.items()}
    for name, value in params.items():
        if kind(name) in AFTER and name.endswith("weight"):
            block = name.split(".self_attn.")[0].split(".mlp.")[0]
            found[name] = value * params[f"{block}.{AFTER[kind(name)]}_{NORM}"]
        elif name.endswith(NORM) or name == "model.norm.weight":
            found[name] = torch.ones_like(value)
    found["lm_head.weight"] = params["lm_head.weight"] * params["model.norm.weight"]
    return found


def rotate(params: Mapping[str, Tensor], rotation: Tensor) -> Params:
    """Turn the stream: readers and tables W Q, writers Q^T W, their biases Q^T b."""
    found = {}
    for name, value in params.items():
        if kind(name) in INTO:
            found[name] = rotation.T @ value
        elif value.dim() == 2:
            found[name] = value @ rotation
        else:
            found[name] = value
    return found


def cut(params: Mapping[str, Tensor], width: int) -> Params:
    """Keep the first channels, and give norms the root of what their mean is taken over less."""
    found = {}
    for name, value in params.items():
        if kind(name) in INTO:
            found[name] = value[:width]
        elif name.endswith(NORM) or name == "model.norm.weight":
            found[name] = value[:width] * (len(value) / width) ** 0.5
        elif value.dim() == 2:
            found[name] = value[:, :width]
        else:
            found[name] = value
    return found
