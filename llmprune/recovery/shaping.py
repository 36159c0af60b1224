"""Masks that move while weights are trained: cut by a schedule, regrown, soft, faded, or rewound.

A cut is that of pruning, made on the model in memory as it is at that step. What a mask takes away
is zero from then on, and the optimizer forgets what it knew of a weight that changed sides.
Legend: O outputs, I inputs; keep has the shape of the parameter, which may be fused or stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

from llmprune.arch.types import Linear
from llmprune.mask.pattern import NofM, Pattern
from llmprune.recovery.attaching import Trainee
from llmprune.recovery.fading import Fade
from llmprune.recovery.regrowth import Regrowth, changed, regrown
from llmprune.recovery.saved import MOMENTS
from llmprune.recovery.schedules import progress_of
from llmprune.recovery.soft import Goal, SoftMask, goal_at, harden

if TYPE_CHECKING:
    from torch import Tensor

Rewind = Literal["none", "weights", "rate"]
Cut = Callable[[Mapping[str, Any]], Mapping[str, "Tensor"]]
_DOOMED = "doomed:"  # before the names of masks that are decided and not yet in force


class Moves(Protocol):
    """What the training loop lets move masks, at these moments of a run."""

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare for the first step, with restored masks where a run goes on."""

    def before_step(self, step: int) -> None:
        """Act before a step's forward pass."""

    def see_gradients(self, step: int) -> None:
        """Act on the gradients of a whole step, before they are masked and clipped."""

    def after_update(self, done: int) -> None:
        """Act after the optimizer, when `done` steps are finished."""

    def finish(self) -> None:
        """Leave in `Trainee.held` the masks that are to be stored."""

    def state(self) -> dict[str, Tensor]:
        """Return what a run needs to go on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a state back."""


