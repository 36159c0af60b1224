"""The solver that updates nothing: chosen weights stay as they are, the others become zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.types import Stats


def zero_pruned(
    weights: Mapping[str, Tensor],
    stats: Stats,
    chooses: Mapping[str, Choose],
    settings: Settings,
) -> dict[str, Solved]:
    """Return new weights with zeros where nothing is kept; the tensors given stay as they are.

    A pruned NaN or infinity becomes zero too. The statistics are not read.

    >>> import torch
    >>> first = Choose(fn=lambda weight, cols, curvature: torch.tensor([[True, False]]))
    >>> none = Stats(num_tokens=0, values={})
    >>> weights = {"q": torch.tensor([[3.0, 1.0]])}
    >>> zero_pruned(weights, none, {"q": first}, Settings())["q"].weight_OI
    tensor([[3., 0.]])
    """
    solved = {}
    for name, weight_OI in weights.items():
        keep_OI = chooses[name].whole(weight_OI)
        solved[name] = Solved(masked(weight_OI, keep_OI), keep_OI)
    return solved
