"""One published method, as the names of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method, in the names of its parts.

    ``score`` ranks weights and ``group`` says among which of them ("row", "matrix" or "mass");
    ``pool`` makes the score of a tile or an FFN channel from those of its weights; ``allocation``
    spreads the sparsity over the linears and ``solver`` updates what is kept. ``refine`` exchanges
    kept and pruned weights of the mask before that, and ``repair`` improves the whole block after.
    """

    name: str
    title: str
    score: str
    allocation: str
    solver: str
    group: Literal["row", "matrix", "mass"]
    pool: Literal["l2", "mean"]
    patterns: tuple[str, ...]
    paper: str
    year: int
    summary: str
    refine: str | None = None
    repair: str | None = None
