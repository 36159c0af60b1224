"""Units that go while adapters are trained around frozen weights, by what the adapters' gradients
say of them; of the weights no gradient is made.

At every step of the optimizer the importance of each unit is added to its running mean. At the
steps of a schedule the least important ones go: what they own of every linear is zero from then on,
in the frozen weight and in its low-rank update, so that merging gives what was trained.
Legend: O outputs, I inputs, U units of a coupling; keep has the shape of the parameter.

Source: Zhang et al., LoRAPrune. Unlike in its code the last cut comes to the count asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llmprune.arch.types import Coupling, Linear
from llmprune.base.errors import RecipeError
from llmprune.recovery.adapter_gradients import (
    adapter_importance,
    averaged,
    importance_by_unit,
    units_kept,
)
from llmprune.recovery.attaching import Trainee
from llmprune.recovery.doomed import march
from llmprune.recovery.unit_counts import counts_of, final_counts

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.engine.shapes import Anatomies
    from llmprune.recipe import RecoverStep
    from llmprune.recovery.layers import MaskedLinear

_KEEP, _SCORE = ".keep", ".score"


@dataclass(kw_only=True)
class Place:
    """The units of one coupling of a block: which stay, and what each has mattered so far.

    `linears` are those that units own a part of, by name, and `layers` the adapters around their
    parameters; `counts` say at which steps how many units are gone.
    """

    coupling: Coupling
    linears: Mapping[str, Linear]
    layers: Mapping[str, MaskedLinear]
    counts: Mapping[int, int]
    keep_U: Tensor
    score_U: Tensor

    def importances(self) -> dict[str, Tensor]:
        """Return importance_OI of every linear, from the gradients that adapters have now."""
        by_param = {param: importance_of(layer) for param, layer in self.layers.items()}
        return {name: linear.view(by_param[linear.param]) for name, linear in self.linears.items()}

    def remove(self) -> None:
        """Put zeros where units that went have their part, in weights and in their updates."""
        keeps = {param: kept_in(layer).clone() for param, layer in self.layers.items()}
        masks = {name: linear.view(keeps[linear.param]) for name, linear in self.linears.items()}
        march(self.coupling, masks, self.keep_U, 0)
        for param, layer in self.layers.items():
            weight, keep = layer.get_base_layer().weight.data, keeps[param]
            weight.mul_(keep)
            layer.keep = None if torch.equal(weight != 0, keep) else keep


@dataclass(kw_only=True)
class AdapterUnits:
    """Removes units from a model while adapters are trained; places by the name of their units."""

    trainee: Trainee
    places: Mapping[str, Place]
    params: Mapping[str, MaskedLinear] = field(default_factory=dict)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: factors outlive the rows and columns that masks cut of their product."""

    def before_step(self, step: int) -> None:
        """Do nothing: units go once their gradients were seen."""

    def see_gradients(self, step: int) -> None:
        """Learn from the gradients of this step, which are whole still, and remove what is due."""
        with torch.no_grad():
            for place in self.places.values():
                now_U = importance_by_unit(place.coupling, place.importances())
                place.score_U = averaged(place.score_U, now_U)
                if step in place.counts:
                    place.keep_U = units_kept(
                        place.score_U,
                        place.counts[step],
                        num_groups=place.coupling.num_groups,
                        before_U=place.keep_U,
                    )
                    place.remove()

    def after_update(self, done: int) -> None:
        """Do nothing: the product of the factors is masked wherever it is computed."""

    def finish(self) -> None:
        """Hand over the masks of all linears that lost something, by the name of the parameter."""
        for name, layer in self.params.items():
            keep = kept_in(layer)
            if not bool(keep.all()):
                self.trainee.held[name] = keep.clone()

    def state(self) -> dict[str, Tensor]:
        """Return which units are left, and what each has mattered so far."""
        keeps = {name + _KEEP: place.keep_U for name, place in self.places.items()}
        return keeps | {name + _SCORE: place.score_U for name, place in self.places.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Remove the units that were gone, and go on with what the others mattered."""
        with torch.no_grad():
            for name, place in self.places.items():
                place.keep_U = state[name + _KEEP].to(place.keep_U.device)
                place.score_U = state[name + _SCORE].to(place.score_U.device)
                if not bool(place.keep_U.all()):
                    place.remove()


def removal_by_adapters(wish: RecoverStep, anatomies: Anatomies, trainee: Trainee) -> AdapterUnits:
    """Return what removes units from a model with adapters, as a wish says.

    `anatomies` are those of the model without adapters.

    Raises:
        UnknownName, RecipeError: as `final_counts`, or a linear has no adapter.
    """
    layers, places = masked_layers(trainee), {}
    for name, going in final_counts(wish, anatomies).items():
        prefix, anatomy = anatomies.prefixes[going.block], anatomies.blocks[going.block]
        linears = {span.linear: anatomy.linears[span.linear] for span in going.coupling.spans}
        params = dict.fromkeys(linear.param for linear in linears.values())
        if missing := [param for param in params if prefix + param not in layers]:
            raise RecipeError(
                f"recover.method: {prefix}{missing[0]} has no adapter, so nothing is known of its "
                f"{going.coupling.kind}. Type --method full, or another recover.prune.pattern."
            )
        device = layers[prefix + next(iter(params))].get_base_layer().weight.device
        num_units = going.coupling.num_units
        places[name] = Place(
            coupling=going.coupling,
            linears=linears,
            layers={param: layers[prefix + param] for param in params},
            counts=counts_of(going, wish),
            keep_U=torch.ones(num_units, dtype=torch.bool, device=device),
            score_U=torch.zeros(num_units, device=device),
        )
    return AdapterUnits(trainee=trainee, places=places, params=layers)


def masked_layers(trainee: Trainee) -> dict[str, MaskedLinear]:
    """Return the adapters of linears by the name of the parameter in the plain model."""
    from llmprune.recovery.layers import MaskedLinear

    return {
        name.removeprefix("base_model.model.") + ".weight": module
        for name, module in trainee.model.named_modules()
        if isinstance(module, MaskedLinear)
    }


def importance_of(layer: MaskedLinear) -> Tensor:
    """Return the importance of a layer's weights, shaped like its parameter.

    Raises:
        ValueError: there was no backward pass.
    """
    name = layer.active_adapters[0]
    a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
    if a_RI.grad is None or b_OR.grad is None:
        raise ValueError("the adapter has no gradients. Ask after a backward pass.")
    turn = layer.fan_in_fan_out
    weight, keep = layer.get_base_layer().weight, kept_in(layer)
    found = adapter_importance(
        *(weight.T if turn else weight, a_RI, b_OR, a_RI.grad, b_OR.grad),
        scale=layer.scaling[name],
        keep_OI=keep.T if turn else keep,
    )
    return found.T if turn else found


def kept_in(layer: MaskedLinear) -> Tensor:
    """Return which weights of a layer are kept, shaped like its parameter."""
    found: Tensor = layer.get_base_layer().weight != 0 if layer.keep is None else layer.keep
    return found
