"""Training a block after the cut until its output, or that of a part, comes near a target.

What moves is its kept weights, or what else a repair makes parameters of; pruned ones stay 0. Of
the micro-batches the last ones are held out: what does not lower the error on them is taken back.
Legend: B sequences of a micro-batch, T tokens, D hidden size, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmprune.calibration.replay import call
from llmprune.stats.precision import wide_sum
from llmprune.walk.backward import differentiable
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.calibration.hidden import HiddenStates
    from llmprune.walk.forward import Stream

WARM_UP = 0.05  # of all steps
BETAS = (0.9, 0.95)
EPS = 1e-10
HELD = 8  # one of so many micro-batches is held out
QUIET = 0.1  # a token with less than this share of the median energy weighs no more for it
_HALF_POWER = 4  # the largest value of a gradient in float16: two to this power


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long and how fast to train.

    One step sees `sequences` sequences, and the learning rate is `rate` times the root mean square
    of the kept weights of each parameter; it rises linearly, then falls along a cosine.
    """

    epochs: float
    rate: float
    sequences: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The relative error of the held-out output before and after; less than 1 in good cases."""

    before: float
    after: float
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a part of a block is to give: `target`, where its own module, or the block, returns.

    `part` is the path of a module in the block; none for the block itself.
    """

    stream: Stream
    target: HiddenStates
    part: str | None = None

    def difference(self, block: Block, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the part gives of a micro-batch, how far it is off, and the tokens' weights.

        An error counts relative to what a token's target measures, in squares: a few tokens carry
        outputs a thousand times the others'.
        """
        hidden_BTD = self.stream.hidden.get(batch, block.device)
        output = output_of(block, hidden_BTD, self.stream.arguments[batch][block.index], self.part)
        target = self.target.get(batch, block.device).float()
        energy = target.square().mean(dim=-1, keepdim=True)
        least = QUIET * float(energy.median()) or torch.finfo(torch.float32).tiny
        return output, output.detach().float() - target, energy.clamp_(min=least).reciprocal_()


class _Reached(Exception):
    """Leaves a block once the part of interest has its output."""


def output_of(block: Block, hidden_BTD: Tensor, arguments: Any, part: str | None) -> Tensor:
    """Return what a part gives within its block, or the block; what follows a part is not run."""
    if part is None:
        return call(block.module, hidden_BTD, arguments)
    found: list[Tensor] = []

    def leave(module: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple | list) else output)
        raise _Reached

    hook = block.module.get_submodule(part).register_forward_hook(leave)
    try:
        call(block.module, hidden_BTD, arguments)
    except _Reached:
        return found[0]
    finally:
        hook.remove()
    raise ValueError(f"block {block.index} never called {part}")


def split(num_batches: int) -> tuple[range, range]:
    """Return the micro-batches to train with, and those held out; a single one does both.

    >>> split(16)
    (range(0, 14), range(14, 16))
    """
    held = max(1, num_batches // HELD)
    train = range(num_batches - held) if num_batches > held else range(num_batches)
    return train, range(num_batches - held, num_batches)


class Moves(Protocol):
    """What is trained of a block: it makes new parameters of gradients.

    `kept` says by parameter where its gradient counts; other parameters have none.
    """

    @property
    def kept(self) -> Mapping[str, Tensor]: ...

    def step(self, gradients: dict[str, Tensor], step: int, total: int) -> None:
        """Take one of `total` steps, the first of which is 0; the block's parameters follow.

        Gradients, by parameter and float32, are of the squared error in units of what it was.
        """


def fit(
    block: Block, keep: Mapping[str, Tensor], goal: Goal, pace: Pace, moves: Moves | None = None
) -> Fitted:
    """Train these linears in place towards a goal: all their kept weights, or what `moves`.

    Where the error on what is held out does not fall, they are as they were. The same seed, threads
    and micro-batches give the same weights.
    """
    train, held = split(len(goal.stream))
    before = error_of(block, goal, held)
    if not keep or not 0 < before < math.inf:
        return Fitted(before=before, after=before, accepted=False)
    with differentiable(block, keep):
        moves = moves or KeptWeights(block, keep, pace.rate)
        params = {name: block.module.get_parameter(name) for name in moves.kept}
        start = {name: param.detach().clone() for name, param in params.items()}
        for param in params.values():
            param.requires_grad_(True)
        _train(block, params, moves, goal, pace, train, before)
        after = error_of(block, goal, held)
        if not after < before:
            for name, param in params.items():
                param.data.copy_(start[name])
            return Fitted(before=before, after=before, accepted=False)
    return Fitted(before=before, after=after, accepted=True)


def error_of(block: Block, goal: Goal, batches: Collection[int]) -> float:
    """Return the root mean square relative error of the tokens of some micro-batches."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            _, difference, weight = goal.difference(block, batch)
            each = difference.square().mean(dim=-1, keepdim=True) * weight
            total += float(wide_sum(each))
            tokens += each.numel()
    return math.sqrt(total / max(1, tokens))


class KeptWeights:
    """Moves all kept weights of linears, by Adam.

    They are held in float32, apart from parameters that are: those they share memory with.
    """

    def __init__(self, block: Block, keep: Mapping[str, Tensor], rate: float) -> None:
        wanted = block.params_of(set(keep))
        self.params = {n: p.data for n, p in block.module.named_parameters() if n in wanted}
        self.masters = {name: param.float() for name, param in self.params.items()}
        self.kept = {name: kept_in(block, name, keep) for name in self.masters}
        self.rates = {n: rate * spread(m, self.kept[n]) for n, m in self.masters.items()}
        self.adam = Adam()

    def step(self, gradients: dict[str, Tensor], step: int, total: int) -> None:
        """Take one step with every parameter."""
        for name, master in self.masters.items():
            rate = self.rates[name] * _speed(step, total)
            self.adam.step(name, master, gradients.pop(name), rate, step + 1)
        for name, master in self.masters.items():
            if master.data_ptr() != self.params[name].data_ptr():
                self.params[name].copy_(master)


class Adam:
    """The moments of gradients by name, and the steps that follow from them."""

    def __init__(self) -> None:
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def step(self, name: str, value: Tensor, gradient: Tensor, rate: float, number: int) -> None:
        """Take the step of a number, the first of which is 1, in place."""
        if name not in self.moments:
            self.moments[name] = (torch.zeros_like(value), torch.zeros_like(value))
        _adam(value, gradient, self.moments[name], rate, number)

    def hold(self, name: str, kept: Tensor) -> None:
        """Forget the gradients of what is not kept, so that it stays where it is."""
        for moment in self.moments.get(name, ()):
            moment.mul_(kept)


def kept_in(block: Block, name: str, keep: Mapping[str, Tensor]) -> Tensor:
    """Return where a parameter may change: kept weights of the linears named, nothing else."""
    mask = torch.zeros_like(block.module.get_parameter(name), dtype=torch.bool)
    for linear, keep_OI in keep.items():
        found = block.anatomy.linears[linear]
        if found.param == name:
            found.view(mask).copy_(keep_OI)
    return mask


def spread(value: Tensor, kept: Tensor) -> float:
    """Return the root mean square of the weights that may change."""
    number = int(kept.count_nonzero())
    total = float(wide_sum((value * kept).square()))
    return math.sqrt(total / number) if number else 0.0


def _train(
    block: Block,
    params: Mapping[str, Tensor],
    moves: Moves,
    goal: Goal,
    pace: Pace,
    train: range,
    scale: float,
) -> None:
    """Take all steps."""
    size = goal.stream.hidden.get(train[0], block.device).shape[-3]
    group = min(len(train), max(1, pace.sequences // size))
    total = max(1, round(len(train) // group * pace.epochs))
    orders = _orders(train, group, pace.seed)
    for step in range(total):
        found = _gradients(block, params, moves.kept, goal, next(orders), scale)
        moves.step(found, step, total)


def _adam(
    weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: float, step: int
) -> None:
    """Take one step in place; where gradients have always been 0 nothing moves.

    By hand because the library's loads its compiler for it, which takes seconds and memory.
    """
    mean, square = moments
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    size = square.div(1 - BETAS[1] ** step).sqrt_().add_(EPS)
    weight.addcdiv_(mean, size, value=-rate / (1 - BETAS[0] ** step))


def _speed(step: int, total: int) -> float:
    """Return the share of the learning rate at a step."""
    rising = (step + 1) / max(1.0, WARM_UP * total)
    return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def _orders(train: range, group: int, seed: int) -> Iterator[list[int]]:
    """Yield groups of micro-batches for ever; every epoch has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
        for start in range(0, len(order) - group + 1, group):
            yield order[start : start + group]


def _gradients(
    block: Block,
    params: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    goal: Goal,
    batches: list[int],
    scale: float,
) -> dict[str, Tensor]:
    """Return the gradients of the squared error, in units of what it was before; 0 where pruned."""
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}
    for batch in batches:
        with torch.enable_grad():
            output, difference, weight = goal.difference(block, batch)
        upstream = difference * weight * (2 / (difference.numel() * scale**2 * len(batches)))
        lift = _lift(output, upstream)
        found = torch.autograd.grad(
            output, list(params.values()), (upstream * lift).to(output.dtype), allow_unused=True
        )
        del output, difference, upstream
        for (name, total), gradient in zip(sums.items(), found, strict=True):
            if gradient is not None:
                total.add_(gradient.float().mul_(kept[name]), alpha=1 / lift)
    return sums


def _lift(output: Tensor, upstream: Tensor) -> float:
    """Return the power of two that a gradient is held times: float16 has little room below 1."""
    largest = float(upstream.abs().max()) if output.dtype == torch.float16 else 0.0
    return 2.0 ** (_HALF_POWER - math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0
