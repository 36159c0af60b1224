"""What a score is: how much each weight or unit matters, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

GIVEN = ("seed", "curvature")
"""What a score may read that is not learnt from tokens: the engine puts it among the statistics.

`seed`, int64 (), is a number of the run's seed and the linear's full name; `curvature`, float32
(C,), is what a solver holds of the columns that it asks for.
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table of scores.

    `fn(weight_OI, stats)` returns a new float32 `score_OI` and changes neither argument. `needs`
    names what it reads of `stats`. An adaptive score is asked again while a solver updates weights.
    `options` are numbers that a recipe may set, with their defaults; fn takes them as keywords.
    """

    fn: Callable[..., Tensor]
    needs: tuple[str, ...]
    level: Literal["weight", "site"]
    adaptive: bool
    paper: str
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def learnt(self) -> tuple[str, ...]:
        """Return the statistics that must be learnt from tokens: `needs` less what is given."""
        return tuple(need for need in self.needs if need not in GIVEN)
