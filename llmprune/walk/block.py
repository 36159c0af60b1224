"""One decoder block as the methods see it: plain 2-D linears by name, wherever their values lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.experts import NUMBERED
from llmprune.arch.types import Coupling, Family
from llmprune.base.errors import NumericalError
from llmprune.checkpoint.shrink import Kept, axes_of, take
from llmprune.checkpoint.shrink_experts import without_units
from llmprune.checkpoint.skeleton import fill

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block on the device; `prefix` starts the names of its parameters in the model.

    Where its modules are those of the result (`resident`), their sizes follow when it shrinks.
    """

    index: int
    prefix: str
    module: Any
    anatomy: Anatomy
    device: torch.device
    held: dict[str, Tensor] | None = None
    resident: bool = False
    added: dict[str, Tensor] = field(default_factory=dict)

    def holding(self) -> Block:
        """Return the same block, computing as before: new weights wait for `settle`."""
        return replace(self, held={})

    def settle(self) -> None:
        """Put the weights that were held back in their places."""
        held = self.held or {}
        while held:
            replace(self, held=None).replace(*held.popitem())

    def weight(self, linear: str) -> Tensor:
        """Return the weight_OI of a linear as a view; edits reach the module."""
        found = self.anatomy.linears[linear]
        return found.view(self.module.get_parameter(found.param).data)

    def replace(self, linear: str, weight_OI: Tensor) -> None:
        """Put a new weight of the same shape in a linear's place; the parameter object stays."""
        if self.held is not None:
            self.held[linear] = weight_OI
            return
        found = self.anatomy.linears[linear]
        param = self.module.get_parameter(found.param)
        if found.expert is None and found.num_parts == 1 and not found.transposed:
            param.data = weight_OI
        else:
            found.view(param.data).copy_(weight_OI)

    def check_finite(self, linear: str) -> None:
        """Check a weight.

        Raises:
            NumericalError: it has a NaN or an infinity; names the tensor.
        """
        import torch

        low, high = torch.aminmax(self.weight(linear))
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise NumericalError(
                f"tensor {self.prefix}{self.anatomy.linears[linear].param} holds NaN or infinity, "
                "so no score of it means anything. The checkpoint is damaged or diverged in "
                "training; take a sound one."
            )

    def rounded(self, params: set[str], dtype: torch.dtype) -> set[str]:
        """Round parameters to what a dtype can hold, in place; return their names."""
        for name in params:
            value = self.module.get_parameter(name).data
            value.copy_(value.to(dtype))
        return params

    def params_of(self, linears: set[str]) -> set[str]:
        """Return the parameters (relative names) that hold these linears."""
        return {self.anatomy.linears[name].param for name in linears}

    def shrink(self, kept: Kept, widths: Mapping[str, int] | None = None) -> set[str]:
        """Keep only some units (indices) of couplings; return the parameters that changed.

        Rows, columns and biases are cut out and, where `widths` names the coupling, filled up with
        zeros. Buffers that have an entry per expert are cut as well.
        """
        before = self.values()
        params = without_units(before, kept, self.anatomy.linears)
        shapes = {name: tuple(value.shape) for name, value in params.items()}
        for (param, axis), index_N in axes_of(kept, self.anatomy.linears, shapes, widths).items():
            params[param] = take(params[param], axis, index_N)
        changed = {name for name, value in params.items() if value is not before.get(name)}
        fill(self.module, {param: params[param] for param in changed})
        if self.resident:
            self._resize(kept)
            self._drop_experts(before.keys() - params.keys())
        return changed

    def values(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the block by name."""
        params = {name: value.data for name, value in self.module.named_parameters()}
        return params | dict(self.module.named_buffers())

    def _drop_experts(self, names: Iterable[str]) -> None:
        """Take experts that are modules in a list, and whose parameters these are, off its end."""
        found = [match for name in names if (match := NUMBERED.match(name))]
        for home in {match[1] for match in found}:
            kept = min(int(match[2]) for match in found if match[1] == home)
            del self.module.get_submodule(home)[kept:]

    def _resize(self, kept: Kept) -> None:
        """Let modules know how many units they have."""
        for coupling, kept_K in kept:
            for path, attribute, per_unit in coupling.module_sizes:
                module = self.module.get_submodule(path)
                if hasattr(module, attribute):
                    setattr(module, attribute, per_unit * len(kept_K))

    def clear(self, linears: Iterable[str]) -> set[str]:
        """Set linears and their biases to zero; return the parameters that changed."""
        names = set(linears)
        for name in names:
            self.weight(name).zero_()
        biases = self.biases_of(names)
        for param in biases:
            self.module.get_parameter(param).data.zero_()
        return self.params_of(names) | biases.keys()

    def biases_of(self, linears: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the biases that linears add, by parameter."""
        params = dict(self.module.named_parameters())
        found = {}
        for name in linears:
            stem = self.anatomy.linears[name].param.removesuffix("weight").removesuffix(".")
            for param in (f"{stem}.bias", f"{stem}_bias"):
                if param in params:
                    found[param] = params[param].data.clone()
        return found

    def add_to_bias(self, linear: str, bias_O: Tensor) -> str:
        """Add to the bias of a linear, which it has or gets; return the parameter's name.

        A bias that the module has no place for is held in `added` until the block is written.
        """
        param = self.anatomy.linears[linear].param
        name = param.removesuffix("weight") + "bias"
        weight = self.module.get_parameter(param).data
        bias_O = bias_O.to(weight)
        if name in dict(self.module.named_parameters()):
            self.module.get_parameter(name).data += bias_O
        elif self.resident:
            add_bias(self.module, name, bias_O)
        else:
            self.added[name] = bias_O
        return name

    def coupling_read_by(self, linear: str) -> Coupling | None:
        """Return the coupling whose units this linear reads, single columns, if there is one."""
        for coupling in self.anatomy.couplings:
            for span in coupling.spans:
                if (span.linear, span.axis, span.width) == (linear, "in", 1):
                    return coupling
        return None

    def permute(
        self, coupling: Coupling, order_U: Tensor, *, written_only: bool = False
    ) -> set[str]:
        """Put a coupling's units in another order; return the parameters that changed.

        The block computes the same. With `written_only` the linears that read them are left: their
        columns are in order already.
        """
        spans = [span for span in coupling.spans if not (written_only and span.axis == "in")]
        moved = replace(coupling, spans=tuple(spans), module_sizes=())
        return self.shrink([(moved, order_U)])


def add_bias(module: Any, name: str, bias_O: Tensor) -> None:
    """Give a linear that has none a bias."""
    import torch

    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(
        bias_O.clone(), requires_grad=False
    )


class Blocks(Protocol):
    """A model's blocks in order, each opened alone: streamed from disk, or resident in memory."""

    def __len__(self) -> int: ...

    @property
    def model(self) -> Any:
        """The model, whose own forward embeds and makes logits."""

    @property
    def family(self) -> Family:
        """Where the blocks are, and what they read and return."""

    @property
    def device(self) -> torch.device:
        """Where blocks and hidden states are computed."""

    @property
    def modules(self) -> Any:
        """The list of block modules (on meta where the model is streamed)."""

    def open(self, index: int) -> AbstractContextManager[Block]:
        """Bring one block to the device."""

    def trunk(self, *, head: bool) -> AbstractContextManager[Any]:
        """Bring what precedes (or with `head`, follows) the blocks to the device."""
