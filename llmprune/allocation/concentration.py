"""Linears whose magnitudes are more concentrated lose more.

Legend: O outputs, I inputs.

Source: Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective (PQ index, SAP).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.types import Request
from llmprune.base.errors import RecipeError
from llmprune.mask.pieces import PIECE
from llmprune.stats.precision import wide_sum
from llmprune.stats.types import Stats

_NEARLY = 1e-9  # 5 * (1 - 4/5) is a little below 1 in floats


def pq_index(
    weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None, *, p: float, q: float
) -> Tensor:
    """Return the PQ index of the weights that are left, and their number, float64 (2,).

    0 where all are equal, towards 1 where few hold everything. `keep_OI` says which are left.
    Norms in float64.

    Raises:
        RecipeError: not 0 < p < q.

    >>> weight = torch.tensor([[4.0, 1.0, 1.0, 0.0, 2.0]])
    >>> pq_index(weight, Stats(num_tokens=0, values={}), None, p=1.0, q=2.0)
    tensor([0.2372, 5.0000], dtype=torch.float64)
    """
    if not 0 < p < q:
        raise RecipeError(
            f"prune.options.p: the PQ index needs 0 < p < q, but p is {p:g} and q {q:g}. Type for "
            "example --set prune.options.p=0.5 --set prune.options.q=1."
        )
    num = int(keep_OI.sum()) if keep_OI is not None else weight_OI.numel()
    top = float(weight_OI.detach().abs().amax()) if num else 0.0
    if not top:
        return torch.tensor([0.0, num], dtype=torch.float64)
    in_p = in_q = 0.0
    for part in weight_OI.detach().split(max(1, PIECE // max(1, weight_OI.shape[1]))):
        size = part.to(torch.float32).abs().div(top)  # powers of it neither overflow nor vanish
        in_p += float(wide_sum(size.pow(p)))
        in_q += float(wide_sum(size.pow(q)))
    index = 1 - math.exp(math.log(num) * (1 / q - 1 / p) + math.log(in_p) / p - math.log(in_q) / q)
    return torch.tensor([max(0.0, index), num], dtype=torch.float64)


def num_retained(index: float, num: int, *, p: float, q: float, eta: float = 0.0) -> int:
    """Return the lower bound on the number of weights that must stay.

    >>> num_retained(0.237230, 5, p=1, q=2), num_retained(0.267157, 5, p=0.5, q=1)
    (3, 4)
    """
    bound: float = num * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))
    return min(num, math.ceil(bound - _NEARLY))


def num_removable(num: int, retained: int, *, gamma: float, beta: float) -> int:
    """Return how many weights one step removes of `num`.

    >>> num_removable(5, 4, gamma=1.0, beta=0.9), num_removable(5, 3, gamma=1.0, beta=0.9)
    (1, 2)
    """
    share = min(beta, max(0.0, gamma * (1 - retained / num))) if num else 0.0
    return math.floor(num * share + _NEARLY)


def by_concentration(request: Request) -> dict[str, Fraction]:
    """Return the shares that one step of SAP removes, moved by one offset to the target.

    What an earlier pruning removed counts as removed. No linear loses more than `beta`, or the
    target if that is more.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=n, block=0, spans=(), num_units=100, unit_cost=1) for n in "qk"]
    >>> profiles = {"q": torch.tensor([0.6, 100.0]), "k": torch.tensor([0.2, 100.0])}
    >>> options = {"p": 0.5, "q": 1.0, "eta": 0.0, "gamma": 1.0, "beta": 0.9}
    >>> by_concentration(Request(
    ...     sites=sites, target=Fraction(1, 2), profiles=profiles, options=options))
    {'q': Fraction(7, 10), 'k': Fraction(3, 10)}
    """
    p, q = option(request, "p", above=0), option(request, "q", above=request.options["p"])
    eta, gamma = option(request, "eta"), option(request, "gamma")
    beta = option(request, "beta", above=0, most=1)
    wished = {}
    for site in request.sites:
        index, left = request.profiles[site.name].tolist()
        num = round(left)
        stays = num_retained(index, num, p=p, q=q, eta=eta)
        gone = num_removable(num, stays, gamma=gamma, beta=beta)
        wished[site.name] = 1 - (num - gone) / site.num_weights
    return fitted(request, wished, at_most=beta)
