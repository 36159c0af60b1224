"""Gradients as the whole model gives them, one sequence after the other; scores as they read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Moments = dict[tuple[int, str], dict[str, Tensor]]
Rows = Sequence[Sequence[float]]


def whole_model(blocks: Any, tokens_NT: Tensor) -> Moments:
    """Return the moments of the loss' gradients by (block, linear), from one graph of it all.

    `blocks` are those of a model in memory.
    """
    params = {
        (index, name): blocks.modules[index].get_parameter(linear.param).requires_grad_()
        for index in range(len(blocks))
        for name, linear in blocks.anatomy(index).linears.items()
    }
    found: Moments = {}
    for ids_T in tokens_NT:
        logits_TV = blocks.model(input_ids=ids_T[None], use_cache=False).logits[0]
        loss = cross_entropy(logits_TV[:-1], ids_T[1:])
        gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for (key, param), gradient in zip(params.items(), gradients, strict=True):
            linear = blocks.anatomy(key[0]).linears[key[1]]
            own = linear.view(torch.zeros_like(param) if gradient is None else gradient)
            sums = found.setdefault(key, {})
            for name, value in (("sum", own), ("abs", own.abs()), ("sq", own**2)):
                sums[f"grad_{name}"] = sums.get(f"grad_{name}", 0) + value
    for param in params.values():
        param.requires_grad_(False)
    return found


def norm_of_output(module: Any, weight: Tensor, inputs: Sequence[tuple[Tensor, Any]]) -> Tensor:
    """Return the sum of squared gradients of a block's output norm by one of its parameters."""
    total = torch.zeros_like(weight)
    weight.requires_grad_()
    for hidden_BTD, arguments in inputs:
        output = module(hidden_BTD, *arguments.args, **arguments.kwargs)
        output = output[0] if isinstance(output, tuple) else output
        (gradient,) = torch.autograd.grad((output**2).sum().sqrt(), weight)
        total += gradient**2
    weight.requires_grad_(False)
    return total


def scores(weight: Rows, gradients: Sequence[Rows]) -> Mapping[str, list[list[float]]]:
    """Return the scores that read gradients of the loss alone, weight by weight."""
    num = len(gradients)

    def each(fn: Any) -> list[list[float]]:
        return [
            [fn(w, [g[i][j] for g in gradients]) for j, w in enumerate(row)]
            for i, row in enumerate(weight)
        ]

    return {
        "snip": each(lambda w, gs: abs(w * math.fsum(gs) / num)),
        "taylor": each(lambda w, gs: math.fsum(abs(w * g) for g in gs) / num),
        "fisher": each(lambda w, gs: 0.5 * w * w * math.fsum(g * g for g in gs) / num),
    }
