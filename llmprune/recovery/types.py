"""What a recovery is: which numbers are trained, and what that does to zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Adapter = Literal["lora", "mask-lora", "lora-prune", "scale-lora", "hira", "ia3", "shira"]
Part = Literal["norms", "biases", "head", "weights"]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One way to train a pruned model, in the names of its parts.

    `adapter` is what stands beside the weights of linears, `trains` are parameters of the model
    itself; "weights" are those of the linears that masks keep. `fills` says that a merge would put
    numbers where zeros are, `units` that whole units go while adapters are trained. `rank` and
    `alpha` are of adapters, and the learning rate is the peak.
    """

    title: str
    summary: str
    paper: str
    learning_rate: float
    adapter: Adapter | None = None
    trains: tuple[Part, ...] = ()
    fills: bool = False
    units: bool = False
    rank: int = 16
    alpha: float = 32.0
    options: Mapping[str, float] = field(default_factory=dict)
