"""Prune what fine-tuning has added to a base: which entries of the difference stay, times what.

DARE draws the entries that stay and makes up for the rest with 1 / (1 - p); DAREx-q multiplies by a
smaller 1 / q, which matters when p is near 1 or differences are large; magnitude keeps the largest.
Legend: O outputs, I inputs, N entries, Q values of q; p is the sparsity, the share of entries
dropped. Tensors without suffixes have the shape that a checkpoint stores, which may be fused.

Sources: Yu et al., Language Models are Super Mario (DARE); Deng et al., DARE the Extreme (DAREx).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.base.errors import RecipeError
from llmprune.base.registry import Registry
from llmprune.mask.counts import exact_sparsity, round_half_up
from llmprune.mask.rank import keep_highest_flat

FAILURE = 0.05  # DAREx: gamma, how often the bound on an output's change may be broken
STEP = 0.001  # of the grid of q
_CHUNK = 64  # values of q that are looked at together
_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class DeltaMethod:
    """One row of the table of methods.

    `score(delta, generator)` returns float32 scores of delta's shape, of which the highest stay;
    `scale(sparsity, q)` what survivors are multiplied by. `searches` says whether q is looked for.
    """

    score: Callable[[Tensor, torch.Generator], Tensor]
    scale: Callable[[float, float | None], float]
    searches: bool
    paper: str


def drawn_score(delta: Tensor, generator: torch.Generator) -> Tensor:
    """Return scores that know nothing of the difference: uniform draws."""
    return torch.rand(delta.shape, generator=generator)


def size_score(delta: Tensor, generator: torch.Generator) -> Tensor:
    """Return the magnitudes of the difference."""
    return delta.abs()


def made_up(sparsity: float, q: float | None = None) -> float:
    """Return 1 / (1 - p), under which a sum of differences keeps its expectation.

    >>> made_up(0.9), made_up(0.99)
    (10.0, 100.0)
    """
    return float(1 / (1 - exact_sparsity(sparsity)))


def divided_by_q(sparsity: float, q: float | None = None) -> float:
    """Return 1 / q; without q it is 1 - p."""
    return made_up(sparsity) if q is None else 1 / q


def unscaled(sparsity: float, q: float | None = None) -> float:
    """Return 1: what stays stays as it is."""
    return 1.0


DELTA_METHODS: Registry[DeltaMethod] = Registry(
    "method",
    {
        "dare": DeltaMethod(
            score=drawn_score,
            scale=made_up,
            searches=False,
            paper="Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous "
            "Models as a Free Lunch",
        ),
        "darex-q": DeltaMethod(
            score=drawn_score,
            scale=divided_by_q,
            searches=True,
            paper="Deng et al., DARE the Extreme: Revisiting Delta-Parameter Pruning for "
            "Fine-Tuned Models",
        ),
        "magnitude": DeltaMethod(
            score=size_score,
            scale=unscaled,
            searches=False,
            paper="Yu et al., Language Models are Super Mario, as the baseline",
        ),
    },
)


def check_amount(sparsity: float, q: float | None = None) -> None:
    """Check how much is dropped, and by what the rest is divided.

    Raises:
        RecipeError: sparsity is not in [0, 1), or q not in [1 - p, 1].
    """
    if not 0 <= sparsity < 1:
        raise RecipeError(
            f"sparsity: {sparsity:g} is no share of the difference that can be dropped. It must be "
            "at least 0 and below 1, where nothing but the base would be left; type --sparsity 0.9."
        )
    least = float(1 - exact_sparsity(sparsity))
    if q is not None and not least <= q <= 1:
        raise RecipeError(
            f"q: {q:g} is out of range. Survivors are divided by q, which must be from 1 - "
            f"sparsity ({least:g}, as DARE has it) to 1 (no rescaling); type --q auto to look for "
            "it."
        )


def bits_of(value: Tensor) -> Tensor:
    """Return the bits of a tensor as whole numbers, in its shape: NaN and -0 compare as well.

    >>> bits_of(torch.tensor([1.0, -0.0], dtype=torch.float16))
    tensor([ 15360, -32768], dtype=torch.int16)
    """
    return value.contiguous().view(_INT[value.element_size()])


def cut_away(tuned: Tensor, base: Tensor) -> Tensor:
    """Return where a weight that the base has is zero (bool): a mask's part of the difference.

    A pruned model keeps these zeros whatever is dropped elsewhere.

    >>> cut_away(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 0.0]))
    tensor([ True, False, False])
    """
    return (tuned == 0) & (base != 0)


def open_entries(tuned: Tensor, base: Tensor) -> Tensor:
    """Return which entries can be dropped (bool): they differ, and not because of a mask."""
    return (bits_of(tuned) != bits_of(base)) & ~cut_away(tuned, base)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return what draws for one tensor: it follows from the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def chosen(
    tuned: Tensor, base: Tensor, method: DeltaMethod, sparsity: float, generator: torch.Generator
) -> Tensor:
    """Return which entries of the difference stay (bool), of the entries that can be dropped.

    Of n such entries round(p * n) are dropped, halves rounded up; of equal scores the first.

    Raises:
        ValueError: a difference is NaN.
    """
    wide = torch.promote_types(tuned.dtype, torch.float32)
    open_ = open_entries(tuned, base)
    score_N = method.score(tuned.to(wide) - base.to(wide), generator)[open_]
    num_dropped = round_half_up(exact_sparsity(sparsity) * len(score_N))
    keep = torch.zeros(tuned.shape, dtype=torch.bool)
    keep[open_] = keep_highest_flat(score_N, num_dropped)
    return keep


def rescaled(delta: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Return a difference without what is dropped, and the rest times `scale`.

    >>> delta, keep = torch.tensor([0.2, -0.4, 0.1, 0.3]), torch.tensor([True, False, False, True])
    >>> rescaled(delta, keep, 1 / 0.8)
    tensor([0.2500, 0.0000, 0.0000, 0.3750])
    """
    return (delta * scale).masked_fill(~keep, 0)


