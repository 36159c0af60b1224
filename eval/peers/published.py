"""Prune in memory by the papers' formulas, as published scripts work: the plain way, for its cost.

One sequence at a time; a hook, a statistic and a Gram matrix of its own per linear; whole rows and
whole column blocks sorted; a forward to collect and a forward to go on for every block.
Legend: O out, I in, B columns of a block, T tokens of a sequence, D width.
Sources: Wanda (Sun et al. 2023, equation 1), SparseGPT (Frantar and Alistarh 2023, algorithm 1).
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from runner import answer, calibration, share_and_groups
from torch import Tensor, nn

COLUMNS = 128
DAMPING = 0.01


def wanda(weight_OI: Tensor, square_sum_I: Tensor, share: float, kept: int, group: int) -> Tensor:
    """Zero what has the least |weight| x norm of its input in every row, or in every group."""
    score_OI = weight_OI.abs() * square_sum_I.sqrt()
    gone_OI = torch.zeros_like(score_OI, dtype=torch.bool)
    if group:
        for first in range(0, score_OI.shape[1], group):
            order = score_OI[:, first : first + group].sort(dim=1, stable=True).indices
            gone_OI.scatter_(1, first + order[:, : group - kept], True)
    else:
        order = score_OI.sort(dim=1, stable=True).indices
        gone_OI.scatter_(1, order[:, : int(score_OI.shape[1] * share)], True)
    return weight_OI.masked_fill(gone_OI, 0.0)


def sparsegpt(weight_OI: Tensor, gram_II: Tensor, share: float, kept: int, group: int) -> Tensor:
    """Remove weights column by column; what is to the right makes up for each."""
    weight_OI, hessian_II = weight_OI.clone(), gram_II.clone()
    diagonal_I = hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1.0
    weight_OI[:, dead_I] = 0.0
    diagonal_I += DAMPING * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    for first in range(0, weight_OI.shape[1], COLUMNS):
        last = min(first + COLUMNS, weight_OI.shape[1])
        factor_BB = factor_II[first:last, first:last]
        block_OB = weight_OI[:, first:last]
        error_OB = sweep(block_OB, factor_BB, share, kept, group)
        weight_OI[:, last:] -= error_OB @ factor_II[first:last, last:]
    return weight_OI


def sweep(block_OB: Tensor, factor_BB: Tensor, share: float, kept: int, group: int) -> Tensor:
    """Go through the columns of one block in place; return the errors (O, B)."""
    pivot_B = factor_BB.diagonal()
    gone_OB = torch.zeros_like(block_OB, dtype=torch.bool)
    if not group:
        score_OB = (block_OB / pivot_B).square()
        order = score_OB.flatten().sort(stable=True).indices
        gone_OB.view(-1)[order[: int(score_OB.numel() * share)]] = True
    error_OB = torch.zeros_like(block_OB)
    for column in range(block_OB.shape[1]):
        if group and column % group == 0:
            span = slice(column, column + group)
            score_OM = (block_OB[:, span] / pivot_B[span]).square()
            order = score_OM.sort(dim=1, stable=True).indices
            gone_OB.scatter_(1, column + order[:, : group - kept], True)
        stays_O = block_OB[:, column].masked_fill(gone_OB[:, column], 0.0)
        error_O = (block_OB[:, column] - stays_O) / pivot_B[column]
        block_OB[:, column:] -= error_O[:, None] * factor_BB[column, column:]
        block_OB[:, column] = stays_O
        error_OB[:, column] = error_O
    return error_OB


def watch(linears: dict[str, nn.Linear], method: str) -> tuple[dict[str, Tensor], list[Any]]:
    """Hook every linear; return the sums that fill and the handles to take off."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            more = seen_TI.square().sum(0) if method == "wanda" else seen_TI.T @ seen_TI
            sums[name] = sums[name] + more if name in sums else more

        return add

    return sums, [linear.register_forward_hook(hook(name)) for name, linear in linears.items()]


class Reached(Exception):
    """Leaves a forward at the first block."""


def entrance(model: Any, ids_NT: Tensor) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return what block 0 is given for every sequence: hidden (1, T, D), other arguments."""
    hidden, arguments = [], []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        arguments.append(kwargs)
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids_T in ids_NT:
        try:
            model(ids_T[None], use_cache=False)
        except Reached:
            continue
    handle.remove()
    return hidden, arguments


@torch.no_grad()
def prune(model: Any, ids_NT: Tensor, method: str, share: float, kept: int, group: int) -> None:
    """Prune the linears of all blocks in place, each block on what the pruned ones before give."""
    hidden, arguments = entrance(model, ids_NT)
    solve = wanda if method == "wanda" else sparsegpt
    for block in model.model.layers:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums, handles = watch(linears, method)
        for hidden_1TD, given in zip(hidden, arguments, strict=True):
            block(hidden_1TD, **given)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            changed_OI = solve(linear.weight.float(), sums.pop(name), share, kept, group)
            linear.weight.copy_(changed_OI)
        hidden = [block(h, **given) for h, given in zip(hidden, arguments, strict=True)]


def run(asked: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    ids_NT = calibration(asked)
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).eval()
    start, cpu = time.perf_counter(), time.process_time()
    prune(model, ids_NT, asked.method, *share_and_groups(asked.pattern))
    engine, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save_pretrained(asked.out)
    return {
        "engine": engine,
        "engine_cpu": cpu,
        "batch": 1,
        "result": str(asked.out),
        "version": "formulas",
    }


if __name__ == "__main__":
    answer(run, __doc__.splitlines()[0])
