"""Blocks whose weights have heavier-tailed spectra keep more.

Legend: O outputs, I inputs, E eigenvalues, ascending.

Source: Lu et al., AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved
Layer-wise Pruning of Large Language Models.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.allocation.fitting import fitted, means_by_block, option, scaled
from llmprune.allocation.types import Request
from llmprune.mask.pieces import PIECE
from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

_BINS = 100  # of the histogram whose highest bin says where the tail begins
_WINDOW = (0.95, 1.5)  # times that bin: the beginnings that are tried

Floats = NDArray[np.float64]


def tail_exponent(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return the exponent of the power law that the tail of W W^T's spectrum follows, float64 (1,).

    Scale-free; neither tokens nor masks are read. nan where fewer than two eigenvalues are left.

    >>> weight = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0]).sqrt())
    >>> bool(tail_exponent(weight, Stats(num_tokens=0, values={}), None) > 1)
    True
    """
    eigen_E = _spectrum(weight_OI)
    return torch.tensor([_peak_rule(eigen_E)], dtype=torch.float64)


def hill(eigen_E: Floats, start: int) -> float:
    """Return 1 + n over the sum of ln(x / x_start) of the n values from `start` on.

    >>> round(hill(np.array([1.0, 2.0, 4.0, 8.0]), 2), 6)
    3.88539
    """
    tail = eigen_E[start:]
    total = float(np.log(tail / tail[0]).sum())
    return 1 + len(tail) / total if total > 0 else float("inf")


def by_spectrum(request: Request) -> dict[str, Fraction]:
    """Return one share per block, in line with the mean exponent of its linears: the target times
    1 - `spread` to 1 + `spread`, and a factor that meets it.

    >>> from llmprune.arch.types import Site
    >>> sites = [Site(name=n, block=b, spans=(), num_units=u, unit_cost=1)
    ...          for b, (n, u) in enumerate([("a", 100), ("b", 100), ("c", 200)])]
    >>> profiles = {n: torch.tensor([v]) for n, v in zip("abc", [2.0, 4.0, 3.0])}
    >>> shares = by_spectrum(Request(
    ...     sites=sites, target=Fraction(7, 10), profiles=profiles, options={"spread": 0.3}))
    >>> [float(share) for share in shares.values()]
    [0.49, 0.91, 0.7]
    """
    values = {site.name: float(request.profiles[site.name]) for site in request.sites}
    of_block = means_by_block(request, values)
    low, high = min(of_block.values(), default=0.0), max(of_block.values(), default=0.0)
    spread = option(request, "spread", most=1)
    factor = {
        site.name: 1 + spread * (2 * scaled(of_block[site.block], low, high) - 1)
        if site.block in of_block
        else 1.0
        for site in request.sites
    }
    whole = sum(site.num_weights for site in request.sites)
    mean = sum(site.num_weights * factor[site.name] for site in request.sites) / whole
    target = float(request.target)
    return fitted(request, {name: target * value / (mean or 1) for name, value in factor.items()})


def _spectrum(weight_OI: Tensor) -> Floats:
    """Return the eigenvalues of W W^T or W^T W, whichever is smaller, ascending, float64.

    Without those that are no more than rounding beside the largest. Computed in float64 on the
    host, in float32 on accelerators, many of which are slow at more or lack it.
    """
    wide_SL = (
        weight_OI.detach() if weight_OI.shape[0] <= weight_OI.shape[1] else weight_OI.detach().T
    )
    dtype = torch.float64 if wide_SL.device.type == "cpu" else torch.float32
    size = wide_SL.shape[0]
    gram_SS = torch.zeros(size, size, dtype=dtype, device=wide_SL.device)
    with float32_products(wide_SL.device):
        for part_SL in wide_SL.split(max(1, PIECE // max(1, size)), dim=1):
            part_SL = part_SL.to(dtype)
            gram_SS.addmm_(part_SL, part_SL.T)
    found: Floats = torch.linalg.eigvalsh(gram_SS).to("cpu", torch.float64).numpy()
    rounding = torch.finfo(dtype).eps * size * float(found[-1]) if size else 0.0
    return found[found > max(0.0, rounding)]


def _peak_rule(eigen_E: Floats) -> float:
    """Return the exponent at the beginning of the tail that fits best, near the histogram's peak.

    The published code compares the window's lower end in decades with eigenvalues; here both ends
    are eigenvalues.
    """
    if len(eigen_E) < 2:
        return float("nan")
    decade_E = np.log10(eigen_E)
    counts, edges = np.histogram(decade_E, bins=_BINS)
    peak = int(counts.argmax())
    middle = 10 ** ((edges[peak] + edges[peak + 1]) / 2)
    start = int(np.searchsorted(eigen_E, _WINDOW[0] * middle))
    stop = int(np.searchsorted(eigen_E, _WINDOW[1] * middle, side="right"))
    start = min(start, len(eigen_E) - 2)
    tried = range(start, max(start + 1, min(stop, len(eigen_E) - 1)))
    return min((_misfit(eigen_E, index), hill(eigen_E, index)) for index in tried)[1]


def _misfit(eigen_E: Floats, start: int) -> float:
    """Return the Kolmogorov-Smirnov distance of the tail to its power law."""
    tail = eigen_E[start:]
    alpha = hill(eigen_E, start)
    if not alpha < float("inf"):
        return float("inf")
    law = 1 - (tail / tail[0]) ** (1 - alpha)
    return float(np.abs(law - np.arange(len(tail)) / len(tail)).max())
