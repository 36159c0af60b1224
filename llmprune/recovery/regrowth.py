"""Masks that move in training: as many weights come back as are dropped, by rule or learnt scores.

Every move is a pure function of one linear and returns a new mask with as many weights kept, in
every group too where there are groups. Of equal magnitudes, gradients or scores the first count.
Legend: O outputs, I inputs, G groups, N weights of a group.

Sources: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity Inspired by Network Science (SET); Evci et al., Rigging the Lottery (RigL); Liu et al.,
Sparse Training via Boosting Pruning Plasticity with Neuroregeneration (GraNet); Zhang et al.,
Lottery Jackpots Exist in Pre-trained Models; Zhang et al., Advancing Model Pruning via Bi-level
Optimization (BiP).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmprune.base.registry import Registry
from llmprune.mask.rank import keep_highest, keep_highest_flat

SHARE, END = 0.3, 0.75  # RigL: of the kept weights moved at first, and where in a run moves end
FIRST, LAST = 0.5, 0.005  # GraNet: of the kept weights moved at the start and at the end
HELD_BACK = 0.99  # first score of a removed weight, where a kept one has 1
_DIGITS = 6  # a count is a product of floats: 0.29 of 100 is 29, not 28


@dataclass(frozen=True, kw_only=True)
class Regrowth:
    """One row of the table of rules by which weights are dropped and others grow.

    `fn(weight_OI, keep_OI, grad_OI, fraction, generator, within)` returns a new keep_OI and changes
    no argument; `needs_gradient` says whether it reads grad_OI, the dense gradient of that step,
    or draws from the generator. `fraction` maps progress in [0, 1] to the share of kept weights
    that moves.
    """

    fn: Callable[..., Tensor]
    needs_gradient: bool
    fraction: Callable[[float], float]
    paper: str


def rigl_fraction(progress: float, share: float = SHARE, end: float = END) -> float:
    """Return the share of kept weights to move: half a cosine from `share` to nothing at `end`.

    Source: Evci et al., RigL.

    >>> round(rigl_fraction(0.25), 4)
    0.225
    """
    if progress >= end:
        return 0.0
    return share / 2 * (1 + math.cos(math.pi * max(progress, 0.0) / end))


def granet_fraction(progress: float, first: float = FIRST, last: float = LAST) -> float:
    """Return the share of kept weights to move: half a cosine from `first` to `last`.

    Source: Liu et al., GraNet, the decay of its regeneration.

    >>> round(granet_fraction(0.25), 5)
    0.42751
    """
    done = min(max(progress, 0.0), 1.0)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * done))


def set_step(
    weight_OI: Tensor,
    keep_OI: Tensor,
    grad_OI: Tensor | None,
    fraction: float,
    generator: torch.Generator | None,
    within: int | None = None,
) -> Tensor:
    """Drop the smallest kept weights and let as many removed ones grow, drawn at random.

    `fraction` of the kept weights move, rounded down. Weights are dropped wherever they are
    smallest; with `within` the place of each is taken in its own group of that many consecutive
    columns, so that N:M stays N:M. Those just dropped may return. Only magnitudes of weight_OI are
    read: weights times the norms of their inputs make a rule that has seen activations.

    Raises:
        ValueError: a fraction outside [0, 1], no generator, a NaN, or groups that do not fit.

    Source: Mocanu et al., SET.
    """
    if generator is None:
        raise ValueError(
            "SET draws the weights that grow and was given no generator. It needs a seeded one; "
            "pass torch.Generator().manual_seed(0)."
        )
    drawn = torch.rand(
        keep_OI.shape, generator=generator, device=generator.device, dtype=torch.float64
    )
    num = math.floor(_product(fraction, keep_OI))
    return _moved(weight_OI, keep_OI, drawn.to(keep_OI.device), num, within)


def rigl_step(
    weight_OI: Tensor,
    keep_OI: Tensor,
    grad_OI: Tensor | None,
    fraction: float,
    generator: torch.Generator | None = None,
    within: int | None = None,
) -> Tensor:
    """Drop the smallest kept weights and let those of the largest gradients grow.

    As `set_step`, by |grad_OI| in place of the draw.

    Raises:
        ValueError: a fraction outside [0, 1], no gradient, a NaN, or groups that do not fit.

    Source: Evci et al., RigL.

    >>> weight, keep = torch.tensor([[0.5, -0.1, 0.0]]), torch.tensor([[True, True, False]])
    >>> rigl_step(weight, keep, torch.tensor([[0.0, 0.0, 0.9]]), 0.5)
    tensor([[ True, False,  True]])
    """
    num = math.floor(_product(fraction, keep_OI))
    return _moved(weight_OI, keep_OI, _needed(grad_OI), num, within)


def granet_step(
    weight_OI: Tensor,
    keep_OI: Tensor,
    grad_OI: Tensor | None,
    fraction: float,
    generator: torch.Generator | None = None,
    within: int | None = None,
) -> Tensor:
    """Regenerate after a pruning step: as `rigl_step`, with the count rounded up.

    Raises:
        ValueError: a fraction outside [0, 1], no gradient, a NaN, or groups that do not fit.

    Source: Liu et al., GraNet.
    """
    num = math.ceil(_product(fraction, keep_OI))
    return _moved(weight_OI, keep_OI, _needed(grad_OI), num, within)


REGROWTHS: Registry[Regrowth] = Registry(
    "recover.regrow",
    {
        "set": Regrowth(
            fn=set_step,
            needs_gradient=False,
            fraction=rigl_fraction,
            paper="Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive "
            "Sparse Connectivity Inspired by Network Science",
        ),
        "rigl": Regrowth(
            fn=rigl_step,
            needs_gradient=True,
            fraction=rigl_fraction,
            paper="Evci et al., Rigging the Lottery: Making All Tickets Winners",
        ),
        "granet": Regrowth(
            fn=granet_step,
            needs_gradient=True,
            fraction=granet_fraction,
            paper="Liu et al., Sparse Training via Boosting Pruning Plasticity with "
            "Neuroregeneration",
        ),
    },
)


def changed(before_OI: Tensor, after_OI: Tensor) -> Tensor:
    """Return where a mask changed (bool): there the optimizer's moments must begin at zero.

    >>> changed(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    tensor([False,  True,  True])
    """
    return before_OI ^ after_OI


def regrown(
    weight_OI: Tensor, before_OI: Tensor, after_OI: Tensor, dense_OI: Tensor | None = None
) -> Tensor:
    """Return the weights under a new mask: what stays is as it was, what is removed is zero.

    What grows begins at zero or, where given, at its value in dense_OI, the weights before any
    pruning.

    >>> before, after = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    >>> regrown(torch.tensor([1.0, 2.0, 0.0]), before, after, torch.tensor([7.0, 8.0, 9.0]))
    tensor([1., 0., 9.])
    """
    kept_OI = weight_OI.masked_fill(~(before_OI & after_OI), 0)
    if dense_OI is None:
        return kept_OI
    return torch.where(after_OI & ~before_OI, dense_OI.to(weight_OI.dtype), kept_OI)


def jackpot_scores(keep_OI: Tensor) -> Tensor:
    """Return score_OI (float32) to learn a mask from, which begins as the mask at hand.

    >>> jackpot_scores(torch.tensor([True, False]))
    tensor([1.0000, 0.9900])
    """
    score_OI = torch.ones(keep_OI.shape, device=keep_OI.device)
    return score_OI.masked_fill_(~keep_OI, HELD_BACK)


def swapped(score_OI: Tensor, keep_OI: Tensor, share: float, within: int | None = None) -> Tensor:
    """Return keep_OI after the best of the exchanges that learnt scores ask for.

    Within a group (of `within` consecutive columns, or all) the lowest kept score is paired with
    the highest removed one, and so on; pairs whose removed score is higher want to change places.
    The `share` of them with the largest difference, rounded up, do. With a share of 1 the weights
    of the highest scores are kept.

    Raises:
        ValueError: a share outside [0, 1], a NaN, or groups that do not fit.

    Source: Zhang et al., Lottery Jackpots, the short restriction.

    >>> keep = torch.tensor([[True, True, False, False]])
    >>> swapped(torch.tensor([[0.98, 1.0, 0.995, 0.99]]), keep, 0.5)
    tensor([[False,  True,  True, False]])
    """
    _check_share(share)
    wide = torch.promote_types(score_OI.dtype, torch.float32)
    score_GN = _grouped(score_OI.detach().to(wide), within)
    keep_GN = _grouped(keep_OI, within)
    out = score_GN.masked_fill(~keep_GN, torch.inf).sort(dim=1, stable=True)
    into = score_GN.masked_fill(keep_GN, -torch.inf).sort(dim=1, descending=True, stable=True)
    gain_GN = into.values - out.values  # falls along a group, so the best pairs come first there
    wanted = int((gain_GN > 0).sum())
    num = math.ceil(round(share * wanted, _DIGITS))
    moves_GN = ~keep_highest_flat(-gain_GN.flatten(), num).view_as(gain_GN)
    group = moves_GN.nonzero()[:, 0]
    found_GN = keep_GN.clone()
    found_GN[group, out.indices[moves_GN]] = False
    found_GN[group, into.indices[moves_GN]] = True
    return found_GN.view_as(keep_OI)


def through(score_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """Return the mask as numbers of the scores' dtype, whose gradient is that of the scores.

    weight_OI * through(score_OI, keep_OI) gives each score, kept or not, the gradient of the
    masked weight times its weight.

    Source: Zhang et al., Lottery Jackpots Exist in Pre-trained Models; BiP.
    """
    out: Tensor = _Through.apply(score_OI, keep_OI)  # type: ignore[no-untyped-call]
    return out


def hyper_gradient(
    weight_OI: Tensor,
    keep_OI: Tensor,
    grad_OI: Tensor,
    reach: float,
    form: Literal["paper", "code"] = "paper",
) -> Tensor:
    """Return the gradient of scores that knows how the weights will answer the mask.

    grad_OI is that of the masked weights, `reach` one over the regularisation of the lower problem
    ("paper") or the authors' second learning rate ("code", which has the weight once more).

    Source: Zhang et al., BiP, and its repository.

    >>> weight, grad = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.3])
    >>> hyper_gradient(weight, torch.tensor([True, False]), grad, 0.1)
    tensor([ 0.9750, -0.3000])
    """
    kept_OI = grad_OI.masked_fill(~keep_OI, 0)
    if form == "code":
        direct_OI = grad_OI * weight_OI
        return direct_OI - reach * direct_OI * kept_OI
    return grad_OI * (weight_OI - reach * kept_OI)


def _moved(
    weight_OI: Tensor, keep_OI: Tensor, grow_OI: Tensor, num: int, within: int | None
) -> Tensor:
    """Drop the `num` smallest kept weights, and grow as many of each group by |grow_OI|."""
    size_OI = weight_OI.detach().abs().masked_fill_(~keep_OI, torch.inf)
    left_OI = keep_OI & keep_highest_flat(size_OI.flatten(), num).view_as(keep_OI)
    left_GN = _grouped(left_OI, within)
    need_G = _grouped(keep_OI, within).sum(1) - left_GN.sum(1)
    # The lowest of the negatives: so of equal gradients the first grows.
    cost_GN = _grouped(-grow_OI.detach().abs(), within).masked_fill(left_GN, torch.inf)
    return (left_GN | ~keep_highest(cost_GN, need_G)).view_as(keep_OI)


def _grouped(value_OI: Tensor, within: int | None) -> Tensor:
    """Return value_GN: all as one group, or groups of `within` consecutive columns.

    Raises:
        ValueError: groups do not fill the rows.
    """
    if within is None:
        return value_OI.reshape(1, -1)
    if within < 1 or value_OI.shape[-1] % within:
        raise ValueError(
            f"groups of {within} columns do not fill rows of {value_OI.shape[-1]}. M of N:M must "
            "divide them; pass None for one group of all weights."
        )
    return value_OI.reshape(-1, within)


def _product(fraction: float, keep_OI: Tensor) -> float:
    """Return a fraction of the number of kept weights, without the noise of its last digits."""
    _check_share(fraction)
    return round(fraction * int(keep_OI.sum()), _DIGITS)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(
            f"{share} is not a share of weights to move. It must be from 0 to 1; pass 0.3."
        )


def _needed(grad_OI: Tensor | None) -> Tensor:
    if grad_OI is None:
        raise ValueError(
            "weights grow by gradient, and none was given. The dense gradient of this step is "
            "needed, of removed weights too; pass weight.grad before masks cut it, or use 'set'."
        )
    return grad_OI


class _Through(torch.autograd.Function):
    """A mask forward, a gradient for its scores back."""

    @staticmethod
    def forward(ctx: Any, score_OI: Tensor, keep_OI: Tensor) -> Tensor:
        """Return the mask as numbers."""
        return keep_OI.to(score_OI.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient as it comes."""
        return grads[0], None
