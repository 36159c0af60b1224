"""Weights that are chosen once and fade to zero over a window of training, instead of being cut.

The mask is decided where the window begins, and nothing is zero then. Until the window ends what is
doomed shrinks by itself (march) or is drawn to zero by its gradients (pull), while all the rest
learns to do without it; what is left of it at the end is cut.
Legend: O outputs, I inputs, U units; keep has the shape of the parameter.

Sources: Chen et al., HESSO (march); Jiang et al., MaskSparsity (pull).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from llmprune.arch.anatomy import Anatomy
from llmprune.arch.types import Coupling
from llmprune.recovery.doomed import PULL, march_factor, pull_on_doomed, unit_norms

if TYPE_CHECKING:
    from torch import Tensor, nn

FADES: dict[str, dict[str, float]] = {"march": {}, "pull": {"strength": PULL, "smooth": 0.0}}


@dataclass(kw_only=True)
class Fade:
    """What fades, and how far it is; `doomed` are the masks by parameter, none out of the window.

    The window is of the optimizer's steps: the mask is decided before step `begin`, and is in force
    before step `end`. `blocks` are prefix and anatomy of each, which say what units of the `kinds`
    own. Options of a pull are its `strength`, a length, and `smooth`, the length below which a unit
    is drawn in proportion to its weights.
    """

    how: Literal["march", "pull"]
    params: Mapping[str, nn.Parameter]
    blocks: Sequence[tuple[str, Anatomy]]
    kinds: tuple[str, ...]
    begin: int
    end: int
    options: Mapping[str, float] = field(default_factory=dict)
    doomed: dict[str, Tensor] = field(default_factory=dict)

    def decide(self, cut: Callable[[], Mapping[str, Tensor]]) -> None:
        """Let a cut say which weights go, and take back whatever else it did to them."""
        before = {name: param.detach().clone() for name, param in self.params.items()}
        self.doomed = dict(cut())
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(before[name])

    def see_gradients(self) -> None:
        """Add the pull to the gradients of units that go."""
        if self.how != "pull":
            return
        strength, smooth = self.options["strength"], self.options["smooth"]
        gradients = _gradients(self.params) if self.doomed else {}
        for prefix, anatomy, coupling, keep_U in self.units():
            weights = self._views(prefix, anatomy, coupling, self.params)
            grads = self._views(prefix, anatomy, coupling, gradients)
            pulls = pull_on_doomed(coupling, weights, keep_U, strength, smooth)
            for name, pull_OI in pulls.items():
                grads[name].add_(pull_OI)

    def after_update(self, done: int) -> Mapping[str, Tensor]:
        """Let what is doomed march on; return the masks to adopt once the window is over."""
        if not self.doomed:
            return {}
        if self.how == "march" and done < self.end:
            factor = march_factor(done - 1 - self.begin, self.end - self.begin)
            with torch.no_grad():
                for name, keep in self.doomed.items():
                    param = self.params[name]
                    param.copy_(torch.where(keep, param, param * factor))
        if done < self.end:
            return {}
        faded, self.doomed = self.doomed, {}
        return faded

    def units(self) -> Iterator[tuple[str, Anatomy, Coupling, Tensor]]:
        """Yield prefix, anatomy, coupling and keep_U of all units that masks take whole."""
        for prefix, anatomy in self.blocks:
            for coupling in anatomy.couplings:
                names = {span.linear for span in coupling.spans}
                params = {prefix + anatomy.linears[name].param for name in names}
                if coupling.kind not in self.kinds or not params <= self.doomed.keys():
                    continue
                keeps = self._views(prefix, anatomy, coupling, self.doomed)
                found = {name: keep_OI.float() for name, keep_OI in keeps.items()}
                keep_U = unit_norms(coupling, found) > 0  # something of the unit stays
                if not bool(keep_U.all()):
                    yield prefix, anatomy, coupling, keep_U

    def _views(
        self, prefix: str, anatomy: Anatomy, coupling: Coupling, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what a coupling's linears are of tensors by parameter, (O, I) each."""
        linears = {span.linear: anatomy.linears[span.linear] for span in coupling.spans}
        return {
            name: linear.view(tensors[prefix + linear.param].detach())
            for name, linear in linears.items()
        }


def _gradients(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return gradients by parameter; a parameter without one gets zeros."""
    for param in params.values():
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    return {name: param.grad for name, param in params.items() if param.grad is not None}
