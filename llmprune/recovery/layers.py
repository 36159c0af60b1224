"""LoRA that masks cut, as layers of peft: what is trained is what a merge leaves.

The effective weight is W + c (B A) * M with the mask M, or W * (B A) for ScaleLoRA. It is built
anew for the backward pass, so that between the two only the factors and the input are held.
Legend: O outputs, I inputs, R rank, N tokens of a batch.

Sources: Zimmer et al., PERP (MaskLoRA, ScaleLoRA); peft's convention for custom layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import linear
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch import Tensor


class MaskedProduct(torch.autograd.Function):
    """x W'^T with W' = W + scale (B A) * keep, for a frozen W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, keep_OI: Tensor | None,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Return the product; the effective weight is not kept."""
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, keep_OI)
        ctx.scale = scale
        return linear(x, effective(weight_OI, a_RI, b_OR, keep_OI, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return gradients of input and factors."""
        (grad,) = grads
        x, weight_OI, a_RI, b_OR, keep_OI = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            whole = effective(weight_OI, a_RI, b_OR, keep_OI, ctx.scale)
            grad_x = grad @ whole.to(grad.dtype)
        grad_OI = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)
        grad_OI = grad_OI.to(a_RI.dtype)
        grad_OI = _kept(grad_OI, keep_OI, weight_OI).mul_(ctx.scale)
        return grad_x, None, b_OR.T @ grad_OI, grad_OI @ a_RI.T, None, None


def effective(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, keep_OI: Tensor | None, scale: float
) -> Tensor:
    """Return W + scale (B A) * keep in the dtype of the factors.

    Without `keep_OI` what is not zero in W is kept.

    >>> w, a, b = torch.tensor([[1., 0.], [0., 2.]]), torch.tensor([[.5, 1.]]), torch.ones(2, 1)
    >>> effective(w, a, b, None, 2.0)
    tensor([[2., 0.],
            [0., 4.]])
    """
    delta_OI = _kept((b_OR * scale) @ a_RI, keep_OI, weight_OI)
    return delta_OI.add_(weight_OI)


def _kept(value_OI: Tensor, keep_OI: Tensor | None, weight_OI: Tensor) -> Tensor:
    """Put zeros into a fresh tensor where weights are removed."""
    return value_OI.masked_fill_(weight_OI == 0 if keep_OI is None else ~keep_OI, 0)


class MaskedLinear(LoraLinear):  # type: ignore[misc]
    """A linear, or a transposed one as in GPT-2, whose low-rank update a mask cuts.

    `keep` has the weight's shape; None stands for what is not zero in the weight.
    """

    keep: Tensor | None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the cut update, as the merge adds it."""
        base = self.get_base_layer().weight
        delta = super().get_delta_weight(adapter)
        return _kept(delta, self.keep, base.data)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the product with the effective weight."""
        if self.disable_adapters or self.merged:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        base, name = self.get_base_layer(), self.active_adapters[0]
        weight, keep = base.weight, self.keep
        if self.fan_in_fan_out:
            weight, keep = weight.T, None if keep is None else keep.T
        out: Tensor = MaskedProduct.apply(  # type: ignore[no-untyped-call]
            *(x, weight, self.lora_A[name].weight, self.lora_B[name].weight, keep),
            self.scaling[name],
        )
        return out if base.bias is None else out + base.bias.to(out.dtype)


class CutLinear(LoraLinear):  # type: ignore[misc]
    """A linear that is trained with the whole update and merged with the cut one (LoRA-Prune)."""

    keep: Tensor | None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the cut update, as the merge adds it."""
        return _kept(super().get_delta_weight(adapter), self.keep, self.get_base_layer().weight)


class ScaledLinear(LoraLinear):  # type: ignore[misc]
    """A linear whose weight is multiplied by B A, which begins as ones (ScaleLoRA)."""

    keep: Tensor | None

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Let B A be ones: every entry is one over the square root of the rank."""
        value = self.r[adapter_name] ** -0.5
        for factor in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            torch.nn.init.constant_(factor.weight, value)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return W * (B A) - W, as the merge adds it."""
        weight = self.get_base_layer().weight
        factor = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
        found: Tensor = weight * ((factor.T if self.fan_in_fan_out else factor) - 1)
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the product with the multiplied weight."""
        if self.disable_adapters or self.merged:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        base = self.get_base_layer()
        weight = base.weight + self.get_delta_weight(self.active_adapters[0])
        weight = weight.T if self.fan_in_fan_out else weight
        return linear(x, weight.to(x.dtype), base.bias)


class MaskedStack(ParamWrapper):  # type: ignore[misc]
    """Experts stacked in one parameter, whose low-rank updates a mask cuts."""

    keep: Tensor | None

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return the cut updates of all experts; in training as in a merge."""
        delta = super().get_delta_weight(adapter, *args, **kwargs)
        keep = self.get_param() != 0 if self.keep is None else self.keep
        found: Tensor = delta * keep
        return found

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Let the module compute with the sum while it runs; peft's shortcut knows no mask."""
        base, name = self.get_base_layer(), self.parameter_name
        trained = self.get_param().requires_grad
        plus = _Plus(self.get_delta_weight(active_adapters[0]))
        parametrize.register_parametrization(base, name, plus)
        base.parametrizations[name].original.requires_grad_(trained)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, name, leave_parametrized=False)


class _Plus(torch.nn.Module):
    """Adds an update to a parameter."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta
