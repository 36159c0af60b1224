"""Scores of whole blocks by how little they move what passes through them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmprune.score.members import Member


def influence(members: Sequence[Member], num_units: int) -> Tensor:
    """Return ShortGPT's block influence (1,): one less the mean cosine of input and output.

    Reads `residual`.

    Source: Men et al., ShortGPT, eq. 1.

    >>> import torch
    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> stats = Stats(num_tokens=2, values={"residual": torch.tensor([1.5, 0.0, 0.0, 2.0])})
    >>> influence([Member(Span(linear="o", axis="all"), torch.ones(1, 1), stats)], 1)
    tensor([0.2500])
    """
    sums = members[0].stats["residual"]
    return (1 - sums[0] / sums[3]).reshape(num_units)


def angle(members: Sequence[Member], num_units: int) -> Tensor:
    """Return the mean angle over pi (1,) between input and output of a block. Reads `residual`.

    Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers (for one block).
    """
    sums = members[0].stats["residual"]
    return (sums[1] / sums[3]).reshape(num_units)
