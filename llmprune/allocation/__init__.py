"""How much to remove where, by the name of the allocation."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.concentration import by_concentration, pq_index
from llmprune.allocation.curves import error_curve, weighted_curve
from llmprune.allocation.distortion import least_distortion, least_divergence, one_round
from llmprune.allocation.evidence import layer_adaptive, magnitudes, share_of_lowest
from llmprune.allocation.learned import by_descent
from llmprune.allocation.manual import as_named
from llmprune.allocation.modules import module_of
from llmprune.allocation.outliers import by_outliers, outlier_share
from llmprune.allocation.perturbation import by_noise, two_of_each
from llmprune.allocation.search import by_search, rounds_of_search
from llmprune.allocation.shapes import random_graph, spare_ends
from llmprune.allocation.spectrum import by_spectrum, tail_exponent
from llmprune.allocation.types import Allocation, Profile
from llmprune.allocation.uniform import same_share
from llmprune.base.registry import Registry

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
    },
)
