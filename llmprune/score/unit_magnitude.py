"""Scores of units that look at weights alone.

Legend: U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.score.members import Member
from llmprune.score.reduction import reduce_scores


def relative_magnitude(members: Sequence[Member], num_units: int) -> Tensor:
    """Return, float32 (U,), the squared norm of all weights of a unit over the sum of the squared
    norms of the site's units that are as large or larger; 0/0 is 0.

    The largest unit of every site scores 1, so that in a ranking of many sites none loses
    everything; within a site the order is that of magnitudes. Whom a site is ranked against, such
    as attention against attention only, is said where the ranking is made.

    Source: He & Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers
    (its score of weights, that of Lee et al., LAMP, eq. 3), here of whole units.

    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> weight = torch.tensor([[3.0, 1.0], [0.0, 0.0]]).sqrt()
    >>> down = Member(Span(linear="down", axis="in"), weight, Stats(num_tokens=0, values={}))
    >>> relative_magnitude([down], 2)
    tensor([1.0000, 0.2500])
    """
    weights = [member.weight_OI.detach() for member in members]
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    squares = [weight_OI.to(wide).square() for weight_OI in weights]
    energy_U = reduce_scores(members, squares, num_units, "sum").cpu().double()
    ascending_U, _ = energy_U.sort()
    reach_U = ascending_U.flip(0).cumsum(0).flip(0)
    whole_U = reach_U[torch.searchsorted(ascending_U, energy_U)]
    score_U = energy_U / torch.where(whole_U > 0, whole_U, 1.0)
    return score_U.to(weights[0].device, wide)
