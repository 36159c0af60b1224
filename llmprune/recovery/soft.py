"""Masks that harden while weights are trained: what is to go fades, and may still come back.

A soft mask maps the dense weights of one linear to those that a step computes with. From `hard` on,
a share of the run, it is the finished mask: no soft mask is exact before.
Legend: O outputs, I inputs, G groups that compete, N weights of a group.

Sources: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
(SR-STE); Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in
Transformers (mask decay); Cho et al., PDP: Parameter-free Differentiable Pruning is All You Need;
Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from llmprune.base.registry import Registry
from llmprune.mask.counts import exact_sparsity, round_half_up
from llmprune.mask.pattern import GroupName, NofM, Unstructured, choose_keep

SR_STE = "Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch"
DECAY = (
    "Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers"
)

PULL = 2e-4  # SR-STE: how much of a pruned weight is added to its gradient
TAU = 0.1  # PDP: softness in units of the median squared weight; ours, the paper's is absolute
RATIO = 0.95  # iterative soft shrinkage: what is left of a weight each time it is picked
HARD = 0.8  # of a run: from here on masks are hard, so that what stays can settle


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a mask by magnitude must be: how many weights go, and among which they compete.

    Where before_OI is given, what it removes stays removed and counts among `num_pruned`; a group
    of N:M that it left fewer than N weights keeps those.
    """

    pattern: Unstructured | NofM
    num_pruned: int
    group: GroupName = "matrix"
    before_OI: Tensor | None = None

    def keep(self, weight_OI: Tensor) -> Tensor:
        """Return keep_OI (bool) without the weights of smallest magnitude.

        Raises:
            ValueError: a NaN, or the pattern cannot prune this number.
        """
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        size_OI = weight_OI.detach().abs().to(wide)
        if self.before_OI is None:
            return choose_keep(self.pattern, size_OI, self.num_pruned, self.group)
        size_OI = size_OI.masked_fill(~self.before_OI, -torch.inf)
        return choose_keep(self.pattern, size_OI, self.num_pruned, self.group) & self.before_OI

    def grouped(self, value_OI: Tensor) -> Tensor:
        """Return value_GN: the weights that compete with each other, a group a row."""
        if isinstance(self.pattern, NofM):
            return value_OI.reshape(-1, self.pattern.m)
        return value_OI.reshape(1, -1) if self.group == "matrix" else value_OI


def goal_at(
    sparsity: float,
    shape: tuple[int, int],
    pattern: Unstructured | NofM | None = None,
    group: GroupName = "matrix",
    before_OI: Tensor | None = None,
) -> Goal:
    """Return the goal of a linear at a sparsity; N:M has its own, whatever is asked.

    Raises:
        RecipeError: the sparsity is no number from 0 to 1.

    >>> goal_at(0.25, (2, 4)).num_pruned
    2
    """
    pattern = pattern or Unstructured()
    share = exact_sparsity(sparsity) if pattern.sparsity is None else pattern.sparsity
    num_pruned = round_half_up(share * shape[0] * shape[1])
    return Goal(pattern=pattern, num_pruned=num_pruned, group=group, before_OI=before_OI)


def harden(weight_OI: Tensor, goal: Goal | Tensor) -> Tensor:
    """Return the finished keep_OI (bool), of the exact count; a goal that is a mask is returned.

    Raises:
        ValueError: a NaN, or the pattern cannot prune this number.

    >>> harden(torch.tensor([[0.4, -0.1, 0.3, 0.05]]), goal_at(0, (1, 4), NofM(n=2, m=4)))
    tensor([[ True, False,  True, False]])
    """
    return goal if isinstance(goal, Tensor) else goal.keep(weight_OI)


@dataclass(frozen=True, kw_only=True)
class SoftMask:
    """One row of the table of soft masks.

    `fn(weight_OI, goal, progress, **options)` returns the weights, of the same dtype, that stand
    for the trained ones. The goal is a `Goal` or keep_OI itself. "forward": a forward pass computes
    with them and gradients flow to weight_OI (or to what it was made of, as W + c B A is).
    "update": they replace the trained weights after the optimizer's step. `options` are the numbers
    that a recipe may set, with their defaults.
    """

    fn: Callable[..., Tensor]
    at: Literal["forward", "update"]
    options: Mapping[str, float]
    paper: str


