"""Regional optimisation: small steps towards the dense block's output, and a cut after each round.

All weights of the pruned linears move, zeros too, so that a later round may keep others; the cut
at the end makes zeros of what is pruned. Legend: B sequences, T tokens, D hidden size.

Source: Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients (RO).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llmprune.calibration.replay import call
from llmprune.repair.fitting import split
from llmprune.repair.types import Repair, Work
from llmprune.solver.types import Fact
from llmprune.stats.precision import wide_sum
from llmprune.walk.backward import differentiable
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.calibration.hidden import HiddenStates

DECAY = 0.99  # of the mean square of gradients
EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The micro-batches of every round, those held out, and what the dense block gives of each.

    `places` says where in `dense` the output of a micro-batch is.
    """

    rounds: tuple[tuple[int, ...], ...]
    held: tuple[int, ...]
    dense: HiddenStates
    places: Mapping[int, int]

    def target(self, batch: int, block: Block) -> Tensor:
        """Return what the dense block gives of a micro-batch, float32 (B, T, D)."""
        return self.dense.get(self.places[batch], block.device).float()


def watch_regional(block: Block, stream: Stream, options: Mapping[str, float], seed: int) -> Drawn:
    """Draw micro-batches (of one sequence each, as the paper has them) and run the dense block."""
    train, held = split(len(stream))
    generator = torch.Generator().manual_seed(seed)
    size = min(len(train), int(options["samples"]))
    rounds = tuple(
        tuple(train[i] for i in torch.randperm(len(train), generator=generator)[:size].tolist())
        for _ in range(int(options["rounds"]))
    )
    wanted = sorted({*held, *(batch for each in rounds for batch in each)})
    dense = stream.hidden.beside("targets")
    with torch.no_grad():
        for batch in wanted:
            hidden_BTD = stream.hidden.get(batch, block.device)
            output = call(block.module, hidden_BTD, stream.arguments[batch][block.index])
            dense.append(output.clone())
    places = {batch: place for place, batch in enumerate(wanted)}
    return Drawn(rounds=rounds, held=tuple(held), dense=dense, places=places)


def repair_regional(work: Work) -> dict[str, Fact]:
    """Take rounds of steps, each followed by a new cut; take all back where held-out error rises.

    One step of RMSprop per micro-batch on ||f_dense(X) - f_sparse(X)||^2, in float32. The mean
    squares of gradients go on from round to round.
    """
    drawn: Drawn = work.seen
    try:
        before = _error(work, drawn.held)
        first = {name: p.detach().clone() for name, p in work.block.module.named_parameters()}
        squares: dict[str, Tensor] = {}
        masters: dict[str, Tensor] = {}
        linears: Collection[str] = work.keep.keys()
        for batches in drawn.rounds:
            _optimise(work, linears, batches, squares, masters)
            linears = work.decide().keys()
        after = _error(work, drawn.held)
        accepted = after <= before
        if not accepted:
            work.undo()
            for name, value in first.items():
                work.block.module.get_parameter(name).data = value
    finally:
        drawn.dense.close()
    return {
        "block.error_before": before,
        "block.error_after": after if accepted else before,
        "block.accepted": accepted,
    }


def _optimise(
    work: Work,
    linears: Collection[str],
    batches: Collection[int],
    squares: dict[str, Tensor],
    masters: dict[str, Tensor],
) -> None:
    """Take one step per micro-batch.

    `squares` are the mean squares of gradients by parameter, and `masters` the parameters in
    float32: both go on from round to round, because half precision holds no single step.
    """
    block, rate = work.block, work.options["learning_rate"]
    with differentiable(block, dict.fromkeys(linears)) as params:
        for name, param in params.items():
            whole = param.detach().float()  # in float32 the parameter itself
            if name in masters and param.dtype != torch.float32:  # go on but for what was pruned
                same = masters[name].to(param.dtype) == param.detach()
                whole = torch.where(same, masters[name], whole)
            masters[name] = whole
        moving = {name: _moving(block, name, linears) for name in params}
        for batch in batches:
            for name, gradient in _gradients(work, params, batch).items():
                square = squares.setdefault(name, torch.zeros_like(gradient))
                square.mul_(DECAY).addcmul_(gradient, gradient, value=1 - DECAY)
                step = gradient.div_(square.sqrt().add_(EPS)).mul_(moving[name])
                masters[name].sub_(step, alpha=rate)
                if params[name].dtype != torch.float32:
                    params[name].data.copy_(masters[name])


def _gradients(work: Work, params: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Return the gradients of the squared error of one micro-batch, float32."""
    hidden_BTD = work.stream.hidden.get(batch, work.block.device)
    with torch.enable_grad():
        output = call(work.block.module, hidden_BTD, work.stream.arguments[batch][work.block.index])
        difference = output.float() - work.seen.target(batch, work.block)
        loss = difference.square().sum()
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(param, dtype=torch.float32) if grad is None else grad.float()
        for (name, param), grad in zip(params.items(), found, strict=True)
    }


def _moving(block: Block, name: str, linears: Collection[str]) -> Tensor:
    """Return where a parameter may change: in the linears named, which may be parts of it."""
    mask = torch.zeros_like(block.module.get_parameter(name), dtype=torch.bool)
    for linear in linears:
        found = block.anatomy.linears[linear]
        if found.param == name:
            found.view(mask).fill_(True)
    return mask


def _error(work: Work, batches: Collection[int]) -> float:
    """Return the relative error of the block's output over micro-batches."""
    off = size = 0.0
    with torch.no_grad():
        for batch in batches:
            hidden_BTD = work.stream.hidden.get(batch, work.block.device)
            arguments = work.stream.arguments[batch][work.block.index]
            target = work.seen.target(batch, work.block)
            output = call(work.block.module, hidden_BTD, arguments).float()
            off += float(wide_sum((output - target).square()))
            size += float(wide_sum(target.square()))
    return math.sqrt(off / size) if size else 0.0


REGIONAL = Repair(
    watch=watch_regional,
    fn=repair_regional,
    passes=lambda options: 4 * (options["rounds"] + 1),  # of observing, and of gradients
    paper="Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients",
    options={"rounds": 5.0, "samples": 32.0, "learning_rate": 3e-7},
)
