"""What happens to the weights that stay, by the name of the solver."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.solver.admm import alps
from llmprune.solver.columnwise import sweep_columns
from llmprune.solver.compensating import fitted, fitted_with_bias, shifted
from llmprune.solver.dsnot import grow_and_prune
from llmprune.solver.least_squares import fit_supports
from llmprune.solver.swaps import swap, swap_updated
from llmprune.solver.types import Compensation, Refinement, Solver
from llmprune.solver.zero import zero_pruned

SOLVERS: Registry[Solver] = Registry(
    "prune.solver",
    {
        "zero": Solver(fn=zero_pruned, needs=(), updates=False, paper="every paper's baseline"),
        "columnwise": Solver(
            fn=sweep_columns,
            needs=("gram",),
            updates=True,
            workspace=(3, 6),
            paper="Frantar & Alistarh, 2023: SparseGPT: Massive Language Models Can Be Accurately "
            "Pruned in One-Shot",
        ),
        "least-squares": Solver(
            fn=fit_supports,
            needs=("gram",),
            updates=True,
            workspace=(3, 18),
            paper="Meng et al., 2024: ALPS: Improved Optimization for Highly Sparse One-Shot "
            "Pruning for Large Language Models",
        ),
        "alps": Solver(
            fn=alps,
            needs=("gram",),
            updates=True,
            workspace=(10, 24),
            paper="Meng et al., 2024: ALPS: Improved Optimization for Highly Sparse One-Shot "
            "Pruning for Large Language Models",
        ),
    },
)

REFINEMENTS: Registry[Refinement] = Registry(
    "prune.refine",
    {
        "dsnot": Refinement(
            fn=grow_and_prune,
            needs=("col_sq", "col_mean", "col_var"),
            paper="Zhang et al., 2023: Dynamic Sparse No Training: Training-Free Fine-tuning for "
            "Sparse LLMs",
        ),
        "swaps": Refinement(fn=swap, needs=("gram",), paper="exchanges that lower the exact error"),
        "swaps-updated": Refinement(
            fn=swap_updated,
            needs=("gram",),
            paper="exchanges that lower the exact error after a least-squares update",
        ),
    },
)

COMPENSATIONS: Registry[Compensation] = Registry(
    "prune.solver",
    {
        "least-squares": Compensation(
            fn=fitted,
            needs=("gram",),
            paper="the least-squares fit of what reads the units, by the Gram matrix of its inputs",
        ),
        "bias-shift": Compensation(
            fn=shifted,
            needs=("col_mean",),
            bias=True,
            paper="An et al., 2024: Fluctuation-based Adaptive Structured Pruning for Large "
            "Language Models",
        ),
        "least-squares-bias": Compensation(
            fn=fitted_with_bias,
            needs=("gram", "col_mean"),
            bias=True,
            paper="the least-squares fit with an intercept",
        ),
    },
)
