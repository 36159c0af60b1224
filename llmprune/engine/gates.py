"""Learned gates: for every unit the chance that it stays, trained with the weights frozen.

What is left shall say what the dense model said. In every step a few sequences pass a model whose
units are drawn by their chances, and the gradient of KL(dense || gated) comes back block by block;
a gate's gradient is that of its columns in the linear that reads the unit. One block is in memory
at a time. Chances live as logits: each moves against its gradient for a weight, then all move
together until the weights that are expected to stay are as many as the step's goal, which falls to
what is asked.

Gates are drawn, mostly 0 or 1, since a gate that only scales costs nothing: the next norm undoes
it, and all gates sink side by side.

Source: Zhang et al., EcoDiff (masks learnt against the dense model's output, weights frozen);
Louizos et al., Learning Sparse Neural Networks through L0 Regularization (the hard concrete draw);
the step is mirror descent under a budget, as in Beck and Teboulle, 2003.
Legend: N sequences, B = 1 sequence, T tokens, D hidden size, V vocabulary, U units, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.types import Family
from llmprune.base.progress import Progress
from llmprune.calibration.replay import head
from llmprune.checkpoint.sink import write_tensors
from llmprune.engine.sites import Group
from llmprune.engine.units import is_deep
from llmprune.stats.types import Stats
from llmprune.walk.backward import Scaled, Tape, differentiable, pull, recorded
from llmprune.walk.block import Block, Blocks
from llmprune.walk.forward import LOGITS, embed, walk

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 4  # sequences of a step
FIRST = 2.5  # the logit of every chance at the start
RATES = 0.3, 0.03  # how far logits move in the first step and in the last, root mean square
INERTIA = 0.9  # share of the former direction that a step keeps
FALL = 0.6  # share of the steps in which the goal falls
MOST = 6.0  # logits stay within it, so that a unit can come back
HEAT, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard concrete distribution, as published


@dataclass(frozen=True, kw_only=True)
class Gated:
    """Blocks whose readers of units are multiplied by gates when they are opened."""

    blocks: Blocks
    groups: Sequence[Sequence[Group]]
    gates: Mapping[str, Tensor]
    dense: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def model(self) -> Any:
        return self.blocks.model

    @property
    def family(self) -> Family:
        return self.blocks.family

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def modules(self) -> Any:
        return self.blocks.modules

    def trunk(self, *, head: bool) -> Any:
        return self.blocks.trunk(head=head)

    @contextmanager
    def open(self, index: int) -> Iterator[Block]:
        """Bring one block to the device, with its gates; `dense` holds its own readers' weights."""
        with self.blocks.open(index) as block:
            self.dense.clear()
            for group in gated(self.groups[index]):
                reader = str(group.coupling.reader if group.coupling else "")
                self.dense[reader] = block.weight(reader).detach().clone()
                gate_I = _columns(group, self.gates[group.sites[0].name], self.dense[reader])
                block.replace(reader, self.dense[reader] * gate_I)
            try:
                yield block
            finally:
                for reader, weight_OI in self.dense.items():
                    block.replace(reader, weight_OI)


def learn_gates(
    blocks: Blocks,
    groups: Sequence[Sequence[Group]],
    tokens_NT: Tensor,
    *,
    target: float,
    steps: int,
    progress: Progress,
    file: Path | None = None,
) -> Callable[[int], Mapping[str, Stats]]:
    """Return what gives a block's gates, as the statistic `gate` (U,) of each reader of units.

    `target` is the share of the units' weights that is to go. What is learnt is kept in `file`,
    from which a resumed run takes it. A step walks the model twice.
    """
    sites = [group.sites[0] for here in groups for group in gated(here)]
    if file is not None and file.exists():
        from safetensors.torch import load_file

        gates = load_file(file)
    else:
        gates = _trained(blocks, groups, tokens_NT, target=target, steps=steps, progress=progress)
        if file is not None:
            write_tensors(file, gates)
    assert gates.keys() == {site.name for site in sites}

    def of_block(index: int) -> dict[str, Stats]:
        found = {}
        for group in gated(groups[index]):
            gate_U = gates[group.sites[0].name]
            reader = str(group.coupling.reader if group.coupling else "")
            found[reader] = Stats(num_tokens=0, values={"gate": gate_U}, num_sequences=1)
        return found

    return of_block


