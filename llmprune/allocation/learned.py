"""Shares learnt by gradient descent: every linear mixes candidate shares, under one budget.

Legend: L linears, D candidate shares, N ranks of a row, C levels of a curve.

Source: Xu et al., BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity
Allocation. There the mixture is softmax(sigmoid(logits)), which cannot leave the middle, and the
budget is a penalty that is missed by a little; here it is softmax(logits), and the budget holds at
every step.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from llmprune.allocation.curves import LEVELS
from llmprune.allocation.distortion import curve_of, teams_of, weights_of
from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.types import Request

_HALVINGS = 40
_BETAS, _TINY = (0.9, 0.999), 1e-8  # of Adam
_SPREAD = 0.05  # of a linear's mixture around the target, before it learns
_EASE = 2000.0  # how steep a tilt may be: one candidate of 101 then has it all


def candidate_shares(num: int = 101) -> Tensor:
    """Return evenly spaced candidates from 1 down to 0, float64 (D,).

    >>> candidate_shares(3)
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    return torch.linspace(1, 0, num, dtype=torch.float64)


def mixture(logits_LD: Tensor) -> Tensor:
    """Return the part that each candidate has in a linear's share; sums to 1."""
    return logits_LD.softmax(dim=-1)


def expected_share(part_LD: Tensor, candidate_D: Tensor) -> Tensor:
    """Return the mean candidate of every linear (L,).

    >>> float(expected_share(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([1.0, 0.5, 0.0])))
    0.5
    """
    return part_LD @ candidate_D


def keep_probability(part_LD: Tensor, candidate_D: Tensor, num: int) -> Tensor:
    """Return how likely a weight of each rank in a row of `num` stays, (L, N), the lowest first.

    A candidate takes the ranks below its share of the row. Differentiable in the parts.

    >>> keep_probability(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([1.0, 0.5, 0.0]), 4)
    tensor([0.2500, 0.2500, 0.7500, 0.7500])
    """
    rank_N = torch.arange(num, device=part_LD.device)
    taken_DN = rank_N < (candidate_D * num)[:, None]
    return 1 - part_LD @ taken_DN.to(part_LD)


def tilted(logits_LD: Tensor, candidate_D: Tensor, weight_L: Tensor, share: float) -> Tensor:
    """Return logits whose expected shares, weighted, have the mean `share`.

    They differ by one multiple of the candidates: the mixtures nearest to the given ones, as a
    divergence measures it, that meet the budget. The multiple is found by bisection; a last step of
    Newton's carries its derivative.

    >>> found = tilted(torch.zeros(1, 3), torch.tensor([1.0, 0.5, 0.0]), torch.ones(1), 0.7)
    >>> round(float(expected_share(mixture(found), torch.tensor([1.0, 0.5, 0.0]))), 6)
    0.7
    """
    part_L = weight_L / weight_L.sum()

    def mean(tilt: Tensor | float) -> Tensor:
        return expected_share(mixture(logits_LD + tilt * candidate_D), candidate_D) @ part_L

    low, high = -_EASE, _EASE
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if float(mean(middle)) < share else (low, middle)
        part_LD = mixture(logits_LD + low * candidate_D)
        square_L = part_LD @ candidate_D.square() - (part_LD @ candidate_D).square()
        rise = (square_L @ part_L).clamp(min=torch.finfo(logits_LD.dtype).tiny)
    tilt = low - (mean(low) - share) / rise if float(rise) > 1e-12 else low
    return logits_LD + tilt * candidate_D


def by_descent(request: Request) -> dict[str, Fraction]:
    """Return the shares to which descent leads from equal ones: the sum of all relative errors,
    weighted by size as `rate-distortion` does, at the shares that are expected.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=n, block=0, spans=(), num_units=100, unit_cost=1) for n in "qk"]
    >>> cube = torch.linspace(0, 1, 21, dtype=torch.float64) ** 3
    >>> options = {"steps": 50, "rate": 0.1, "size": 0.5, "max_share": 0.95}
    >>> shares = by_descent(Request(sites=sites, target=Fraction(1, 2), options=options,
    ...     profiles={"q": cube, "k": cube.sqrt()}))
    >>> shares["q"] > shares["k"]
    True
    """
    teams = teams_of(request.sites)
    size_L = torch.tensor([sum(s.num_weights for s in team) for team in teams], dtype=torch.float64)
    worth_L = torch.tensor(weights_of(request, teams), dtype=torch.float64)
    root_LC = torch.from_numpy(np.cbrt(np.stack([curve_of(request, team) for team in teams])))
    limit = max(option(request, "max_share", above=0, most=1), float(request.target))
    target = float(request.target)
    candidate_D = candidate_shares() * limit
    logits_LD = (-((candidate_D - target) / _SPREAD).square() / 2).repeat(len(teams), 1)
    rate = option(request, "rate", above=0)
    mean_LD, square_LD = torch.zeros_like(logits_LD), torch.zeros_like(logits_LD)
    best, least = torch.full_like(size_L, target), float("inf")
    for step in range(int(option(request, "steps")) if 0 < target < limit else 0):
        with torch.enable_grad():
            parts_LD = mixture(tilted(logits_LD.requires_grad_(), candidate_D, size_L, target))
            share_L = expected_share(parts_LD, candidate_D)
            error = (worth_L * errors_at(root_LC, share_L)).sum()
            (grad_LD,) = torch.autograd.grad(error, [logits_LD])
        if error.item() < least:
            best, least = share_L.detach(), error.item()
        mean_LD.lerp_(grad_LD, 1 - _BETAS[0])  # Adam
        square_LD.lerp_(grad_LD.square(), 1 - _BETAS[1])
        scale_LD = (square_LD / (1 - _BETAS[1] ** (step + 1))).sqrt() + _TINY
        change_LD = mean_LD / (1 - _BETAS[0] ** (step + 1)) / scale_LD
        logits_LD = logits_LD.detach() - rate * change_LD
    shares = zip(teams, best.tolist(), strict=True)
    return fitted(
        request, {site.name: share for team, share in shares for site in team}, at_most=limit
    )


def errors_at(root_LC: Tensor, share_L: Tensor) -> Tensor:
    """Return every linear's error at its share (L,), from the cube roots of the curves at LEVELS.

    >>> errors_at(torch.from_numpy(LEVELS)[None], torch.tensor([0.5], dtype=torch.float64))
    tensor([0.1250], dtype=torch.float64)
    """
    place_L = share_L.clamp(0, 1) * (len(LEVELS) - 1)
    below_L = place_L.detach().long().clamp(max=len(LEVELS) - 2)
    low_L = root_LC.gather(1, below_L[:, None])[:, 0]
    high_L = root_LC.gather(1, below_L[:, None] + 1)[:, 0]
    root_L = low_L + (place_L - below_L) * (high_L - low_L)
    return root_L**3
