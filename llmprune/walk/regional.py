"""Gradients inside one block: how the norm of its output follows from each of its weights.

Only the block itself is in the graph, and one sequence at a time.
Legend: N sequences, B = 1 sequence, T tokens, D hidden size, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from llmprune.stats import STATISTICS
from llmprune.stats.gradients import GradientMoment
from llmprune.stats.types import Stats
from llmprune.walk.backward import Scaled, differentiable, give, joined, not_finite, pull
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream

if TYPE_CHECKING:
    from torch import Tensor

_HALF_POWER = 4  # the largest value of a gradient in float16: two to this power


def regional_squares(
    block: Block, stream: Stream, linears: Collection[str] | None = None
) -> dict[str, Stats]:
    """Return `region_sq` of the block's linears (of all, unless some are named), float32 (O, I).

    It is the sum over sequences of the squared gradient of ||f(X_n)||_2, the norm of all that the
    block returns of sequence n. Nothing is changed, the hidden states of the stream neither.

    Raises:
        NumericalError: a gradient is not finite; names the linear.
        ValueError: a micro-batch of the stream holds several sequences.

    Source: Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients, the regional
    gradient of the score RGS.
    """
    names = block.anatomy.linears if linears is None else linears
    sums = {name: [_accumulator()] for name in names}
    with differentiable(block, sums) as params:
        for sequence, arguments in enumerate(stream.arguments):
            hidden_BTD = stream.hidden.get(sequence, block.device).detach()
            if 1 not in hidden_BTD.shape[-3:-1]:  # some families put tokens before sequences
                raise ValueError(
                    f"regional gradients are those of single sequences, and micro-batch {sequence} "
                    f"holds {hidden_BTD.shape[-3]}"
                )
            wanted = list(params.values())
            own = arguments[block.index]
            found, exponent = pull(block, hidden_BTD, own, wanted, direction)
            give(block, dict(zip(params, found, strict=True)), exponent, sums)
    for name, (moment,) in sums.items():
        if not all(torch.isfinite(value).all() for value in moment.result().values.values()):
            raise not_finite(f"{block.prefix}{name} (region_sq)")
    return {name: joined(moments) for name, moments in sums.items()}


def direction(output: Tensor) -> Scaled:
    """Return the gradient of the norm of an output by that output: its direction.

    Where the output is zero it has none, and zeros are returned.

    >>> direction(torch.tensor([3.0, 4.0])).value
    tensor([0.6000, 0.8000])
    """
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide)
    value = torch.where(norm > 0, wide / norm, 0.0)
    if output.dtype != torch.float16:
        return Scaled(value.to(output.dtype))
    exponent = _HALF_POWER - math.frexp(float(value.abs().max()))[1]
    return Scaled((value * 2.0**exponent).to(output.dtype), exponent)


def _accumulator() -> GradientMoment:
    moment = STATISTICS["region_sq"].accumulator()
    assert isinstance(moment, GradientMoment)
    return moment
