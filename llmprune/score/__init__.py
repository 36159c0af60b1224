"""How much each weight matters, by the name of the score."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.score.activation import wanda
from llmprune.score.magnitude import absolute
from llmprune.score.types import Score

SCORES: Registry[Score] = Registry(
    "score",
    {
        "magnitude": Score(
            fn=absolute,
            needs=(),
            level="weight",
            adaptive=False,
            paper="Han et al., 2015: Learning both Weights and Connections for Efficient Neural "
            "Networks",
        ),
        "wanda": Score(
            fn=wanda,
            needs=("col_sq",),
            level="weight",
            adaptive=False,
            paper="Sun et al., 2024: A Simple and Effective Pruning Approach for Large Language "
            "Models",
        ),
    },
)
