"""What an allocation is: how much of every site to remove."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

Profiles = Mapping[str, Tensor | None]
"""One entry per site; None where the allocation asks for no profile."""

Probe = Callable[[Sequence[Mapping[str, Fraction]]], Sequence[float]]
"""Candidates of shares by site, each answered with its distance to the dense model."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One row of the table of allocations.

    `fn(profiles, target, probe)` returns the share of units to remove by site; the projector
    turns shares into counts. `needs` names what the fn reads.
    """

    fn: Callable[[Profiles, Fraction, Probe | None], dict[str, Fraction]]
    needs: tuple[Literal["profile", "probe"], ...]
    paper: str
