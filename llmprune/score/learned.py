"""Scores of units that were trained: the chance that each stays."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmprune.score.members import Member, reader_of


def gate(members: Sequence[Member], num_units: int, *, steps: float) -> Tensor:
    """Return the chances of the units to stay (U,), learnt in so many steps. Reads `gate`.

    Source: Zhang et al., EcoDiff.
    """
    return reader_of(members).stats["gate"][:num_units].clone()
