"""Scores that know nothing: the floor under every other method.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from llmprune.stats.types import Stats


def uniform_noise(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return a random number in [0, 1) for every weight, float32 (O, I); reads `seed`.

    Drawn on the host by a generator of its own, so that masks depend neither on the device nor on
    the order in which linears are visited, and no other random number changes.

    Source: Liu et al., The Unreasonable Effectiveness of Random Pruning, which draws each weight's
    fate for itself; here the scores are ranked, so that counts are exact.

    >>> stats = Stats(num_tokens=0, values={"seed": torch.tensor(7)})
    >>> uniform_noise(torch.zeros(1, 2), stats).shape
    torch.Size([1, 2])
    """
    generator = torch.Generator().manual_seed(int(stats["seed"]))
    return torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)


def seed_of(seed: int, linear: str) -> Tensor:
    """Return the seed of one linear, int64 (): a number of the run's seed and the linear's name.

    >>> int(seed_of(0, "model.layers.0.mlp.up_proj")) == int(seed_of(0, "model.layers.0.mlp.up"))
    False
    """
    digest = hashlib.sha256(f"{seed} {linear}".encode()).digest()
    return torch.tensor(int.from_bytes(digest[:8], "big") >> 1)
