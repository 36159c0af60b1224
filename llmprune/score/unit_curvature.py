"""Scores of units by what their removal costs once all other columns make up for it.

Legend: O outputs, I inputs, U units, W columns that one unit owns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.score.members import Member, reader_of

DAMPING = 0.01
_FIRST_DAMPING, _LARGEST_DAMPING = 1e-4, 1.0  # the first where none was asked for
_PIECE = 2**24  # values of a block's columns that are solved for at a time


def unit_surgeon(members: Sequence[Member], num_units: int, *, damping: float = DAMPING) -> Tensor:
    """Return tr(W_B (Hinv_BB)^-1 W_B^T), float32 (U,), B the unit's columns; reads `gram`.

    That is by how much the output of the linear that reads the units changes when a unit alone goes
    and all columns that stay are fitted anew; H is the damped Gram matrix. Inputs that were always
    zero cost nothing.

    Source: Hassibi & Stork, Optimal Brain Surgeon, for blocks of columns; Wang et al., Structurally
    Prune Anything (OBSPA).

    >>> from llmprune.arch.types import Span
    >>> from llmprune.stats.types import Stats
    >>> stats = Stats(num_tokens=2, values={"gram": torch.tensor([[2.0, 1.0], [1.0, 2.0]])})
    >>> weight = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    >>> reader = Member(Span(linear="down", axis="in"), weight, stats)
    >>> unit_surgeon([reader], 2, damping=0.0)
    tensor([15.0000,  7.5000])
    """
    reader = reader_of(members)
    gram_II = reader.stats["gram"]
    place = reader.place(num_units)
    inverse_II = damped_inverse(gram_II, damping)[place, place]
    alive_I = (gram_II.diagonal() != 0).to(inverse_II.device)
    weight_OI = reader.weight_OI.detach().to(inverse_II.device) * alive_I
    cost_U = removal_costs(weight_OI[:, place], inverse_II, reader.span.width)
    wide = torch.promote_types(reader.weight_OI.dtype, torch.float32)
    return cost_U.to(reader.weight_OI.device, wide)


def removal_costs(weight_OI: Tensor, inverse_II: Tensor, width: int = 1) -> Tensor:
    """Return tr(W_B (Hinv_BB)^-1 W_B^T) of every `width` consecutive columns, (I / width,).

    The dtype is that of the inverse. A block of the inverse that is not positive costs infinity.

    >>> removal_costs(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    tensor([2., 4.])
    """
    weight_OI = weight_OI.to(inverse_II)
    if width == 1:
        diagonal_I = inverse_II.diagonal()
        cost_I = weight_OI.square().sum(dim=0) / diagonal_I
        return cost_I.masked_fill(diagonal_I <= 0, torch.inf)
    num_units = len(inverse_II) // width
    block_UWW = torch.stack(
        [inverse_II[at : at + width, at : at + width] for at in range(0, len(inverse_II), width)]
    )
    lower_UWW, info_U = torch.linalg.cholesky_ex(block_UWW)
    lower_UWW = torch.where(info_U[:, None, None] == 0, lower_UWW, torch.eye(width).to(lower_UWW))
    cost_U = torch.zeros_like(block_UWW[:, 0, 0])
    rows = max(1, _PIECE // max(1, len(inverse_II)))
    for part_OI in weight_OI.split(rows):
        part_UWO = part_OI.T.reshape(num_units, width, -1)
        solved_UWO = torch.linalg.solve_triangular(lower_UWW, part_UWO, upper=False)
        cost_U += solved_UWO.square().sum(dim=(1, 2))
    return cost_U.masked_fill(info_U != 0, torch.inf)


def damped_inverse(gram_II: Tensor, damping: float) -> Tensor:
    """Return the inverse of G with `damping` times the mean of its diagonal added to the diagonal,
    float64 (I, I), on its device (of MPS: on the host).

    Inputs that were always zero do not count in the mean, and have 1 on the diagonal. Where
    Cholesky breaks down, ten times the damping is tried, up to 1.

    Raises:
        NumericalError: the matrix is not finite, or no damping helps.

    >>> damped_inverse(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 0.5).diagonal()
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    home = torch.device("cpu") if gram_II.device.type == "mps" else gram_II.device
    gram_II = gram_II.to(home, torch.float64)
    dead_I = gram_II.diagonal() == 0
    mean = float(gram_II.diagonal().sum()) / max(1, len(gram_II) - int(dead_I.sum()))
    tried = []
    for each in _dampings(damping):
        tried.append(f"{each:g}")
        damped_II = torch.lerp(gram_II, gram_II.T, 0.5)
        added_I = torch.full_like(damped_II.diagonal(), each * mean).masked_fill_(dead_I, 1)
        damped_II.diagonal().add_(added_I)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0 and bool(torch.isfinite(lower_II.diagonal()).all()):
            inverse_II: Tensor = torch.cholesky_inverse(lower_II)
            return inverse_II
    raise NumericalError(
        f"the Gram matrix of {len(gram_II)} inputs has no inverse with damping {', '.join(tried)}. "
        "A sum of squares of finite activations has one: use --dtype bfloat16 or float32 where "
        "float16 overflows; otherwise the checkpoint is damaged."
    )


def _dampings(first: float) -> Iterator[float]:
    """Yield the damping asked for, and ten times more until it is 1."""
    yield first
    damping = first or _FIRST_DAMPING / 10
    while damping < _LARGEST_DAMPING * (1 - 1e-9):
        damping = min(10 * damping, _LARGEST_DAMPING)
        yield damping
