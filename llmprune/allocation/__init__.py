"""How much to remove where, by the name of the allocation."""

from __future__ import annotations

from llmprune.allocation.types import Allocation
from llmprune.allocation.uniform import same_share
from llmprune.base.registry import Registry

ALLOCATIONS: Registry[Allocation] = Registry(
    "allocation", {"uniform": Allocation(fn=same_share, needs=(), paper="every paper's baseline")}
)
