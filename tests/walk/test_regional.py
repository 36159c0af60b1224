"""Gradients of the norm of a block's output, sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.walk.forward import advance, embed
from llmprune.walk.regional import direction, regional_squares
from llmprune.walk.streamed import Streamed
from tests.reference.gradients import norm_of_output

Pico = Callable[..., Path]
Open = Callable[..., Streamed]


def test_squares_are_those_of_autograd(
    pico: Pico, streamed: Open, tokens: Tensor, model_type: str
) -> None:
    blocks = streamed(pico(model_type))
    stream = embed(blocks, tokens[:3], 1)
    with blocks.open(0) as block:
        advance(block, stream)
    before = [stream.hidden.get(n, blocks.device).clone() for n in range(3)]
    with blocks.open(1) as block:
        with torch.no_grad():
            found = regional_squares(block, stream)
        assert found.keys() == block.anatomy.linears.keys()
        inputs = [(each, stream.arguments[n][1]) for n, each in enumerate(before)]
        for name, linear in block.anatomy.linears.items():
            param = block.module.get_parameter(linear.param)
            assert not param.requires_grad
            expected = linear.view(norm_of_output(block.module, param, inputs))
            assert found[name].num_sequences == 3
            within = 1e-5 * float(expected.max())
            torch.testing.assert_close(found[name]["region_sq"], expected, rtol=0, atol=within)
    assert all(torch.equal(stream.hidden.get(n, blocks.device), each)
               for n, each in enumerate(before))  # fmt: skip


def test_only_named_linears_are_looked_at(pico: Pico, streamed: Open, tokens: Tensor) -> None:
    blocks = streamed(pico("gpt2"))
    stream = embed(blocks, tokens[:2], 1)
    with blocks.open(0) as block:
        whole = regional_squares(block, stream)
        found = regional_squares(block, stream, ["attn.c_attn.k"])
    assert list(found) == ["attn.c_attn.k"]
    name = "attn.c_attn.k"
    assert torch.equal(found[name]["region_sq"], whole[name]["region_sq"])


def test_several_sequences_at_once_are_refused(pico: Pico, streamed: Open, tokens: Tensor) -> None:
    blocks = streamed(pico("llama"))
    stream = embed(blocks, tokens[:3], 2)
    with blocks.open(0) as block, pytest.raises(ValueError, match="micro-batch 0 holds 2"):
        regional_squares(block, stream)


def test_float16_loses_no_small_gradient(pico: Pico, streamed: Open, tokens: Tensor) -> None:
    """The direction of a long output has entries that float16 holds badly, or not at all."""

    def found(dtype: torch.dtype) -> Tensor:
        blocks = streamed(pico("llama"), dtype=dtype)
        stream = embed(blocks, tokens[:2], 1)
        with blocks.open(0) as block:
            return regional_squares(block, stream)["mlp.down_proj"]["region_sq"]

    half, exact = found(torch.float16), found(torch.float32)
    assert float((half - exact).norm() / exact.norm()) < 0.02


def test_a_direction_has_length_one_and_zero_has_none() -> None:
    output = torch.full((1, 4096, 64), 1e-3)
    assert float(direction(output).value.norm()) == pytest.approx(1, rel=1e-4)
    half, exponent = direction(output.half())
    assert half.dtype == torch.float16
    assert float((half.float() * 2.0**-exponent).norm()) == pytest.approx(1, rel=1e-3)
    for dtype in (torch.float32, torch.float16):
        assert not bool(direction(torch.zeros(1, 2, 3, dtype=dtype)).value.any())


def test_what_is_not_finite_is_told_with_its_linear(
    pico: Pico, streamed: Open, tokens: Tensor
) -> None:
    blocks = streamed(pico("llama"))
    stream = embed(blocks, tokens[:1], 1)
    with blocks.open(0) as block:
        block.weight("mlp.down_proj").fill_(torch.nan)
        with pytest.raises(NumericalError, match=r"layers\.0\.\S+ \(region_sq\)"):
            regional_squares(block, stream)
