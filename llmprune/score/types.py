"""What a score is: how much each weight or unit matters, higher = keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llmprune.stats.types import Stats


@dataclass(frozen=True, kw_only=True)
class Score:
    """One row of the table of scores.

    `fn(weight_OI, stats)` returns a new float32 `score_OI` and changes neither argument. `needs`
    names the statistics it reads. An adaptive score is asked again while a solver updates weights.
    """

    fn: Callable[[Tensor, Stats], Tensor]
    needs: tuple[str, ...]
    level: Literal["weight", "site"]
    adaptive: bool
    paper: str
