"""The solver that updates nothing: chosen weights stay as they are, the others become zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.types import Choose, Solved
from llmprune.stats.types import Stats


def zero_pruned(
    weights: Mapping[str, Tensor], stats: Mapping[str, Stats], chooses: Mapping[str, Choose]
) -> dict[str, Solved]:
    """Return new weights with zeros where nothing is kept; the tensors given stay as they are.

    A pruned NaN or infinity becomes zero too. The statistics are not read.

    >>> import torch
    >>> keep_first = lambda weight, cols, curvature: torch.tensor([[True, False]])
    >>> zero_pruned({"q": torch.tensor([[3.0, 1.0]])}, {}, {"q": keep_first})["q"].weight_OI
    tensor([[3., 0.]])
    """
    solved = {}
    for name, weight_OI in weights.items():
        keep_OI = chooses[name](weight_OI, slice(0, weight_OI.shape[1]), None)
        solved[name] = Solved(masked(weight_OI, keep_OI), keep_OI)
    return solved
