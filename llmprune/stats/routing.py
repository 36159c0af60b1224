"""What is summed over the tokens of a mixture's experts.

Legend: T tokens, K experts of one token, E experts, N pairs of a token and an expert of its.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from llmprune.stats.types import Stats

if TYPE_CHECKING:
    from torch import Tensor

OUTPUTS = ("route_count", "out_norm", "out_max", "out_energy")
GATES = ("route_gate", "route_norm", "used_gate", "used_norm")
ROUTING = OUTPUTS + GATES


class RoutingSums:
    """Sum what is seen of E experts, float64 (E,) on the host, whatever device it is seen on.

    | statistic               | over the tokens that an expert is given                     |
    |-------------------------|-------------------------------------------------------------|
    | route_count             | their number                                                |
    | out_norm, out_energy    | sum of the norm of its output, and of the squared norm      |
    | out_max                 | the largest absolute value of its output                    |
    | route_gate, route_norm  | sum of the gate, and of gate times norm, where the gates of |
    |                         | one token add up to 1                                       |
    | used_gate, used_norm    | the same with the gates as the model applies them           |

    Source: Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression
    (whose criterion is `route_norm` over `route_count`).

    >>> sums = RoutingSums(2)
    >>> sums.update(torch.tensor([[1], [1]]), torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1))
    >>> sums.result()["out_norm"]
    tensor([0., 7.], dtype=torch.float64)
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_tokens = 0
        self._sums: dict[str, Tensor] = {}

    def update(
        self,
        expert_TK: Tensor,
        norm_TK: Tensor,
        largest_TK: Tensor,
        gate_TK: Tensor | None = None,
        *,
        num_tokens: int | None = None,
    ) -> None:
        """Add T tokens; numbers of experts that do not exist stand for no expert.

        `num_tokens` is given where the rows are not the tokens of a batch, each once.
        """
        expert_N = expert_TK.reshape(-1).to("cpu", torch.int64)
        real_N = (expert_N >= 0) & (expert_N < self.num_experts)
        norm_N = _host(norm_TK)
        values = {"route_count": torch.ones_like(norm_N), "out_norm": norm_N}
        values["out_energy"] = norm_N.square()
        if gate_TK is not None:
            gate_TK = _host(gate_TK).view(gate_TK.shape)
            whole_T1 = gate_TK.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny)
            share_N, used_N = (gate_TK / whole_T1).view(-1), gate_TK.view(-1)
            values |= {"route_gate": share_N, "route_norm": share_N * norm_N}
            values |= {"used_gate": used_N, "used_norm": used_N * norm_N}
        sums = {
            name: torch.bincount(
                expert_N[real_N], weights=value_N[real_N], minlength=self.num_experts
            )
            for name, value_N in values.items()
        }
        sums["out_max"] = torch.zeros(self.num_experts, dtype=torch.float64).scatter_reduce_(
            0, expert_N[real_N], _host(largest_TK)[real_N], "amax"
        )
        self._add(sums, len(expert_TK) if num_tokens is None else num_tokens)

    def merge(self, other: Self) -> None:
        """Add what another of these has seen."""
        self._add(other._sums, other.num_tokens)

    def result(self) -> Stats:
        """Return the statistics of all tokens so far; none before the first."""
        values = {name: value_E.clone() for name, value_E in self._sums.items()}
        return Stats(num_tokens=self.num_tokens, values=values)

    def _add(self, sums: dict[str, Tensor], num_tokens: int) -> None:
        """Add the sums over some tokens; the largest value is the larger one."""
        for name, value_E in sums.items():
            if name not in self._sums:
                self._sums[name] = value_E.clone()
            elif name == "out_max":
                self._sums[name] = torch.maximum(self._sums[name], value_E)
            else:
                self._sums[name] = self._sums[name] + value_E
        self.num_tokens += num_tokens


def _host(value: Tensor) -> Tensor:
    """Return values as one row on the host, float64."""
    return value.detach().reshape(-1).to("cpu").double()
