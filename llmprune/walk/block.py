"""One decoder block as the methods see it: plain 2-D linears by name, wherever their values lie."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.types import Coupling, Family
from llmprune.base.errors import NumericalError
from llmprune.checkpoint.skeleton import fill

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block on the device; `prefix` starts the names of its parameters in the model."""

    index: int
    prefix: str
    module: Any
    anatomy: Anatomy
    device: torch.device
    held: dict[str, Tensor] | None = None

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

    def shrink(self, coupling: Coupling, kept_K: Tensor) -> set[str]:
        """Keep only these units (indices) of a coupling; return the parameters that changed.

        Rows, columns and biases are sliced, and the modules' own sizes follow.
        """
        changed = set()
        for span in coupling.spans:
            linear = self.anatomy.linears[span.linear]
            axis = 0 if (span.axis == "out") != linear.transposed else 1
            changed.add(self._slice(linear.param, axis, kept_K))
            bias = linear.param.removesuffix("weight") + "bias"
            if span.axis == "out" and bias in dict(self.module.named_parameters()):
                changed.add(self._slice(bias, 0, kept_K))
        for path, attribute in coupling.module_sizes:
            module = self.module.get_submodule(path)
            if hasattr(module, attribute):
                setattr(module, attribute, len(kept_K))
        return changed

    def coupling_read_by(self, linear: str) -> Coupling | None:
        """Return the coupling whose units this linear reads, single columns, if there is one."""
        for coupling in self.anatomy.couplings:
            if any(span.linear == linear and span.axis == "in" for span in coupling.spans):
                return coupling
        return None

    def permute(
        self, coupling: Coupling, order_U: Tensor, *, written_only: bool = False
    ) -> set[str]:
        """Put a coupling's units in another order; return the parameters that changed.

        The block computes the same. With `written_only` the linears that read them are left: their
        columns are in order already.
        """
        changed = set()
        for span in coupling.spans:
            if span.axis == "in" and written_only:
                continue
            linear = self.anatomy.linears[span.linear]
            axis = 0 if (span.axis == "out") != linear.transposed else 1
            changed.add(self._slice(linear.param, axis, order_U))
            bias = linear.param.removesuffix("weight") + "bias"
            if span.axis == "out" and bias in dict(self.module.named_parameters()):
                changed.add(self._slice(bias, 0, order_U))
        return changed

    def _slice(self, param: str, axis: int, kept_K: Tensor) -> str:
        """Replace a parameter by the kept slices of one axis."""
        value = self.module.get_parameter(param).data
        fill(self.module, {param: value.index_select(axis, kept_K.to(value.device)).contiguous()})
        return param


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