def sr_ste(
    weight_OI: Tensor, goal: Goal | Tensor, progress: float, *, pull: float = PULL, hard: float = 1
) -> Tensor:
    """Compute with kept weights alone, and train all: pruned ones are pulled towards zero.

    The gradient of weight_OI is that of the result plus `pull` times each pruned weight, once a
    backward pass: with micro-batches divide `pull` by their number, or pass 0 and add `pulled` once
    a step.

    Source: Zhou et al., SR-STE.
    """
    weight_OI, keep_OI = _prepared(weight_OI, goal)
    if progress >= hard:
        return weight_OI.masked_fill(~keep_OI, 0)
    out: Tensor = _Faded.apply(weight_OI, keep_OI, 0.0, pull)  # type: ignore[no-untyped-call]
    return out


def pulled(weight_OI: Tensor, keep_OI: Tensor, pull: float = PULL) -> Tensor:
    """Return what SR-STE adds to the gradient of a step: `pull` times each pruned weight.

    >>> pulled(torch.tensor([4.0, 2.0]), torch.tensor([True, False]), 0.5)
    tensor([0., 1.])
    """
    return weight_OI.detach().masked_fill(keep_OI, 0) * pull


def linear_fade(decay: float) -> float:
    """Return what is left of pruned weights, 1 - decay and never below 0.

    Source: Bambhaniya et al., with decay = 2e-4 times the step.
    """
    return max(0.0, 1.0 - decay)


def exponential_fade(decay: float) -> float:
    """Return what is left of pruned weights, e^-decay, which never is 0.

    Source: Bambhaniya et al., with decay = 2e-4 times the step.
    """
    return math.exp(-decay)


def linear_decay(
    weight_OI: Tensor,
    goal: Goal | Tensor,
    progress: float,
    *,
    rate: float = 1,
    dense: float = 0,
    hard: float = HARD,
) -> Tensor:
    """Let pruned weights fade on a line from `dense` on, until they are gone at `hard`.

    `rate` is the decay when masks become hard: above 1 weights are gone earlier. Gradients pass
    straight to all weights, as in the authors' code, until then.

    Source: Bambhaniya et al., mask decay.
    """
    left = linear_fade(rate * _phase(progress, dense, hard))
    return _decayed(weight_OI, goal, left if progress < hard else None)


def exponential_decay(
    weight_OI: Tensor,
    goal: Goal | Tensor,
    progress: float,
    *,
    rate: float = 5,
    dense: float = 0,
    hard: float = HARD,
) -> Tensor:
    """Let pruned weights fade exponentially from `dense` on, to e^-rate just before `hard`.

    Otherwise as `linear_decay`.

    Source: Bambhaniya et al., mask decay.
    """
    left = exponential_fade(rate * _phase(progress, dense, hard))
    return _decayed(weight_OI, goal, left if progress < hard else None)


def pdp(
    weight_OI: Tensor,
    goal: Goal | Tensor,
    progress: float,
    *,
    tau: float = TAU,
    hard: float = HARD,
    scale: float | None = None,
) -> Tensor:
    """Multiply weights by a gate that rises with their squares, and is a half at the cut.

    The cut lies halfway between the largest pruned and the smallest kept magnitude of a group, and
    takes no gradient. `tau` counts in `scale`, by default `typical_square(weight_OI)` of now.
    Computes in float32 or wider.

    Raises:
        ValueError: the goal is a mask, which need not have a cut.

    Source: Cho et al., PDP; tau relative to the weights is ours, for those of language models are
    far smaller than the paper's.
    """
    if isinstance(goal, Tensor):
        raise ValueError(
            "pdp gates weights by magnitude, and a fixed mask has no magnitude to cut at. It needs "
            "a goal; pass goal_at(0.5, weight.shape)."
        )
    weight_OI, keep_OI = _prepared(weight_OI, goal)
    if progress >= hard:
        return weight_OI.masked_fill(~keep_OI, 0)
    weight_GN = goal.grouped(weight_OI)
    wide_GN = weight_GN.to(torch.promote_types(weight_OI.dtype, torch.float32))
    cut_G1 = _cuts(wide_GN.detach().abs(), goal.grouped(keep_OI))
    softness = tau * (typical_square(weight_OI) if scale is None else scale)
    gated_GN = wide_GN * pdp_gate(wide_GN.square(), cut_G1, softness)
    return gated_GN.view_as(weight_OI).to(weight_OI.dtype)


def pdp_gate(square: Tensor, cut_square: Tensor, tau: float) -> Tensor:
    """Return the gate of squared weights: a half at the squared cut, and steeper the lower `tau`.

    >>> pdp_gate(torch.tensor([0.0, 0.0025, 0.01]), torch.tensor(0.0025), 1e-3)
    tensor([0.0759, 0.5000, 0.9994])
    """
    return ((square - cut_square) / tau).sigmoid()


