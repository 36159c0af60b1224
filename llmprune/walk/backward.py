"""Gradients of the loss by every weight, one block in memory at a time.

A forward walk keeps what every block is given, sequence by sequence. The head makes the gradient by
what the last block returns; then the blocks come in reverse, each is computed again, and passes the
gradient on. Sequences stay apart, because a square of a gradient is one of a single sequence.

In float16 a gradient is held times a power of two: below 6e-8 it would vanish, and a mean over
thousands of tokens and words makes it that small. Such factors are exact in both directions.
Legend: N sequences, B = 1 sequence, T tokens, D hidden size, V vocabulary, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from llmprune.base.errors import NumericalError
from llmprune.base.memory import return_freed
from llmprune.calibration.hidden import HiddenStates, Place
from llmprune.calibration.replay import Arguments, call, head
from llmprune.stats import STATISTICS
from llmprune.stats.gradients import GradientMoment
from llmprune.stats.types import Stats
from llmprune.walk.block import Block, Blocks
from llmprune.walk.forward import LOGITS, check_activation, embed

if TYPE_CHECKING:
    from torch import Tensor

    Sums = Mapping[str, Sequence[GradientMoment]]

_HEADROOM = 4  # float16 gradients are held between 2**3 and 2**4 ...
_STEP = 4  # ... and this many powers lower after each overflow of what follows from them
_LOWEST = 40


class Scaled(NamedTuple):
    """A gradient times two to the power of `exponent`; other dtypes than float16 need none."""

    value: Tensor
    exponent: int = 0


@dataclass(frozen=True, kw_only=True)
class Tape:
    """What every block is given, by sequence; `hidden[-1]` is what the last returns.

    Behind a backward walk stand gradients in the place of hidden states, times two to the power of
    the sequence's exponent.
    """

    hidden: Sequence[HiddenStates]
    arguments: Sequence[Sequence[Arguments]]
    exponents: list[int]

    def __len__(self) -> int:
        return len(self.exponents)

    def upstream(self, block: Block, sequence: int, output: Tensor) -> Scaled:
        """Return the gradient by what a block returns, `output`."""
        value = self.hidden[block.index + 1].get(sequence, block.device)
        return Scaled(value, self.exponents[sequence])

    def write(self, index: int, sequence: int, gradient: Scaled) -> None:
        """Put the gradient by what block `index` is given in that one's place."""
        self.hidden[index].set(sequence, gradient.value)
        self.exponents[sequence] = gradient.exponent


def backward_survey(
    blocks: Blocks,
    tokens_NT: Tensor,
    needs: Sequence[str],
    linears_of: Callable[[int], Sequence[str]],
    *,
    before: Callable[[int], Mapping[str, Stats]] = lambda index: {},
    start: int = 0,
    place: Place = "host",
    folder: Path | None = None,
    chunk: int | None = None,
    told: Callable[[str], None] = lambda label: None,
) -> Iterator[tuple[int, dict[str, Stats]]]:
    """Yield (block, statistics by linear) of the gradients of sequences, the last block first.

    The loss of a sequence is its mean next-token cross-entropy. One block is open at a time, and
    none while the caller holds the statistics of one. The walk ends at the first block that has
    linears to look at. Inputs of blocks take up (blocks + 1) * N * T * D values at `place`.

    Args:
        needs: names of statistics of gradients (`observe="backward"`).
        linears_of: the linears to look at, by block; names relative to it.
        before: what earlier sequences gave of a block, `{}` where they gave nothing; sums go on
            from there, and end in the same bits however sequences are parted.
        start: the number of the first of `tokens_NT` among all sequences. Those that `before` of a
            block counts already are passed through it, and not added again.
        chunk: how many positions go through the head at once; as many as `LOGITS` values, if None.
        told: called with a label after each block, in both directions.

    Raises:
        NumericalError: an activation or a gradient is not finite; names the block.
        ValueError: sequences of one token have no next one.
    """
    if tokens_NT.shape[-1] < 2:
        raise ValueError("a sequence of one token has no next one, and so no loss")
    lowest = min((i for i in range(len(blocks)) if linears_of(i)), default=len(blocks))
    with recorded(blocks, tokens_NT, place=place, folder=folder, told=told) as tape:
        seed_with_loss(blocks, tape, tokens_NT, chunk=chunk)
        for index in reversed(range(lowest, len(blocks))):
            sums, seen = _sums(needs, linears_of(index), before(index), blocks.device)
            with blocks.open(index) as block:
                skip = max(0, seen - start)
                pull_back(block, tape, sums, skip=skip, further=index > lowest)
                _check_sums(block, sums)
            tape.hidden[index + 1].close()
            return_freed()
            told(f"block {index} backward")
            found = {linear: joined(moments) for linear, moments in sums.items()}
            del sums
            yield index, found
            del found  # before those of the next block


