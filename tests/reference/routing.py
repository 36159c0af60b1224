"""Mixtures of experts token by token: every expert of every token asked alone, sums in Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def swiglu(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """Return what one gated expert (gate over up) answers to one token."""
    gate, up = (gate_up @ x).chunk(2)
    middle: Tensor = down @ (torch.nn.functional.silu(gate) * up)
    return middle


def clamped_swiglu(
    gate_up: Tensor, gate_up_bias: Tensor, down: Tensor, down_bias: Tensor, x: Tensor
) -> Tensor:
    """Return what one expert of gpt_oss answers: matrices (I, O), gate and up in turn, biases."""
    both = x @ gate_up + gate_up_bias
    middle = []
    for channel in range(len(both) // 2):
        gate = both[2 * channel].clamp(max=7.0)
        up = both[2 * channel + 1].clamp(min=-7.0, max=7.0)
        middle.append((up + 1) * gate * torch.sigmoid(1.702 * gate))
    return torch.stack(middle) @ down + down_bias


def routing(
    chosen: Sequence[Sequence[int]],
    gates: Sequence[Sequence[float]],
    outputs: Sequence[Sequence[Sequence[float]]],
    num_experts: int,
) -> dict[str, list[float]]:
    """Return the statistics of experts: `outputs[t][k]` answers token t's k-th expert."""
    names = ("route_count", "out_norm", "out_energy", "out_max")
    names += ("route_gate", "route_norm", "used_gate", "used_norm")
    found = {name: [0.0] * num_experts for name in names}
    for experts, weights, answers in zip(chosen, gates, outputs, strict=True):
        whole = sum(weights)
        for expert, weight, answer in zip(experts, weights, answers, strict=True):
            energy = math.fsum(value * value for value in answer)
            norm = math.sqrt(energy)
            found["route_count"][expert] += 1
            found["out_norm"][expert] += norm
            found["out_energy"][expert] += energy
            found["out_max"][expert] = max(found["out_max"][expert], *map(abs, answer))
            found["route_gate"][expert] += weight / whole
            found["route_norm"][expert] += weight / whole * norm
            found["used_gate"][expert] += weight
            found["used_norm"][expert] += weight * norm
    return found


def top_gates(logits: Sequence[float], top_k: int) -> tuple[list[int], list[float]]:
    """Return the experts of the largest logits, and their softmax over all, scaled to add up to 1.

    >>> top_gates((2.0, 1.0, 0.0), 2)
    ([0, 1], [0.7310585786300049, 0.2689414213699951])
    """
    whole = sum(map(math.exp, logits))
    order = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:top_k]
    shares = [math.exp(logits[expert]) / whole for expert in order]
    return order, [share / sum(shares) for share in shares]
