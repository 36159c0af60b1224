"""How much each weight matters, by the name of the score."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.score.activation import relative_importance, wanda
from llmprune.score.curvature import optimal_brain_surgeon
from llmprune.score.gradient import (
    ALPHA,
    first_order,
    fisher,
    gblm,
    gblm_l1,
    regional,
    taylor,
)
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
        "obs": Score(
            fn=optimal_brain_surgeon,
            needs=("curvature",),
            level="weight",
            adaptive=True,
            paper="Frantar & Alistarh, 2023: SparseGPT: Massive Language Models Can Be Accurately "
            "Pruned in One-Shot",
        ),
        "snip": Score(
            fn=first_order,
            needs=("grad_sum",),
            level="weight",
            adaptive=False,
            paper="Lee et al., 2019: SNIP: Single-shot Network Pruning based on Connection "
            "Sensitivity",
        ),
        "taylor": Score(
            fn=taylor,
            needs=("grad_abs",),
            level="weight",
            adaptive=False,
            paper="Sung et al., 2024: ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning "
            "for Vision-Language Models",
        ),
        "fisher": Score(
            fn=fisher,
            needs=("grad_sq",),
            level="weight",
            adaptive=False,
            paper="LeCun et al., 1990: Optimal Brain Damage",
        ),
        "gblm": Score(
            fn=gblm,
            needs=("col_sq", "grad_sq"),
            level="weight",
            adaptive=False,
            paper="Das et al., 2023: Beyond Size: How Gradients Shape Pruning Decisions in "
            "Large Language Models",
            options={"alpha": ALPHA},
        ),
        "gblm-l1": Score(
            fn=gblm_l1,
            needs=("col_sq", "grad_abs"),
            level="weight",
            adaptive=False,
            paper="Das et al., 2023: Beyond Size: How Gradients Shape Pruning Decisions in "
            "Large Language Models",
            options={"alpha": ALPHA},
        ),
        "wanda++": Score(
            fn=regional,
            needs=("col_sq", "region_sq"),
            level="weight",
            adaptive=False,
            paper="Yang et al., 2025: Wanda++: Pruning Large Language Models via Regional "
            "Gradients",
            options={"alpha": ALPHA},
        ),
    },
)
