"""What a score is: how much each weight or unit matters, higher = keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llmprune.stats.types import Stats

GIVEN = ("seed",)
"""What a score may read that is not learnt from tokens: the engine puts it among the statistics.

`seed`, int64 (), is a number of the run's seed and the linear's full name.
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table of scores.

    `fn(weight_OI, stats)` returns a new float32 `score_OI` and changes neither argument. `needs`
    names what it reads of `stats`. An adaptive score is asked again while a solver updates weights.
    """

    fn: Callable[[Tensor, Stats], Tensor]
    needs: tuple[str, ...]
    level: Literal["weight", "site"]
    adaptive: bool
    paper: str

    @property
    def learnt(self) -> tuple[str, ...]:
        """Return the statistics that must be learnt from tokens: `needs` less what is given."""
        return tuple(need for need in self.needs if need not in GIVEN)