def pruned(tuned: Tensor, base: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Return base plus pruned difference, in the dtype that both are stored in.

    What stays unscaled has the bits of `tuned`, as have the zeros of a mask; what is dropped has
    those of `base`. The sum is rounded once, from float32 or better.
    """
    if scale == 1:
        return torch.where(keep | cut_away(tuned, base), tuned, base)
    wide = torch.promote_types(tuned.dtype, torch.float32)
    start = base.to(wide)
    moved = (start + rescaled(tuned.to(wide) - start, keep, scale)).to(tuned.dtype)
    return torch.where(cut_away(tuned, base), tuned, torch.where(keep, moved, base))


def spread_bound(sparsity: float) -> float:
    """Return Phi(p) = (1 - 2p) / ln((1 - p) / p), which bounds how a drop spreads (Kearns-Saul).

    At p = 0 nothing spreads; at 1/2 the quotient has the limit 1/2.

    >>> round(spread_bound(0.9), 4), spread_bound(0.5), spread_bound(0.0)
    (0.3641, 0.5, 0.0)
    """
    if sparsity <= 0 or sparsity >= 1:
        return 0.0
    if math.isclose(sparsity, 0.5, abs_tol=1e-6):
        return 0.5
    return (1 - 2 * sparsity) / math.log((1 - sparsity) / sparsity)


def analytic_q(
    delta_OI: Tensor, mean_I: Tensor, sparsity: float, eta: float, failure: float = FAILURE
) -> Tensor:
    """Return q_O (float64): what an output's survivors are divided by, so that it changes little.

    With c = delta * mean input it is, on a grid of 0.001 from 1 - p to 1, the lowest
    |eta (1 - (1-p)/q) sum(c) + eta^2 Phi(p) sum(c^2) / (4 q^2) + ln(2/failure)|; of equals the
    first. `eta` weighs what the drop shifts against how it spreads.

    Source: Deng et al., DARE the Extreme, the per-layer form of DAREx-q.

    >>> analytic_q(torch.tensor([[1.0]]), torch.tensor([1.0]), 0.9, 0.2)
    tensor([0.3640], dtype=torch.float64)
    """
    part_OI = delta_OI.float() * mean_I.float()
    sum_O = part_OI.sum(1, dtype=torch.float64)
    square_O = part_OI.square().sum(1, dtype=torch.float64)
    least = float(1 - exact_sparsity(sparsity))
    best_O = torch.full_like(sum_O, torch.inf)
    q_O = torch.full_like(sum_O, least)
    spread_O = eta**2 * spread_bound(sparsity) / 4 * square_O
    grid_Q = least + STEP * torch.arange(math.floor((1 - least) / STEP + 1e-9) + 1).double()
    for q_Q in grid_Q.split(_CHUNK):
        q_Q1 = q_Q[:, None]
        found_QO = eta * (1 - least / q_Q1) * sum_O + spread_O / q_Q1**2 + math.log(2 / failure)
        found_QO = found_QO.abs_()
        place_O = torch.from_numpy(found_QO.numpy().argmin(0))  # numpy's is the first of equals
        low_O = found_QO.gather(0, place_O[None])[0]
        q_O = torch.where(low_O < best_O, q_Q[place_O], q_O)
        best_O = torch.minimum(best_O, low_O)
    return q_O