def gated(groups: Sequence[Group]) -> list[Group]:
    """Return the groups of a block whose units have gates: those that a linear reads."""
    return [
        g
        for g in groups
        if g.coupling is not None and g.coupling.reader and not is_deep(g.sites[0])
    ]


def _trained(
    blocks: Blocks,
    groups: Sequence[Sequence[Group]],
    tokens_NT: Tensor,
    *,
    target: float,
    steps: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Return the chance (U,) that each unit of a site stays, after some steps of mirror descent."""
    costs = {
        group.sites[0].name: (group.sites[0].num_units, group.sites[0].unit_cost)
        for here in groups
        for group in gated(here)
    }
    each = torch.cat([torch.full((num,), float(cost)) for num, cost in costs.values()]).double()
    logit = torch.full_like(each, FIRST)
    direction = torch.zeros_like(each)
    batches = [tokens_NT[i : i + AT_ONCE] for i in range(0, len(tokens_NT), AT_ONCE)]
    dense: dict[int, list[Tensor]] = {}
    draws = torch.Generator().manual_seed(0)

    def by_site(value: Tensor) -> dict[str, Tensor]:
        return dict(zip(costs, value.split([num for num, _ in costs.values()]), strict=True))

    with progress.stage("gates", steps) as stage:
        for step in range(steps):
            at = step % len(batches)
            if at not in dense:
                dense[at] = _last_hidden(blocks, batches[at])
            now = Gated(blocks=blocks, groups=groups, gates=by_site(_drawn(logit, draws)))
            kl, slopes = _slopes(now, batches[at], dense[at])
            slope = torch.cat([slopes[name] for name in costs])
            direction = INERTIA * direction + (1 - INERTIA) * slope / each
            past = step / steps
            rate = RATES[0] * (1 - past) + RATES[1]
            fallen = min(1.0, (step + 1) / (FALL * steps))
            logit = _moved(logit, direction, each, rate=rate, kept=1 - target * fallen)
            stage.advance(f"KL {kl:.3g}")
    return {name: chance_U.clone() for name, chance_U in by_site(chance(logit)).items()}


def _drawn(logit: Tensor, draws: torch.Generator) -> Tensor:
    """Return gates between 0 and 1 drawn by the hard concrete distribution of these logits.

    A draw is exactly 0 or 1 with a good share of the chance, and between them elsewhere.
    """
    even = torch.rand(logit.shape, generator=draws, dtype=torch.float64).clamp(1e-4, 1 - 1e-4)
    return (((even.logit() + logit) / HEAT).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def chance(logit: Tensor) -> Tensor:
    """Return the chance that a drawn gate is above 0, as published.

    >>> round(float(chance(torch.tensor(0.0, dtype=torch.float64))), 4)
    0.8318
    """
    return (logit - HEAT * math.log(-LOW / HIGH)).sigmoid()


def _moved(logit: Tensor, direction: Tensor, cost: Tensor, *, rate: float, kept: float) -> Tensor:
    """Return the logits after one step: against the direction, then all by the same amount, until
    the share of the cost that is expected to stay is `kept`.

    The step's root mean square over weights is `rate`.
    """
    size = ((direction**2 * cost).sum() / cost.sum()).sqrt()
    moved = logit - rate * direction / size if size > 0 else logit

    def above(shift: float) -> bool:
        return bool((cost * chance(moved - shift)).sum() > kept * cost.sum())

    low, high = -100.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    return (moved - high).clamp(-MOST, MOST)


def _last_hidden(blocks: Blocks, tokens_NT: Tensor) -> list[Tensor]:
    """Return what the dense model's last block returns for each sequence, on the host."""
    stream = embed(blocks, tokens_NT, 1)
    walk(blocks, stream)
    found = [stream.hidden.get(i, torch.device("cpu")).clone() for i in range(len(stream))]
    stream.hidden.close()
    return found


def _slopes(
    now: Gated, tokens_NT: Tensor, dense: Sequence[Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Return KL(dense || gated), a mean over tokens, and its gradient by every gate."""
    slopes: dict[str, Tensor] = {}
    with recorded(now, tokens_NT) as tape:
        kl = _seed(now, tape, dense)
        for index in reversed(range(len(now))):
            with now.open(index) as block:
                readers = {
                    str(g.coupling.reader): g for g in gated(now.groups[index]) if g.coupling
                }
                summed = _pulled(now, block, tape, readers, further=index > 0)
                for reader, group in readers.items():
                    slopes[group.sites[0].name] = _by_unit(group, summed[reader])
            tape.hidden[index + 1].close()
    return kl, slopes


def _pulled(
    now: Gated, block: Block, tape: Tape, readers: Mapping[str, Group], *, further: bool
) -> dict[str, Tensor]:
    """Return by reader the gradient by the gates of its columns (I,), summed over sequences."""
    summed = {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in now.dense.items()}
    with differentiable(block, readers) as params:
        for sequence in range(len(tape)):
            hidden = tape.hidden[block.index].get(sequence, block.device).detach()
            wanted = [*params.values(), hidden.requires_grad_()]
            arguments = tape.arguments[sequence][block.index]

            def seed(output: Tensor, s: int = sequence) -> Scaled:
                return tape.upstream(block, s, output)

            found, exponent = pull(block, hidden, arguments, wanted, seed)
            passed = found.pop()
            if further and passed is not None:
                tape.write(block.index, sequence, Scaled(passed, exponent))
            by_param = dict(zip(params, found, strict=True))
            for name in readers:
                linear = block.anatomy.linears[name]
                gradient = by_param[linear.param]
                if gradient is not None:
                    grad_OI = linear.view(gradient).double() * 2.0**-exponent
                    summed[name] += (grad_OI * now.dense[name].double()).sum(0).cpu()
    return summed


def _seed(now: Gated, tape: Tape, dense: Sequence[Tensor]) -> float:
    """Replace what the last block returned by the gradient of the divergence; return its mean."""
    last, total = len(tape.hidden) - 1, 0.0
    vocab = now.model.config.get_text_config().vocab_size
    with now.trunk(head=True) as model:
        for sequence in range(len(tape)):
            hidden = tape.hidden[last].get(sequence, now.device)
            gradient = torch.zeros_like(hidden)
            length = hidden.shape[-2]
            size = max(1, LOGITS // vocab)
            for start in range(0, length, size):
                part = hidden[..., start : start + size, :].detach().requires_grad_()
                theirs = dense[sequence].to(now.device)[..., start : start + size, :]
                with torch.no_grad():
                    said = head(model, now.modules, theirs, returns=now.family.returns)
                    log_p = said.float().log_softmax(-1)
                with torch.enable_grad():
                    found = head(model, now.modules, part, returns=now.family.returns)
                    log_q = found.float().log_softmax(-1)
                    loss = (log_p.exp() * (log_p - log_q)).sum() / (length * len(tape))
                    (slope,) = torch.autograd.grad(loss, part)
                gradient[..., start : start + size, :] = slope
                total += float(loss.detach())
            tape.write(last, sequence, Scaled(gradient))
    return total


def _columns(group: Group, gate_U: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the gate of every column of the linear that reads units; 1 where no unit lies."""
    span = next(span for span in group.sites[0].spans if span.axis == "in")
    gate_I = torch.ones(weight_OI.shape[1], dtype=weight_OI.dtype, device=weight_OI.device)
    wide = gate_U.to(gate_I).repeat_interleave(span.width)
    gate_I[span.offset : span.offset + len(wide)] = wide
    return gate_I


def _by_unit(group: Group, slope_I: Tensor) -> Tensor:
    """Return the sum over the columns of each unit, (U,)."""
    span = next(span for span in group.sites[0].spans if span.axis == "in")
    num = group.sites[0].num_units
    return slope_I[span.offset : span.offset + num * span.width].reshape(num, -1).sum(1)
