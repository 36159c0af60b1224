"""How the directions of a linear are judged that a form of low rank keeps or drops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RankScore:
    """What a direction of a linear's output is worth: the singular value of W S that it has.

    With `needs` ("gram",) S S^T is the Gram matrix of what the linear reads, without it S is one.
    `says` names what a linear keeps.
    """

    needs: tuple[str, ...]
    says: str
    paper: str
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Return the statistics that must be learnt from tokens."""
        return self.needs
