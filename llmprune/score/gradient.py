"""Scores that weigh each weight by what gradients say of it.

The gradients of the first three are those of the loss, so that scores of different linears may be
compared. All read how many sequences they were summed over, which `Stats` says.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.stats.types import Stats

ALPHA = 100.0  # of both papers


def first_order(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return |W * mean gradient|, float32 (O, I); reads `grad_sum`.

    What the loss would change by, to first order: gradients of opposite signs cancel.

    Source: Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, without
    the division by the sum of all scores.

    >>> values = {"grad_sum": torch.tensor([[0.0, 4.0]])}
    >>> stats = Stats(num_tokens=0, num_sequences=2, values=values)
    >>> first_order(torch.tensor([[3.0, -1.0]]), stats)
    tensor([[0., 2.]])
    """
    score_OI = weight_OI.detach().to(torch.float32, copy=True)
    return score_OI.mul_(_mean(stats, "grad_sum", score_OI)).abs_()


def taylor(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return the mean over sequences of |W * gradient|, float32 (O, I); reads `grad_abs`.

    Source: Sung et al., ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language
    Models (`GradMagAbs` of the published code).

    >>> values = {"grad_abs": torch.tensor([[2.0, 4.0]])}
    >>> stats = Stats(num_tokens=0, num_sequences=2, values=values)
    >>> taylor(torch.tensor([[3.0, -1.0]]), stats)
    tensor([[3., 2.]])
    """
    score_OI = weight_OI.detach().to(torch.float32, copy=True).abs_()
    return score_OI.mul_(_mean(stats, "grad_abs", score_OI))


def fisher(weight_OI: Tensor, stats: Stats) -> Tensor:
    """Return half of W^2 times the mean squared gradient, float32 (O, I); reads `grad_sq`.

    What the loss would change by, to second order, where the diagonal of the empirical Fisher
    matrix stands for the Hessian.

    Source: LeCun et al., Optimal Brain Damage (the saliency h_kk u_k^2 / 2), with the Fisher matrix
    in the place of h as in Theis et al., Faster gaze prediction with dense networks and Fisher
    pruning.

    >>> values = {"grad_sq": torch.tensor([[4.0, 8.0]])}
    >>> stats = Stats(num_tokens=0, num_sequences=2, values=values)
    >>> fisher(torch.tensor([[3.0, -1.0]]), stats)
    tensor([[9., 2.]])
    """
    score_OI = weight_OI.detach().to(torch.float32, copy=True).square_()
    return score_OI.mul_(_mean(stats, "grad_sq", score_OI)).mul_(0.5)


def gblm(weight_OI: Tensor, stats: Stats, *, alpha: float = ALPHA) -> Tensor:
    """Return |W| (a + alpha * g), float32 (O, I); reads `col_sq` and `grad_sq`.

    `a` is the root of the mean over sequences of the squares of an input, summed over tokens; `g`
    the norm of a weight's gradients, a sum over sequences. So their balance depends on the number
    of sequences: alpha is meant for 128.

    Source: Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models,
    with the l2 norm, in the units of the published code.

    >>> values = {"col_sq": torch.tensor([2.0, 8.0]), "grad_sq": torch.tensor([[0.0, 0.0009]])}
    >>> gblm(torch.tensor([[3.0, -1.0]]), Stats(num_tokens=9, num_sequences=2, values=values))
    tensor([[3., 5.]])
    """
    norm_OI = stats["grad_sq"].to(weight_OI.device, torch.float32, copy=True).sqrt_()
    return _blended(weight_OI, norm_OI, _input_norms(stats), alpha)


def gblm_l1(weight_OI: Tensor, stats: Stats, *, alpha: float = ALPHA) -> Tensor:
    """Return |W| (a + alpha * g), float32 (O, I), where `g` is the sum of a weight's |gradient|.

    Reads `col_sq` and `grad_abs`; otherwise as `gblm`.

    Source: Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models,
    with the l1 norm, in the units of the published code.

    >>> values = {"col_sq": torch.tensor([2.0, 8.0]), "grad_abs": torch.tensor([[0.0, 0.03]])}
    >>> gblm_l1(torch.tensor([[3.0, -1.0]]), Stats(num_tokens=9, num_sequences=2, values=values))
    tensor([[3., 5.]])
    """
    norm_OI = stats["grad_abs"].to(weight_OI.device, torch.float32, copy=True)
    return _blended(weight_OI, norm_OI, _input_norms(stats), alpha)


def regional(weight_OI: Tensor, stats: Stats, *, alpha: float = ALPHA) -> Tensor:
    """Return |W| (a + alpha * g), float32 (O, I); reads `col_sq` and `region_sq`.

    `a` is Wanda's norm of an input over all tokens of all sequences; `g` the root of the mean over
    sequences of the squared gradient of the norm of the block's output. So `a` grows with the
    number of sequences where `g` does not: alpha is meant for 128.

    Source: Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients, the score
    RGS; that `a` is over all tokens is how Wanda defines its norm, and how the unofficial code that
    the paper names computes it.

    >>> values = {"col_sq": torch.tensor([1.0, 100.0]), "region_sq": torch.tensor([[0.5, 0.0]])}
    >>> regional(torch.tensor([[3.0, -1.0]]), Stats(num_tokens=9, num_sequences=2, values=values))
    tensor([[153.,  10.]])
    """
    norm_OI = _mean(stats, "region_sq", weight_OI).sqrt_()
    return _blended(weight_OI, norm_OI, stats["col_sq"].sqrt(), alpha)


def _blended(weight_OI: Tensor, norm_OI: Tensor, norm_I: Tensor, alpha: float) -> Tensor:
    """Return |W| (norm_I + alpha * norm_OI), float32; `norm_OI` is used up."""
    norm_OI.mul_(alpha).add_(norm_I.to(norm_OI))
    return norm_OI.mul_(weight_OI.detach()).abs_()


def _input_norms(stats: Stats) -> Tensor:
    """Return the root of the mean over sequences of `col_sq`, (I,)."""
    return (stats["col_sq"] / _num(stats)).sqrt()


def _mean(stats: Stats, name: str, like: Tensor) -> Tensor:
    """Return a sum over sequences over their number, new, float32, on the device of `like`."""
    value = stats[name].to(like.device, torch.float32, copy=True)
    return value.div_(_num(stats))


def _num(stats: Stats) -> int:
    """Return the number of sequences.

    Raises:
        ValueError: the statistics do not say it; a mistake where they were joined.
    """
    if not stats.num_sequences:
        raise ValueError(f"{sorted(stats.values)} are sums over an unknown number of sequences")
    return stats.num_sequences