@dataclass(kw_only=True)
class Shaping:
    """Moves the masks of a training run.

    `cuts` say before which step the model is cut anew and how: keys of a pruning wish, such as
    sparsity. `cut` does it and returns keep by parameter. With `regrow` masks are exchanged every
    `every` steps; with `soft` weights fade instead of being cut, and the last mask is by magnitude.
    With `fade` there is one cut, whose mask comes into force when what it removes has faded.
    `first` are the weights where training began, to which `rewind` returns what is kept.
    """

    trainee: Trainee
    linears: Mapping[str, Sequence[Linear]]
    steps: int
    cuts: Mapping[int, Mapping[str, Any]]
    cut: Cut
    every: int
    seed: int
    pattern: Pattern
    regrow: Regrowth | None = None
    grow_from: Literal["zero", "dense"] = "dense"
    soft: SoftMask | None = None
    fade: Fade | None = None
    options: Mapping[str, float] = field(default_factory=dict)
    sparsity: Callable[[float], float] = lambda progress: 0.0
    rewind: Rewind = "none"
    first: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    gates: dict[str, _Soft] = field(default_factory=dict)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Know the optimizer; put soft masks in place."""
        self.optimizer = optimizer
        if self.soft is not None and self.soft.at == "forward":
            for name, linears in self.linears.items():
                owner, _, leaf = name.rpartition(".")
                gate = _Soft(self, name, linears)
                module = self.trainee.plain.get_submodule(owner)
                parametrize.register_parametrization(module, leaf, gate, unsafe=True)
                self.gates[name] = gate

    def before_step(self, step: int) -> None:
        """Cut where the schedule says so, and let soft masks know how far the run is."""
        for gate in self.gates.values():
            gate.progress = progress_of(step, self.steps)
        if step in self.cuts and self.fade is not None:
            self._doom(self.fade, self.cuts[step])
        elif step in self.cuts and self.soft is None:
            with torch.no_grad():
                self.adopt(self.cut(self.cuts[step]))
            if self.rewind == "weights":
                self._rewind()

    def see_gradients(self, step: int) -> None:
        """Exchange weights by the gradients of this step, which are whole still, or add a pull."""
        if self.fade is not None:
            self.fade.see_gradients()
        if self.regrow is None or not self.trainee.held or step % self.every:
            return
        share = self.regrow.fraction(progress_of(step, self.steps))
        if share <= 0:
            return
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        within = self.pattern.m if isinstance(self.pattern, NofM) else None
        with torch.no_grad():
            for name, keep in list(self.trainee.held.items()):
                self._exchange(name, keep, share, draw, within)

    def after_update(self, done: int) -> None:
        """Let weights shrink that would go, where they fade or a soft mask says so."""
        if self.fade is not None:
            self.adopt(self.fade.after_update(done))
        if self.soft is None or self.soft.at != "update":
            return
        progress = progress_of(done - 1, self.steps)
        for name, linears in self.linears.items():
            param = self.trainee.params[name]
            for linear in linears:
                weight_OI, goal = linear.view(param.data), self.goal(name, linear, progress)
                weight_OI.copy_(self.soft.fn(weight_OI, goal, progress, **self.options))

    def finish(self) -> None:
        """Make soft masks hard, and plain weights of what they gave."""
        if self.soft is None:
            return
        keeps = {}
        with torch.no_grad():
            for name, linears in self.linears.items():
                param = self.trainee.params[name]
                keeps[name] = torch.ones_like(param, dtype=torch.bool)
                for linear in linears:
                    goal = self.goal(name, linear, 1.0)
                    linear.view(keeps[name]).copy_(harden(linear.view(param.data), goal))
                if name in self.gates:
                    owner, _, leaf = name.rpartition(".")
                    module = self.trainee.plain.get_submodule(owner)
                    parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            self.gates.clear()
            self.adopt(keeps)

    def adopt(self, keeps: Mapping[str, Tensor]) -> None:
        """Hold other masks from now on: zeros where they remove, no moments where they changed."""
        for name, keep in keeps.items():
            param, before = self.trainee.params[name], self.trainee.held.get(name)
            self._forget(param, torch.ones_like(keep) if before is None else before, keep)
            param.data.mul_(keep)
            self.trainee.held[name] = keep

    def state(self) -> dict[str, Tensor]:
        """Return the masks of now, and those that come into force once weights have faded."""
        found = {name: keep.clone() for name, keep in self.trainee.held.items()}
        doomed = {} if self.fade is None else self.fade.doomed
        return found | {_DOOMED + name: keep.clone() for name, keep in doomed.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put masks back."""
        for key, keep in state.items():
            name = key.removeprefix(_DOOMED)
            into = self.trainee.held
            if name != key:
                assert self.fade is not None
                into = self.fade.doomed
            into[name] = keep.to(self.trainee.params[name].device)

    def _doom(self, fade: Fade, differs: Mapping[str, Any]) -> None:
        """Decide what is to fade; in a window of no length it is cut at once."""
        with torch.no_grad():
            fade.decide(lambda: self.cut(differs))
            if fade.end <= fade.begin:
                self.adopt(fade.doomed)
                fade.doomed = {}

    def _exchange(
        self, name: str, keep: Tensor, share: float, draw: torch.Generator, within: int | None
    ) -> None:
        """Drop and grow weights in every linear of a parameter."""
        assert self.regrow is not None
        param = self.trainee.params[name]
        after = keep.clone()
        for linear in self.linears[name]:
            weight_OI, keep_OI = linear.view(param.data), linear.view(keep)
            grad_OI = None if param.grad is None else linear.view(param.grad)
            moved_OI = self.regrow.fn(weight_OI, keep_OI, grad_OI, share, draw, within)
            dense = self.first.get(name) if self.grow_from == "dense" else None
            first_OI = None if dense is None else linear.view(dense)
            weight_OI.copy_(regrown(weight_OI, keep_OI, moved_OI, first_OI))
            linear.view(after).copy_(moved_OI)
        self._forget(param, keep, after)
        self.trainee.held[name] = after

    def _rewind(self) -> None:
        """Return what is kept to where training began; the optimizer begins anew."""
        for name, value in self.first.items():
            keep = self.trainee.held.get(name)
            self.trainee.params[name].data.copy_(value if keep is None else value * keep)
        assert self.optimizer is not None
        self.optimizer.state.clear()

    def _forget(self, param: nn.Parameter, before: Tensor, after: Tensor) -> None:
        """Zero the optimizer's moments where a mask changed."""
        state = {} if self.optimizer is None else self.optimizer.state.get(param, {})
        for moment in MOMENTS:
            if moment in state:
                state[moment].masked_fill_(changed(before, after), 0)

    def goal(self, name: str, linear: Linear, progress: float) -> Goal:
        """Return what the mask of a linear is to be at a progress, for masks by magnitude."""
        before = self.trainee.held.get(name)
        pattern = self.pattern if isinstance(self.pattern, NofM) else None
        return goal_at(
            self.sparsity(progress),
            linear.shape,
            pattern,
            before_OI=None if before is None else linear.view(before),
        )


class _Soft(nn.Module):
    """The soft mask of one parameter, as torch's parametrization of it."""

    def __init__(self, shaping: Shaping, name: str, linears: Sequence[Linear]) -> None:
        super().__init__()
        self.shaping, self.name, self.linears, self.progress = shaping, name, linears, 0.0

    def forward(self, weight: Tensor) -> Tensor:
        """Return the parameter that a forward computes with."""
        shaping = self.shaping
        assert shaping.soft is not None
        out = torch.empty_like(weight)
        for linear in self.linears:
            goal = shaping.goal(self.name, linear, self.progress)
            weight_OI = linear.view(weight)
            linear.view(out).copy_(
                shaping.soft.fn(weight_OI, goal, self.progress, **shaping.options)
            )
        return out


def rewound_cuts(
    steps: int, rounds: int, final: float, *, geometric: bool = True
) -> dict[int, dict[str, float]]:
    """Return the cuts of iterative pruning with rewinding: one where each of equal rounds begins.

    >>> {step: round(wish["sparsity"], 3) for step, wish in rewound_cuts(90, 3, 0.488).items()}
    {0: 0.2, 30: 0.36, 60: 0.488}
    """
    shares = [(place + 1) / rounds for place in range(rounds)]
    amounts = [1 - (1 - final) ** share if geometric else final * share for share in shares]
    return {
        steps * place // rounds: {"sparsity": amount if place < rounds - 1 else final}
        for place, amount in enumerate(amounts)
    }
