"""The solver that updates nothing: chosen weights stay as they are, the others become zero."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmprune.mask.apply import zero_out
from llmprune.solver.types import Choose, Solved
from llmprune.stats.types import Stats


def zero_pruned(
    weights: Mapping[str, Tensor], stats: Mapping[str, Stats], chooses: Mapping[str, Choose]
) -> dict[str, Solved]:
    """Zero what is not kept, IN PLACE on the tensors given; the result holds those tensors.

    A pruned NaN or infinity becomes zero too. The statistics are not read.

    >>> import torch
    >>> keep_first = lambda weight, cols, curvature: torch.tensor([[True, False]])
    >>> zero_pruned({"q": torch.tensor([[3.0, 1.0]])}, {}, {"q": keep_first})["q"].weight_OI
    tensor([[3., 0.]])
    """
    solved = {}
    for name, weight_OI in weights.items():
        keep_OI = chooses[name](weight_OI, slice(0, weight_OI.shape[1]), None)
        zero_out(weight_OI, keep_OI)
        solved[name] = Solved(weight_OI, keep_OI)
    return solved
