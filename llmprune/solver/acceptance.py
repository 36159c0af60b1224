"""A solver's weights as they will be stored, kept only where they beat zeroing.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.errors import row_errors
from llmprune.solver.types import Solved


class Accepted(NamedTuple):
    """What is stored, the share of rows whose update it has, and squared errors of all rows.

    `zeroed` is the error that zeroing leaves, `left` that of what is stored.
    """

    solved: Solved
    share: float
    zeroed: float
    left: float


def accept(weight_OI: Tensor, solved: Solved, gram_II: Tensor, stored: torch.dtype) -> Accepted:
    """Return a solution rounded to the stored dtype, with the rows that were accepted.

    A row that is not finite, or moves its output further than zeroing with the same mask would,
    becomes the original row with zeros. Rows that lose nothing are the original, and accepted.

    >>> weight, keep = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False]])
    >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> accept(weight, Solved(torch.tensor([[2.5, 0.0]]), keep), gram, torch.float32)[0].weight_OI
    tensor([[2.5000, 0.0000]])
    >>> accept(weight, Solved(torch.tensor([[9.0, 0.0]]), keep), gram, torch.float32)[0].weight_OI
    tensor([[2., 0.]])
    """
    keep_OI = solved.keep_OI
    zeroed_OI = masked(weight_OI.to(stored), keep_OI)
    rounded_OI = masked(solved.weight_OI.to(stored), keep_OI)
    finite_O = torch.isfinite(rounded_OI).all(dim=1)
    wide = torch.promote_types(weight_OI.dtype, gram_II.dtype)
    dense_OI = weight_OI.to(wide)
    before_O = row_errors(dense_OI - zeroed_OI.to(wide), gram_II)
    after_O = row_errors(dense_OI - rounded_OI.to(wide), gram_II)
    whole_O = keep_OI.all(dim=1)
    better_O = finite_O & (after_O <= before_O).to(finite_O.device) & ~whole_O
    result_OI = torch.where(better_O[:, None], rounded_OI, zeroed_OI)
    num_accepted = int((better_O | whole_O).count_nonzero())
    share = num_accepted / len(keep_OI) if len(keep_OI) else 1.0
    left_O = torch.where(better_O.to(before_O.device), after_O, before_O)
    zeroed, left = float(before_O.sum()), float(left_O.sum())
    return Accepted(solved._replace(weight_OI=result_OI), share, zeroed, left)
