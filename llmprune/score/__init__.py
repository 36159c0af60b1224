"""How much each weight matters, by the name of the score."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.score.activation import relative_importance, wanda
from llmprune.score.magnitude import absolute
from llmprune.score.noise import uniform_noise
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
        "random": Score(
            fn=uniform_noise,
            needs=("seed",),
            level="weight",
            adaptive=False,
            paper="Liu et al., 2022: The Unreasonable Effectiveness of Random Pruning",
        ),
        "wanda": Score(
            fn=wanda,
            needs=("col_sq",),
            level="weight",
            adaptive=False,
            paper="Sun et al., 2024: A Simple and Effective Pruning Approach for Large Language "
            "Models",
        ),
        "ria": Score(
            fn=relative_importance,
            needs=("col_sq",),
            level="weight",
            adaptive=False,
            paper="Zhang et al., 2024: Plug-and-Play: An Efficient Post-training Pruning Method "
            "for Large Language Models",
        ),
    },
)
