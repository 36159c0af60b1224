"""How much to remove where, by the name of the allocation."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from llmprune.allocation.additive import by_knapsack, one_of_each_and_all
from llmprune.allocation.concentration import by_concentration, pq_index
from llmprune.allocation.curves import error_curve, weighted_curve
from llmprune.allocation.depth import as_scored, by_lowest, by_shift, one_of_each
from llmprune.allocation.distortion import least_distortion, least_divergence, one_round
from llmprune.allocation.evidence import layer_adaptive, magnitudes, share_of_lowest
from llmprune.allocation.evolving import by_evolution, rounds_of_evolution
from llmprune.allocation.greedy import (
    all_that_are_left,
    by_divergence,
    by_jensen_shannon,
    by_logit_angle,
    by_logit_norm,
    by_loss,
    rounds_to_target,
)
from llmprune.allocation.incremental import by_adaptation
from llmprune.allocation.influence import SLOPE, by_angle, by_similarity
from llmprune.allocation.learned import by_descent
from llmprune.allocation.manual import as_named
from llmprune.allocation.middle import spare_ends_of_depth
from llmprune.allocation.modules import module_of
from llmprune.allocation.outliers import by_outliers, outlier_share
from llmprune.allocation.perturbation import by_noise, two_of_each
from llmprune.allocation.pooled import by_pool, rounds_of_pool
from llmprune.allocation.search import by_search, rounds_of_search
from llmprune.allocation.shapes import random_graph, spare_ends
from llmprune.allocation.spectrum import by_spectrum, tail_exponent
from llmprune.allocation.standardised import by_standard_score, standard_scores
from llmprune.allocation.types import Allocation, Profile, Request
from llmprune.allocation.uniform import same_share
from llmprune.allocation.widths import by_widths, rounds_of_widths
from llmprune.base.registry import Registry

_FINERCUT = (
    "Zhang et al., 2024: FinerCut: Finer-grained Interpretable Layer Pruning for Large Language "
    "Models"
)
_SLEB = (
    "Song et al., 2024: SLEB: Streamlining LLMs through Redundancy Verification and Elimination "
    "of Transformer Blocks"
)
_FLAP = "An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large Language Models"


def _remeasured(
    fn: Callable[[Request], dict[str, Fraction]], *distances: str, paper: str = _FINERCUT
) -> Allocation:
    """Return the row of a removal in rounds, by one distance."""
    return Allocation(
        fn=fn,
        needs=("probe",),
        rounds=all_that_are_left,
        rounds_for=rounds_to_target,
        distances=distances,
        units=True,
        options={"first": 0, "last": 0, "pool": 0},
        paper=paper,
    )


ALLOCATIONS: Registry[Allocation] = Registry(
    "prune.allocation",
    {
        "uniform": Allocation(fn=same_share, needs=(), paper="every paper's baseline"),
        "manual": Allocation(fn=as_named, needs=(), paper="no paper"),
        "global": Allocation(
            fn=share_of_lowest,
            needs=("profile",),
            profile=Profile(fn=magnitudes, ranked=True),
            min_keep=Fraction(1, 20),
            paper="Gupta et al., 2022: Is Complexity Required for Neural Network Pruning? A Case "
            "Study on Global Magnitude Pruning",
        ),
        "dimap": Allocation(
            fn=share_of_lowest,
            needs=("profile",),
            profile=Profile(fn=magnitudes, ranked=True, normalise=layer_adaptive, among=module_of),
            paper="He & Zhou, 2024: Data-independent Module-Aware Pruning for Hierarchical Vision "
            "Transformers",
        ),
        "lamp": Allocation(
            fn=share_of_lowest,
            needs=("profile",),
            profile=Profile(fn=magnitudes, ranked=True, normalise=layer_adaptive),
            paper="Lee et al., 2021: Layer-adaptive Sparsity for the Magnitude-based Pruning",
        ),
        "erk": Allocation(
            fn=random_graph,
            needs=(),
            judged=True,
            paper="Evci et al., 2020: Rigging the Lottery: Making All Tickets Winners",
        ),
        "uniform+": Allocation(
            fn=spare_ends,
            needs=(),
            options={"first": 0.0, "last": 0.8},
            judged=True,
            paper="Gale et al., 2019: The State of Sparsity in Deep Neural Networks",
        ),
        "owl": Allocation(
            fn=by_outliers,
            needs=("profile",),
            profile=Profile(
                fn=outlier_share, needs=("col_sq",), level="block", options=("outliers",)
            ),
            options={"outliers": 5.0, "spread": 0.08},
            judged=True,
            paper="Yin et al., 2024: Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret "
            "Sauce for Pruning LLMs to High Sparsity",
        ),
        "alpha": Allocation(
            fn=by_spectrum,
            needs=("profile",),
            profile=Profile(fn=tail_exponent),
            options={"spread": 0.3},
            judged=True,
            paper="Lu et al., 2024: AlphaPruning: Using Heavy-Tailed Self Regularization Theory "
            "for Improved Layer-wise Pruning of Large Language Models",
        ),
        "pq": Allocation(
            fn=by_concentration,
            needs=("profile",),
            profile=Profile(fn=pq_index, options=("p", "q")),
            options={"p": 0.5, "q": 1.0, "eta": 0.0, "gamma": 1.0, "beta": 0.9},
            judged=True,
            paper="Diao et al., 2023: Pruning Deep Neural Networks from a Sparsity Perspective",
        ),
        "ecoflap": Allocation(
            fn=by_noise,
            needs=("probe",),
            rounds=two_of_each,
            options={"eps": 1e-3, "spread": 0.1},
            judged=True,
            paper="Sung et al., 2024: ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for "
            "Vision-Language Models",
        ),
        "rate-distortion": Allocation(
            fn=least_distortion,
            needs=("profile",),
            profile=Profile(fn=weighted_curve, needs=("gram",)),
            options={"size": 0.5, "max_share": 0.95},
            judged=True,
            paper="Xu et al., 2023: Efficient Joint Optimization of Layer-Adaptive Weight Pruning "
            "in Deep Neural Networks",
        ),
        "sensitivity": Allocation(
            fn=least_divergence,
            needs=("profile", "probe"),
            profile=Profile(fn=error_curve, needs=("gram",)),
            rounds=one_round,
            options={"power": 1.5, "max_share": 0.95},
            judged=True,
            paper="Xu et al., 2023: Efficient Joint Optimization of Layer-Adaptive Weight Pruning "
            "in Deep Neural Networks",
        ),
        "learned": Allocation(
            fn=by_descent,
            needs=("profile",),
            profile=Profile(fn=weighted_curve, needs=("gram",)),
            options={"steps": 200, "rate": 0.1, "size": 0.5, "max_share": 0.95},
            judged=True,
            paper="Xu et al., 2024: BESA: Pruning Large Language Models with Blockwise "
            "Parameter-Efficient Sparsity Allocation",
        ),
        "evopress": Allocation(
            fn=by_search,
            needs=("probe",),
            rounds=rounds_of_search,
            options={
                "start": 1,
                "generations": 10,
                "offspring": 16,
                "step": 0.05,
                "max_level": 8,
                "max_share": 0.95,
            },
            judged=True,
            paper="Sieberling et al., 2025: EvoPress: Accurate Dynamic Model Compression via "
            "Evolutionary Search",
        ),
        "lowest": Allocation(
            fn=by_lowest,
            needs=("profile",),
            profile=Profile(fn=as_scored, level="site"),
            units=True,
            options={"first": 1, "last": 1},
            paper="Men et al., 2024: ShortGPT: Layers in Large Language Models are More Redundant "
            "Than You Expect",
        ),
        "ld-pruner": Allocation(
            fn=by_shift,
            needs=("probe",),
            rounds=one_of_each,
            distances=("shift",),
            units=True,
            options={"first": 0, "last": 0},
            paper="Castells et al., 2024: LD-Pruner: Efficient Pruning of Latent Diffusion Models "
            "using Task-Agnostic Insights",
        ),
        "laptop": Allocation(
            fn=by_knapsack,
            needs=("probe",),
            rounds=one_of_each_and_all,
            units=True,
            options={"first": 0, "last": 0},
            paper="Zhang et al., 2024: LAPTOP-Diff: Layer Pruning and Normalized Distillation for "
            "Compressing Diffusion Models",
        ),
        "finercut": _remeasured(by_divergence),
        "finercut-angular": _remeasured(by_logit_angle, "angular"),
        "finercut-norm": _remeasured(by_logit_norm, "norm"),
        "finercut-js": _remeasured(by_jensen_shannon, "js"),
        "sleb": _remeasured(by_loss, paper=_SLEB),
        "evopress-halves": Allocation(
            fn=by_evolution,
            needs=("probe",),
            rounds=rounds_of_evolution,
            units=True,
            options={"first": 0, "last": 0, "generations": 10, "offspring": 16},
            paper="Sieberling et al., 2025: EvoPress: Accurate Dynamic Model Compression via "
            "Evolutionary Search",
        ),
        "standardised": Allocation(
            fn=by_standard_score,
            needs=("profile",),
            profile=Profile(fn=as_scored, level="site"),
            units=True,
            paper=_FLAP,
        ),
        "standardised-units": Allocation(
            fn=by_standard_score,
            needs=("profile",),
            profile=Profile(fn=standard_scores, level="site"),
            units=True,
            paper=_FLAP,
        ),
        "cfsp": Allocation(
            fn=by_angle,
            needs=("profile",),
            profile=Profile(fn=as_scored, needs=("residual",), level="residual"),
            units=True,
            options={"slope": SLOPE},
            paper="Wang et al., 2025: CFSP: An Efficient Structured Pruning Framework for LLMs "
            "with Coarse-to-Fine Activation Information",
        ),
        "adapt-pruner": Allocation(
            fn=by_adaptation,
            needs=("profile", "remeasure"),
            profile=Profile(fn=as_scored, needs=("residual",), level="residual"),
            units=True,
            options={"steps": 8, "spread": 0.02},
            paper="Pan et al., 2025: Adapt-Pruner: Adaptive Structural Pruning for Efficient "
            "Small Language Model Training",
        ),
        "middle": Allocation(
            fn=spare_ends_of_depth,
            needs=(),
            units=True,
            options={"first": 0.125, "last": 0.0625},
            paper="Ma et al., 2023: LLM-Pruner: On the Structural Pruning of Large Language Models",
        ),
        "similarity": Allocation(
            fn=by_similarity,
            needs=("profile",),
            profile=Profile(fn=as_scored, needs=("residual",), level="residual"),
            units=True,
            options={"spread": 0.3},
            paper="Pan et al., 2025: Adapt-Pruner: Adaptive Structural Pruning for Efficient "
            "Small Language Model Training",
        ),
        "widths": Allocation(
            fn=by_widths,
            needs=("probe",),
            rounds=rounds_of_widths,
            units=True,
            options={"candidates": 12, "rounds": 2, "first": 1, "last": 1},
            paper="no paper",
        ),
        "greedy-units": Allocation(
            fn=by_pool,
            needs=("probe",),
            rounds=rounds_of_pool,
            units=True,
            options={"rounds": 8, "chunks": 8, "first": 0, "last": 0},
            paper="no paper",
        ),
    },
)
