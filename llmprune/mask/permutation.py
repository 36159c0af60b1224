"""The order of columns in which N:M keeps the most score: a snake, then exchanges by assignment.

Legend: O outputs, I inputs, G groups of M inputs, U groups of one part.
Source: Zhang et al., RIA (channel permutation: heuristic allocation, linear sum assignment).
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 256  # groups that exchange columns: time grows with their square, gain hardly


def permute_columns(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Return order_I, int64: new column j is old column `order_I[j]`, and N:M keeps more score.

    Never less than it keeps in the order as it is, which is returned where nothing keeps more.
    Infinite scores count as the extreme finite ones. The order is on the host.

    Raises:
        ValueError: a score is NaN, N is not in 0..M, or M does not divide the number of columns.

    >>> score_OI = torch.tensor([[9, 8, 7, 6, 1, 2, 3, 4], [9, 7, 8, 5, 4, 3, 1, 2.0]])
    >>> permute_columns(score_OI, 2, 4)
    tensor([6, 7, 3, 0, 4, 5, 1, 2])
    """
    columns = score_OI.shape[1]
    if not 0 <= n <= m or m < 1 or columns % m:
        raise ValueError(f"{n}:{m} does not divide {columns} columns")
    plain_I = torch.arange(columns)
    if not 0 < n < m or score_OI.numel() == 0:
        return plain_I
    score_OI = _finite(score_OI)
    order_GM = _snake(score_OI, m)
    num_parts = -(-len(order_GM) // WIDEST)
    for part in range(num_parts):  # every num_parts-th group: a part has columns of all sizes
        order_GM[part::num_parts] = _exchange(score_OI, order_GM[part::num_parts], n)
    order_I = order_GM.flatten()
    return order_I if kept(score_OI, order_I, n, m) > kept(score_OI, plain_I, n, m) else plain_I


def kept(score_OI: Tensor, order_I: Tensor, n: int, m: int) -> float:
    """Return the sum of the scores that N:M keeps of columns in an order.

    >>> kept(torch.tensor([[9, 8, 7, 6, 1, 2, 3, 4]]), torch.arange(8), 2, 4)
    24.0
    """
    home = _home(score_OI)
    total = torch.zeros((), dtype=torch.float64, device=home)
    for order in order_I.to(score_OI.device).view(-1, m).split(WIDEST):
        part_OUM = score_OI[:, order.flatten()].view(-1, *order.shape)
        total += part_OUM.topk(n, dim=-1).values.to(home).sum(dtype=torch.float64)
    return float(total)


def _home(score_OI: Tensor) -> torch.device:
    """Return where sums are taken in float64: MPS has none."""
    return torch.device("cpu") if score_OI.device.type == "mps" else score_OI.device


def _finite(score_OI: Tensor) -> Tensor:
    """Return float32 scores with infinities replaced, after a look for NaN."""
    score_OI = score_OI.detach().float()
    if bool(score_OI.isnan().any()):
        raise ValueError(f"scores of shape {tuple(score_OI.shape)} hold NaN")
    finite = score_OI[score_OI.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    return score_OI.clamp(min=low, max=high)


def _snake(score_OI: Tensor, m: int) -> Tensor:
    """Return order_GM: every group gets a column of each M-th of the columns, weak to strong.

    The second, fourth ... M-th is dealt out in reverse.
    """
    total_I = score_OI.to(_home(score_OI)).sum(0, dtype=torch.float64)
    rising_I = total_I.cpu().argsort(stable=True)
    rising_MG = rising_I.view(m, -1).clone()
    rising_MG[1::2] = rising_MG[1::2].flip(1)
    return rising_MG.T.contiguous()


def _exchange(score_OI: Tensor, order_UM: Tensor, n: int) -> Tensor:
    """Return new groups: at each place in turn, the columns of all groups are dealt out anew.

    A column x joins the others of a group, whose N-th largest scores are t: it adds max(x - t, 0)
    in every row, which is (x - t + |x - t|) / 2. The sums of x and of t are the same however the
    columns are dealt out, so the best assignment has the largest sum of distances.
    """
    from scipy.optimize import linear_sum_assignment

    order_UM = order_UM.clone()
    for place in range(order_UM.shape[1]):
        own_U = order_UM[:, place]
        others = torch.cat((order_UM[:, :place], order_UM[:, place + 1 :]), dim=1)
        joins_UO = score_OI[:, own_U.to(score_OI.device)].T.contiguous()
        rest_OUM = score_OI[:, others.flatten().to(score_OI.device)].view(-1, *others.shape)
        least_UO = rest_OUM.topk(n, dim=-1).values[..., -1].T.contiguous()
        gain_UU = torch.cdist(joins_UO, least_UO, p=1).cpu().numpy()
        joining, group = linear_sum_assignment(gain_UU, maximize=True)
        if gain_UU[joining, group].sum() > gain_UU.trace():  # of equal ones, what is there stays
            order_UM[torch.from_numpy(group), place] = own_U[torch.from_numpy(joining)]
    return order_UM
