"""What happens to the weights that stay, by the name of the solver."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.solver.types import Solver
from llmprune.solver.zero import zero_pruned

SOLVERS: Registry[Solver] = Registry(
    "solver",
    {"zero": Solver(fn=zero_pruned, needs=(), updates=False, paper="every paper's baseline")},
)
