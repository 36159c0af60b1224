"""How much each weight or whole unit matters, by the name of the score."""

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
from llmprune.score.learned import gate
from llmprune.score.magnitude import absolute
from llmprune.score.members import UnitScore
from llmprune.score.noise import uniform_noise
from llmprune.score.ranks import RankScore
from llmprune.score.routing import ean, frequency, reap, weighted_ean
from llmprune.score.similarity import angle, influence
from llmprune.score.types import Score
from llmprune.score.unit_activation import GAMMA, cfsp, mean_magnitude
from llmprune.score.unit_curvature import DAMPING, unit_surgeon
from llmprune.score.unit_gradient import (
    hesso,
    taylor_first,
    taylor_mixed,
    taylor_second,
    taylor_vector,
)
from llmprune.score.unit_magnitude import relative_magnitude
from llmprune.score.variance import (
    fluctuation,
    published_fluctuation,
    weighted_fluctuation,
    weighted_norm,
)
from llmprune.score.whole import WholeScore

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

UNIT_SCORES: Registry[UnitScore] = Registry(
    "score",
    {
        "influence": UnitScore(
            fn=influence,
            needs=("residual",),
            paper="Men et al., 2024: ShortGPT: Layers in Large Language Models are More Redundant "
            "Than You Expect",
        ),
        "gate": UnitScore(
            fn=gate,
            needs=(),
            trained=True,
            options={"steps": 48},
            paper="Zhang et al., 2025: EcoDiff: Low-Cost Pruning of Diffusion Models",
        ),
        "angle": UnitScore(
            fn=angle,
            needs=("residual",),
            paper="Gromov et al., 2024: The Unreasonable Ineffectiveness of the Deeper Layers",
        ),
        "flap": UnitScore(
            fn=weighted_fluctuation,
            needs=("col_var",),
            paper="An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large "
            "Language Models",
        ),
        "flap-published": UnitScore(
            fn=published_fluctuation,
            needs=("col_var",),
            paper="An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large "
            "Language Models",
        ),
        "flap-ifv": UnitScore(
            fn=fluctuation,
            needs=("col_var",),
            paper="An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large "
            "Language Models",
        ),
        "flap-wifn": UnitScore(
            fn=weighted_norm,
            needs=("col_sq",),
            paper="An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large "
            "Language Models",
        ),
        "cfsp": UnitScore(
            fn=cfsp,
            needs=("col_sq",),
            paper="Wang et al., 2025: CFSP: An Efficient Structured Pruning Framework for LLMs "
            "with Coarse-to-Fine Activation Information",
            options={"gamma": GAMMA},
        ),
        "minitron": UnitScore(
            fn=mean_magnitude,
            needs=("col_abs",),
            paper="Muralidharan et al., 2024: Compact Language Models via Pruning and Knowledge "
            "Distillation",
        ),
        "taylor-vector": UnitScore(
            fn=taylor_vector,
            needs=("grad_sum",),
            paper="Ma et al., 2023: LLM-Pruner: On the Structural Pruning of Large Language Models",
            everywhere=True,
        ),
        "taylor-1": UnitScore(
            fn=taylor_first,
            needs=("grad_sum",),
            paper="Ma et al., 2023: LLM-Pruner: On the Structural Pruning of Large Language Models",
            everywhere=True,
        ),
        "taylor-2": UnitScore(
            fn=taylor_second,
            needs=("grad_sq",),
            paper="Ma et al., 2023: LLM-Pruner: On the Structural Pruning of Large Language Models",
            everywhere=True,
        ),
        "taylor-mix": UnitScore(
            fn=taylor_mixed,
            needs=("grad_sum", "grad_sq"),
            paper="Ma et al., 2023: LLM-Pruner: On the Structural Pruning of Large Language Models",
            everywhere=True,
        ),
        "hesso": UnitScore(
            fn=hesso,
            needs=("grad_sum",),
            paper="Chen et al., 2024: HESSO: Towards Automatic Efficient and User Friendly Any "
            "Neural Network Training and Pruning",
            everywhere=True,
        ),
        "obs-units": UnitScore(
            fn=unit_surgeon,
            needs=("gram",),
            paper="Wang et al., 2024: Structurally Prune Anything: Any Architecture, Any "
            "Framework, Any Time",
            options={"damping": DAMPING},
        ),
        "reap": UnitScore(
            fn=reap,
            needs=("route_norm", "used_norm", "route_count"),
            paper="Lasby et al., 2026: REAP the Experts: Why Pruning Prevails for One-Shot MoE "
            "Compression",
            options={"renormalise": 1},
        ),
        "frequency": UnitScore(
            fn=frequency,
            needs=("route_count",),
            paper="Muzio et al., 2024: SEER-MoE: Sparse Expert Efficiency through Regularization "
            "for Mixture-of-Experts",
        ),
        "ean": UnitScore(
            fn=ean,
            needs=("out_norm", "route_count"),
            paper="Jaiswal et al., 2025: Finding Fantastic Experts in MoEs: A Unified Study for "
            "Expert Dropping Strategies and Observations",
        ),
        "weighted-ean": UnitScore(
            fn=weighted_ean,
            needs=("route_norm",),
            paper="Lasby et al., 2026: REAP the Experts: Why Pruning Prevails for One-Shot MoE "
            "Compression",
        ),
        "dimap-units": UnitScore(
            fn=relative_magnitude,
            needs=(),
            paper="He & Zhou, 2024: Data-independent Module-Aware Pruning for Hierarchical Vision "
            "Transformers",
        ),
    },
)

WHOLE_SCORES: Registry[WholeScore] = Registry(
    "score",
    {
        "principal-axes": WholeScore(
            kind="hidden",
            needs=("residual_gram",),
            flows=True,
            rotates=True,
            says="weights that stay are turned onto the axes that are kept",
            paper="Ashkboos et al., 2024: SliceGPT: Compress Large Language Models by Deleting "
            "Rows and Columns",
        ),
        "channel-activity": WholeScore(
            kind="hidden",
            needs=("norm_activity",),
            flows=True,
            rotates=False,
            says="weights that stay are not changed, but for the scale of norms",
            paper="Muralidharan et al., 2024: Compact Language Models via Pruning and Knowledge "
            "Distillation",
        ),
        "token-counts": WholeScore(
            kind="vocabulary",
            needs=("token_counts",),
            flows=False,
            rotates=False,
            says="weights that stay are not changed",
            paper="Yang et al., 2022: TextPruner: A Model Pruning Toolkit for Pre-Trained Language "
            "Models",
        ),
    },
)

RANK_SCORES: Registry[RankScore] = Registry(
    "score",
    {
        "output-energy": RankScore(
            needs=("gram",),
            says="the directions that carry most of its output's energy",
            paper="Wang et al., 2024: SVD-LLM: Truncation-aware Singular Value Decomposition for "
            "Large Language Model Compression",
        ),
        "weight-energy": RankScore(
            needs=(),
            says="the directions of its largest singular values",
            paper="Hsu et al., 2022: Language Model Compression with Weighted Low-Rank "
            "Factorization",
        ),
    },
)


def score_row(name: str) -> Score | UnitScore | RankScore:
    """Return the row of a score, of units, of directions or of weights.

    Raises:
        UnknownName: no table has it.
    """
    return UNIT_SCORES.get(name) or RANK_SCORES.get(name) or SCORES[name]