@contextmanager
def recorded(
    blocks: Blocks,
    tokens_NT: Tensor,
    *,
    place: Place = "host",
    folder: Path | None = None,
    told: Callable[[str], None] = lambda label: None,
) -> Iterator[Tape]:
    """Walk sequences forward, one at a time, and yield what every block was given.

    Raises:
        NumericalError: the output of a block is not finite.
    """
    folders = [folder and folder / f"block-{index:05d}" for index in range(len(blocks) + 1)]
    first = embed(blocks, tokens_NT, 1, place=place, folder=folders[0])
    hidden = [first.hidden]
    try:
        for index in range(len(blocks)):
            hidden.append(HiddenStates(place, folders[index + 1]))
            with torch.no_grad(), blocks.open(index) as block:
                for sequence, arguments in enumerate(first.arguments):
                    given = hidden[index].get(sequence, block.device)
                    output = call(block.module, given, arguments[index])
                    check_activation(output, f"output of block {index}")
                    hidden[index + 1].append(output)
            told(f"block {index} forward")
        yield Tape(hidden=hidden, arguments=first.arguments, exponents=[0] * len(tokens_NT))
    finally:
        for states in hidden:
            states.close()
        if folder is not None and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def seed_with_loss(
    blocks: Blocks, tape: Tape, tokens_NT: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Replace what the last block returned by the gradient of each sequence's loss.

    Logits and loss are made in pieces of `chunk` positions (of at most `LOGITS` values, if None),
    the loss in float32 (float64 of float64 logits). Returns the losses, float64 (N,), on the host.

    Raises:
        NumericalError: a gradient is not finite.
    """
    vocab = blocks.model.config.get_text_config().vocab_size
    size = chunk or max(1, LOGITS // vocab)
    last = len(tape.hidden) - 1
    losses_N = torch.zeros(len(tape), dtype=torch.float64)
    with blocks.trunk(head=True) as model:
        for sequence, ids_T in enumerate(tokens_NT.to(blocks.device)):
            hidden_BTD = tape.hidden[last].get(sequence, blocks.device)
            gradient_BTD = torch.zeros_like(hidden_BTD)
            num = len(ids_T) - 1
            is_half = hidden_BTD.dtype == torch.float16
            exponent = _HEADROOM + math.ceil(math.log2(num)) if is_half else 0
            for start in range(0, num, size):
                stop = min(start + size, num)
                part_BtD = hidden_BTD[..., start:stop, :].detach().requires_grad_()
                with torch.enable_grad():
                    found = head(model, blocks.modules, part_BtD, returns=blocks.family.returns)
                    logits_tV = found.reshape(-1, found.shape[-1])
                    logits_tV = logits_tV.to(torch.promote_types(found.dtype, torch.float32))
                    targets_t = ids_T[start + 1 : stop + 1]
                    loss = cross_entropy(logits_tV, targets_t, reduction="sum") / num
                    (gradient,) = torch.autograd.grad(loss * 2.0**exponent, part_BtD)
                gradient_BTD[..., start:stop, :] = gradient
                losses_N[sequence] += float(loss.detach())
            _check_gradient(gradient_BTD, f"what block {last - 1} returns")
            tape.write(last, sequence, _held(Scaled(gradient_BTD, exponent)))
    return losses_N


def pull_back(block: Block, tape: Tape, sums: Sums, *, skip: int = 0, further: bool = True) -> None:
    """Add the gradients by a block's linears to their sums, and pass the gradient on.

    Args:
        sums: what each linear's gradients are added to.
        skip: how many of the first sequences are passed on only.
        further: whether the gradient by what the block is given is wanted; it takes that one's
            place.

    Raises:
        NumericalError: the gradient that is passed on is not finite.
    """
    with differentiable(block, sums) as params:
        for sequence in range(len(tape)):
            learns = sequence >= skip
            if not learns and not further:
                continue
            hidden_BTD = tape.hidden[block.index].get(sequence, block.device).detach()
            wanted = list(params.values()) if learns else []
            if further:
                wanted.append(hidden_BTD.requires_grad_())
            seed = partial(tape.upstream, block, sequence)
            arguments = tape.arguments[sequence][block.index]
            found, exponent = pull(block, hidden_BTD, arguments, wanted, seed)
            if further:
                passed = found.pop()
                passed = torch.zeros_like(hidden_BTD) if passed is None else passed
                _check_gradient(passed, f"what block {block.index} is given")
                tape.write(block.index, sequence, _held(Scaled(passed, exponent)))
            if learns:
                give(block, dict(zip(params, found, strict=True)), exponent, sums)


@contextmanager
def differentiable(block: Block, linears: Mapping[str, object]) -> Iterator[dict[str, Tensor]]:
    """Let gradients be taken by the parameters of these linears alone; yield them by name."""
    wanted = block.params_of(set(linears))
    params = dict(block.module.named_parameters())
    before = {name: param.requires_grad for name, param in params.items()}
    try:
        for name, param in params.items():
            param.requires_grad_(name in wanted)
        yield {name: param for name, param in params.items() if name in wanted}
    finally:
        for name, param in params.items():
            param.requires_grad_(before[name])


def pull(
    block: Block,
    hidden_BTD: Tensor,
    arguments: Arguments,
    wanted: Sequence[Tensor],
    seed: Callable[[Tensor], Scaled],
) -> tuple[list[Tensor | None], int]:
    """Compute a block and return the gradients by `wanted` that follow from one by its output.

    `seed(output)` says which. None stands for what the output does not depend on. The gradients are
    times two to the power of the number beside them: in float16 it is lowered until none overflows.
    """
    lowered = 0
    while True:
        with torch.enable_grad():
            output = call(block.module, hidden_BTD, arguments)
        upstream = seed(output.detach())
        value = upstream.value * 2.0**-lowered if lowered else upstream.value
        found: list[Tensor | None] = list(
            torch.autograd.grad(output, wanted, value, allow_unused=True)
        )
        is_half = output.dtype == torch.float16
        if not is_half or lowered >= _LOWEST or all(_is_finite(each) for each in found):
            return found, upstream.exponent - lowered
        del output, found
        lowered += _STEP


def give(block: Block, gradients: Mapping[str, Tensor | None], exponent: int, sums: Sums) -> None:
    """Add one sequence's gradients, by parameter, to the sums of their linears.

    A parameter without one (an expert that no token of the sequence reached) adds zeros.
    """
    for name, moments in sums.items():
        linear = block.anatomy.linears[name]
        gradient = gradients[linear.param]
        if gradient is None:
            param = block.module.get_parameter(linear.param)
            gradient = param.new_zeros(()).expand(param.shape)
        gradient_OI = linear.view(gradient)
        if exponent:
            gradient_OI = gradient_OI.float() * 2.0**-exponent
        for moment in moments:
            moment.update(gradient_OI)


def joined(moments: Sequence[GradientMoment]) -> Stats:
    """Return the statistics of one linear together."""
    results = [moment.result() for moment in moments]
    values = {key: value for result in results for key, value in result.values.items()}
    return Stats(num_tokens=0, values=values, num_sequences=results[0].num_sequences)


def _sums(
    needs: Sequence[str],
    linears: Sequence[str],
    before: Mapping[str, Stats],
    device: torch.device,
) -> tuple[dict[str, list[GradientMoment]], int]:
    """Return what gradients are added to, and how many sequences are in there already."""
    sums: dict[str, list[GradientMoment]] = {}
    seen = 0
    for linear in linears:
        sums[linear] = []
        for need in needs:
            moment = STATISTICS[need].accumulator()
            assert isinstance(moment, GradientMoment), need
            if linear in before:
                moment.begin_with(before[linear], device)
                seen = before[linear].num_sequences
            sums[linear].append(moment)
    return sums, seen


def _held(gradient: Scaled) -> Scaled:
    """Return a gradient at a power of two where float16 has room on both sides of it."""
    if gradient.value.dtype != torch.float16:
        return gradient
    _, power = math.frexp(float(gradient.value.abs().max()))
    shift = _HEADROOM - power
    return Scaled(gradient.value * 2.0**shift, gradient.exponent + shift)


def _is_finite(gradient: Tensor | None) -> bool:
    if gradient is None:
        return True
    low, high = torch.aminmax(gradient)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def _check_gradient(gradient: Tensor, by_what: str) -> None:
    """Raise where a gradient that is passed on is not finite."""
    if not _is_finite(gradient):
        raise not_finite(by_what)


def _check_sums(block: Block, sums: Sums) -> None:
    """Raise where a sum of gradients is not finite."""
    for linear, moments in sums.items():
        for moment in moments:
            if not all(_is_finite(value) for value in moment.result().values.values()):
                raise not_finite(f"{block.prefix}{linear} ({moment.name})")


def not_finite(by_what: str) -> NumericalError:
    """Return the error for a gradient with NaN or infinity."""
    return NumericalError(
        f"the gradient by {by_what} holds NaN or infinity. In float16 large gradients overflow: "
        "use --dtype bfloat16 or float32; otherwise the checkpoint is damaged, or choose a method "
        "that takes no gradients, such as --method wanda."
    )
