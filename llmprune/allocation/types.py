"""What an allocation is: how much of every site to remove, and what it must know to say so.

Legend: O outputs, I inputs, N all weights (or tiles) of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from torch import Tensor

from llmprune.arch.types import Site
from llmprune.stats.types import Stats

Probe = Callable[[Sequence[Mapping[str, Fraction]]], Sequence[float]]
"""Candidates of shares by site, each answered with its distance to the dense model."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an allocation is asked: the sites, the share to remove of them all, and what is known.

    `named` are the shares that the recipe gives single sites, `profiles` what a survey learnt.
    """

    sites: Sequence[Site]
    target: Fraction
    named: Mapping[str, Fraction] = field(default_factory=dict)
    profiles: Mapping[str, Tensor] = field(default_factory=dict)
    probe: Probe | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a survey learns of every linear before the first cut.

    `fn(weight_OI, stats, keep_OI)` reads the weight, the statistics that `needs` names (of the
    linear's tap, from dense activations) and the mask of an earlier pruning, None where there is
    none. Without `ranked` its answer, a small tensor, becomes the linear's profile.

    With `ranked` the answer is score_OI: new, float32, not below 0, higher = keep. All units of the
    model are then ranked together, tiles by their pooled score, and the profile is how many of the
    linear's are among the lowest, int64 (1,). `normalise`, if given, maps the scores of a linear's
    units, in any order and without those removed before, to the scores that are compared.
    """

    fn: Callable[[Tensor, Stats, Tensor | None], Tensor]
    needs: tuple[str, ...] = ()
    ranked: bool = False
    normalise: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One row of the table of allocations.

    `fn(request)` returns the share of units to remove by site, as exact fractions; the projector
    turns shares into counts. `needs` names what the fn reads: with "profile" there is a `profile`,
    and the plan derives a survey. `min_keep` is the share of each site that a ranking leaves,
    unless the recipe says otherwise.
    """

    fn: Callable[[Request], dict[str, Fraction]]
    needs: tuple[Literal["profile", "probe"], ...]
    paper: str
    profile: Profile | None = None
    min_keep: Fraction = Fraction(0)
