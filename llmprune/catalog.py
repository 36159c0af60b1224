"""The published methods as one table; each row names its parts, which other rooms define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmprune.base.registry import Registry
from llmprune.recipe.models import PATTERNS


@dataclass(frozen=True, kw_only=True)
class Method:
    """One published method, in the names of its parts.

    ``score`` ranks weights and ``group`` says among which of them ("row" or "matrix"); ``pool``
    makes the score of an FFN channel from those of its weights; ``allocation`` spreads the sparsity
    over the linears and ``solver`` updates what is kept.
    """

    name: str
    title: str
    score: str
    allocation: str
    solver: str
    group: Literal["row", "matrix"]
    pool: Literal["l2", "mean"]
    patterns: tuple[str, ...]
    paper: str
    year: int
    summary: str


METHODS: Registry[Method] = Registry(
    "method",
    {
        "magnitude": Method(
            name="magnitude",
            title="Magnitude",
            score="magnitude",
            allocation="uniform",
            solver="zero",
            group="matrix",
            pool="l2",
            patterns=PATTERNS,
            paper=(
                "Han et al., Learning both Weights and Connections for Efficient Neural Networks, "
                "arXiv:1506.02626"
            ),
            year=2015,
            summary=(
                "Removes the weights of smallest absolute value in each matrix. Needs no "
                "calibration. FFN channels go by the norm of their column of the down projection, "
                "the baseline of FLAP (arXiv:2312.11983)."
            ),
        ),
        "wanda": Method(
            name="wanda",
            title="Wanda",
            score="wanda",
            allocation="uniform",
            solver="zero",
            group="row",
            pool="mean",
            patterns=PATTERNS,
            paper=(
                "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, "
                "arXiv:2306.11695"
            ),
            year=2023,
            summary=(
                "Removes, in each row, the weights of smallest absolute value times the norm of "
                "the input they read. FFN channels go by the mean of these over their column of "
                "the down projection, the baseline of FLAP (arXiv:2312.11983)."
            ),
        ),
    },
)
