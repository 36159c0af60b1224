"""What linears are compared by before the first cut: magnitudes, as they are or made relative.

Legend: O outputs, I inputs, N units of a linear in any order.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from llmprune.allocation.types import Request
from llmprune.mask.pieces import PIECE
from llmprune.score.magnitude import absolute
from llmprune.stats.types import Stats


def magnitudes(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return the magnitude of every weight, float32 (O, I); neither tokens nor masks are read.

    >>> magnitudes(torch.tensor([[3.0, -1.0]]), Stats(num_tokens=0, values={}), None)
    tensor([[3., 1.]])
    """
    return absolute(weight_OI, stats)


def layer_adaptive(score_N: Tensor) -> Tensor:
    """Return every squared score over the sum of all squares of the linear that are as large or
    larger, float32 (N,), ascending, on the host; 0/0 is 0.

    The largest of each linear scores 1, so none loses everything. Computed in float64.

    Source: Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, eq. 3 (LAMP).

    >>> layer_adaptive(torch.tensor([10.0, 10.0, 1.0]))
    tensor([0.0050, 0.5000, 0.5000])
    """
    values_N = np.sort(score_N.flatten().numpy(force=True))
    result_N = np.zeros(len(values_N), dtype=np.float32)
    above, end = 0.0, len(values_N)
    while end:  # from the largest down, in pieces that part no equal values
        start = int(np.searchsorted(values_N, values_N[max(0, end - PIECE)]))
        part_N = values_N[start:end]
        square_N = np.square(part_N, dtype=np.float64)
        sum_N = np.cumsum(square_N[::-1])[::-1] + above
        is_new_N = np.r_[True, part_N[1:] != part_N[:-1]]
        first_N = np.maximum.accumulate(np.where(is_new_N, np.arange(len(part_N)), 0))
        np.divide(square_N, sum_N[first_N], out=square_N, where=sum_N[first_N] > 0)
        result_N[start:end] = square_N
        above, end = float(sum_N[0]), start
    return torch.from_numpy(result_N)


def share_of_lowest(request: Request) -> dict[str, Fraction]:
    """Return the share of each site's units that are among the lowest of the whole model.

    >>> from llmprune.arch.types import Site
    >>> site = Site(name="q", block=0, spans=(), num_units=8, unit_cost=1)
    >>> profiles = {"q": torch.tensor([3])}
    >>> share_of_lowest(Request(sites=[site], target=Fraction(1, 2), profiles=profiles))
    {'q': Fraction(3, 8)}
    """
    return {
        site.name: Fraction(int(request.profiles[site.name]), site.num_units)
        for site in request.sites
    }
