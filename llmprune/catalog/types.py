"""One published method, as the names of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WEIGHTS = ("unstructured", "N:M", "HxW")
WIDTHS = ("ffn-channels", "heads", "query-heads")
DEPTHS = ("attention", "ffn", "blocks")
EXPERTS = ("experts", "expert-channels")
WHOLE = ("hidden", "vocabulary")
UNITS = (*WIDTHS, *EXPERTS, *DEPTHS, "sublayers", *WHOLE)
LOW_RANK = "low-rank"
PATTERNS = (*WEIGHTS, *UNITS, LOW_RANK)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method, in the names of its parts.

    ``score`` ranks weights and ``group`` says among which of them ("row", "matrix" or "mass");
    ``pool`` makes the score of a tile or a unit from those of its weights, of the linear that reads
    the units or, as ``reduce`` says, of all that a unit has a part of; ``allocation`` spreads the
    sparsity over the linears and ``solver`` updates what is kept. ``refine`` exchanges kept and
    pruned weights of the mask before that, and ``repair`` improves the whole block after.
    ``patterns`` are those it has a rule for, ``pattern`` the one that is meant where none is given;
    with ``propagate`` "dense" statistics are of the dense model throughout.
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
    pattern: str = "unstructured"
    reduce: Literal["reader", "sum", "mean", "max"] = "reader"
    propagate: Literal["pruned", "dense"] = "pruned"
    refine: str | None = None
    repair: str | None = None
