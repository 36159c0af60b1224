"""How much to remove where, by the name of the allocation."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.evidence import layer_adaptive, magnitudes, share_of_lowest
from llmprune.allocation.manual import as_named
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
        "lamp": Allocation(
            fn=share_of_lowest,
            needs=("profile",),
            profile=Profile(fn=magnitudes, ranked=True, normalise=layer_adaptive),
            paper="Lee et al., 2021: Layer-adaptive Sparsity for the Magnitude-based Pruning",
        ),
    },
)
