"""Scores of whole experts, from what a router does with them and what they answer.

All are given the statistics of one mixture, (E,) each, by way of any member. Legend: E experts,
U units of the site, which are its experts, K experts kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from llmprune.base.errors import NumericalError, TooLarge
from llmprune.score.members import Member

SUBSETS = 1000


def reap(members: Sequence[Member], num_units: int, *, renormalise: float = 1) -> Tensor:
    """Return the mean of gate times norm of its output over the tokens that an expert is given.

    With `renormalise` the gates of one token add up to 1, else they are as the model applies them.
    An expert that is given no token scores 0. Reads `route_norm` (or `used_norm`), `route_count`.

    Source: Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression.
    """
    return _mean(members, "route_norm" if renormalise else "used_norm", num_units)


def frequency(members: Sequence[Member], num_units: int) -> Tensor:
    """Return the number of tokens that each expert is given; reads `route_count`.

    Source: Muzio et al., SEER-MoE: Sparse Expert Efficiency through Regularization for
    Mixture-of-Experts.
    """
    return _read(members, "route_count", num_units)


def ean(members: Sequence[Member], num_units: int) -> Tensor:
    """Return the mean norm of an expert's output over its tokens; reads `out_norm`, `route_count`.

    Source: Jaiswal et al., Finding Fantastic Experts in MoEs (expert activation norm).
    """
    return _mean(members, "out_norm", num_units)


def weighted_ean(members: Sequence[Member], num_units: int) -> Tensor:
    """Return the sum of gate times norm of its output over an expert's tokens; reads `route_norm`.

    Source: the numerator of REAP, which favours experts that many tokens are given to.
    """
    return _read(members, "route_norm", num_units)


def least_error_subset(
    error: Callable[[tuple[int, ...]], float],
    num_experts: int,
    num_kept: int,
    *,
    limit: int = SUBSETS,
) -> Tensor:
    """Return the kept_K experts with which the block's output errs least; all subsets are tried.

    `error` is given the experts of a subset, in order. Of equal errors the first subset is taken.

    Source: Lu et al., Not All Experts are Equal: Efficient Expert Pruning and Skipping for
    Mixture-of-Experts Large Language Models.

    Raises:
        TooLarge: there are more than `limit` subsets.
        NumericalError: an error is not a number.

    >>> least_error_subset(lambda kept: float(0 in kept), num_experts=3, num_kept=2)
    tensor([1, 2])
    """
    if (count := math.comb(num_experts, num_kept)) > limit:
        raise TooLarge(
            f"{num_kept} of {num_experts} experts can be kept in {count:,} ways, each of which "
            f"would be tried; {limit:,} is the most. Score experts one by one: --method reap."
        )
    best: tuple[float, tuple[int, ...]] | None = None
    for kept in combinations(range(num_experts), num_kept):
        found = float(error(kept))
        if math.isnan(found):
            raise NumericalError(
                f"with experts {kept} alone the block's output is not a number, so subsets cannot "
                "be compared. Use --dtype bfloat16 or float32."
            )
        if best is None or found < best[0]:
            best = found, kept
    assert best is not None
    return torch.tensor(best[1])


def _mean(members: Sequence[Member], name: str, num_units: int) -> Tensor:
    """Return a sum over tokens by their number; 0 without tokens."""
    count_U = _read(members, "route_count", num_units)
    return _read(members, name, num_units) / count_U.clamp(min=1)


def _read(members: Sequence[Member], name: str, num_units: int) -> Tensor:
    """Return a statistic of the mixture, which every member holds; a copy, one value per expert."""
    value_U = members[0].stats[name].clone()
    assert value_U.shape == (num_units,), f"{name} is of {len(value_U)} experts, not {num_units}"
    return value_U