def typical_square(weight_OI: Tensor) -> float:
    """Return the median of the squares of weights that are not zero; 1 where all are.

    >>> typical_square(torch.tensor([0.0, 1.0, -2.0, 3.0]))
    4.0
    """
    wide_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
    size_N = wide_OI[wide_OI != 0].abs()
    return float(size_N.median()) ** 2 if len(size_N) else 1.0


def soft_shrinkage(
    weight_OI: Tensor,
    goal: Goal | Tensor,
    progress: float,
    *,
    ratio: float = RATIO,
    every: int = 1,
    hard: float = HARD,
) -> Tensor:
    """Multiply the weights that would go by `ratio`, for each of `every` steps since the last time.

    Source: Wang et al., Iterative Soft Shrinkage; a ratio of 0 is iterative hard thresholding.
    """
    weight_OI, keep_OI = _prepared(weight_OI, goal)
    left = ratio**every if progress < hard else 0.0
    return _faded(weight_OI, keep_OI, left)


SOFT_MASKS: Registry[SoftMask] = Registry(
    "recover.soft",
    {
        "sr-ste": SoftMask(
            fn=sr_ste,
            at="forward",
            options={"pull": PULL, "hard": 1.0},
            paper=SR_STE,
        ),
        "mask-decay": SoftMask(
            fn=linear_decay,
            at="forward",
            options={"rate": 1.0, "dense": 0.0, "hard": HARD},
            paper=DECAY,
        ),
        "mask-decay-exponential": SoftMask(
            fn=exponential_decay,
            at="forward",
            options={"rate": 5.0, "dense": 0.0, "hard": HARD},
            paper=DECAY,
        ),
        "pdp": SoftMask(
            fn=pdp,
            at="forward",
            options={"tau": TAU, "hard": HARD},
            paper="Cho et al., PDP: Parameter-free Differentiable Pruning is All You Need",
        ),
        "soft-shrinkage": SoftMask(
            fn=soft_shrinkage,
            at="update",
            options={"ratio": RATIO, "hard": HARD},
            paper="Wang et al., Iterative Soft Shrinkage Learning for Efficient Image "
            "Super-Resolution",
        ),
    },
)


def _prepared(weight_OI: Tensor, goal: Goal | Tensor) -> tuple[Tensor, Tensor]:
    """Return weights without what went before (nor gradients there), and the mask of now."""
    if isinstance(goal, Goal) and goal.before_OI is not None:
        weight_OI = weight_OI.masked_fill(~goal.before_OI, 0)
    return weight_OI, harden(weight_OI, goal)


def _phase(progress: float, dense: float, hard: float) -> float:
    """Return progress between the dense and the hard phase, 0 to 1."""
    if progress <= dense:
        return 0.0
    return (progress - dense) / (hard - dense) if progress < hard else 1.0


def _decayed(weight_OI: Tensor, goal: Goal | Tensor, left: float | None) -> Tensor:
    """Return weights of which the pruned ones have `left`; None is the hard mask."""
    weight_OI, keep_OI = _prepared(weight_OI, goal)
    if left is None:
        return weight_OI.masked_fill(~keep_OI, 0)
    out: Tensor = _Faded.apply(weight_OI, keep_OI, left, 0.0)  # type: ignore[no-untyped-call]
    return out


def _faded(weight_OI: Tensor, keep_OI: Tensor, left: float) -> Tensor:
    """Return weights with pruned ones multiplied; by 0 they are zeros, of either sign."""
    if left == 0:
        return weight_OI.masked_fill(~keep_OI, 0)
    return torch.where(keep_OI, weight_OI, weight_OI * left)


def _cuts(size_GN: Tensor, keep_GN: Tensor) -> Tensor:
    """Return the squared cut of each group, (G, 1); -inf where all are kept, inf where none."""
    low_G1 = size_GN.masked_fill(keep_GN, -torch.inf).amax(1, keepdim=True)
    high_G1 = size_GN.masked_fill(~keep_GN, torch.inf).amin(1, keepdim=True)
    square_G1 = ((low_G1 + high_G1) / 2).square()
    return square_G1.masked_fill_(low_G1 == -torch.inf, -torch.inf)


class _Faded(torch.autograd.Function):
    """Pruned weights faded on the way forward; the whole gradient, and a pull, on the way back."""

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, keep_OI: Tensor, left: float, pull: float) -> Tensor:
        """Return the faded weights."""
        ctx.pull = pull
        if pull:
            ctx.save_for_backward(weight_OI, keep_OI)
        return _faded(weight_OI, keep_OI, left)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of the dense weights."""
        (grad_OI,) = grads
        if ctx.pull:
            weight_OI, keep_OI = ctx.saved_tensors
            grad_OI = grad_OI + pulled(weight_OI, keep_OI, ctx.pull)
        return grad_OI, None, None, None
