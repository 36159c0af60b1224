"""Masked low-rank layers compute and learn with the weights that a merge leaves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmprune.recovery.layers import CutLinear, MaskedLinear, MaskedProduct, ScaledLinear, effective

W = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
A, B = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0], [2.0]])
KEEP = W != 0


def layer(
    kind: type, base: nn.Module, keep: Tensor | None, rank: int = 4, alpha: int = 8
) -> nn.Module:
    """Return a layer with factors away from their beginning."""
    config = LoraConfig(r=rank, lora_alpha=alpha, fan_in_fan_out=isinstance(base, Conv1D))
    torch.manual_seed(0)
    found = kind(base, "default", config=config, r=rank, lora_alpha=alpha)
    found.register_buffer("keep", keep, persistent=False)
    for factor in (found.lora_A["default"], found.lora_B["default"]):
        nn.init.normal_(factor.weight)
    return found


def test_the_effective_weight_is_the_one_worked_out_by_hand() -> None:
    expected = torch.tensor([[2.0, 0.0], [0.0, 6.0]])
    assert torch.equal(effective(W, A, B, KEEP, 2.0), expected)
    assert torch.equal(effective(W, A, B, None, 2.0), expected)


def test_a_scaled_weight_is_the_one_worked_out_by_hand() -> None:
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = W.clone()
    found = layer(ScaledLinear, base, None, rank=1)
    found.lora_A["default"].weight.data, found.lora_B["default"].weight.data = A, B
    assert torch.equal(
        W + found.get_delta_weight("default"), torch.tensor([[0.5, 0.0], [0.0, 4.0]])
    )


def test_a_scaled_weight_begins_as_the_weight() -> None:
    base = nn.Linear(6, 5)
    found = ScaledLinear(base, "default", config=LoraConfig(r=3), r=3, lora_alpha=3)
    x = torch.randn(7, 6)
    torch.testing.assert_close(found(x), base(x))


@pytest.mark.parametrize("derived", [False, True])
def test_gradients_are_those_of_autograd(derived: bool) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, a, b, weight = draw(2, 5, 6), draw(3, 6), draw(4, 3), draw(4, 6).detach()
    keep = weight.abs() > 0.5
    weight = weight * keep
    given = None if derived else keep
    assert torch.autograd.gradcheck(
        lambda *factors: MaskedProduct.apply(factors[0], weight, *factors[1:], given, 1.5),
        (x, a, b),
    )
    slow = x @ (weight + 1.5 * (b @ a) * keep).T
    torch.testing.assert_close(MaskedProduct.apply(x, weight, a, b, given, 1.5), slow)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_merged_is_what_was_trained(transposed: bool) -> None:
    base = Conv1D(5, 6) if transposed else nn.Linear(6, 5)
    keep = torch.rand_like(base.weight) > 0.4
    base.weight.data.mul_(keep)
    found = layer(MaskedLinear, base, keep)
    x = torch.randn(7, 6)
    before = found(x)
    found.merge()
    torch.testing.assert_close(found(x), before)
    assert not base.weight[~keep].any() and base.weight[keep].all()


def test_a_mask_need_not_be_what_is_zero() -> None:
    base = nn.Linear(6, 5, bias=False)
    keep = torch.ones_like(base.weight, dtype=torch.bool)
    base.weight.data[0, 0] = 0  # a kept weight that happens to be zero
    found = layer(MaskedLinear, base, keep)
    found.merge()
    assert base.weight.all()


def test_lora_prune_is_cut_only_when_merged() -> None:
    base = nn.Linear(6, 5, bias=False)
    keep = torch.rand_like(base.weight) > 0.5
    base.weight.data.mul_(keep)
    found = layer(CutLinear, base, keep)
    x = torch.randn(7, 6)
    whole = (
        x @ (base.weight + 2 * found.lora_B["default"].weight @ found.lora_A["default"].weight).T
    )
    torch.testing.assert_close(found(x), whole)
    found.merge()
    assert not base.weight[~keep].any()
    assert not torch.allclose(found(x), whole)
