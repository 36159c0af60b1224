"""Putting what is trained into a model, and taking it out again as plain weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmprune.base.errors import RecipeError
from llmprune.recovery.bank import Bank
from llmprune.recovery.types import Recovery
from llmprune.walk.resident import Resident

if TYPE_CHECKING:
    from torch import Tensor

WIDE = re.compile(r"(^|\.)(k_proj|v_proj|down_proj|fc2|c_proj|dense_4h_to_h|query_key_value)$")


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model with what is trained in it.

    `model` computes; `plain` is the same without adapters around it. `params` are the trained
    tensors by name, in float32. Where parameters of the model are trained under masks, these are
    in `held`, by name. `touched` are the parameters of the plain model that a merge may change.
    """

    model: Any
    plain: Any
    params: Mapping[str, nn.Parameter]
    held: dict[str, Tensor]
    touched: frozenset[str]

    @property
    def num_trained(self) -> int:
        return sum(param.numel() for param in self.params.values())

    def mask_gradients(self) -> None:
        """Take away the gradients of removed weights, so that no norm or moment counts them."""
        for name, keep in self.held.items():
            grad = self.params[name].grad
            if grad is not None:
                grad.mul_(keep)

    def hold(self) -> None:
        """Put zeros where weights are removed, whatever the optimizer did."""
        for name, keep in self.held.items():
            self.params[name].data.mul_(keep)

    def merged(self) -> Any:
        """Return the plain model with what was trained inside its weights; ends the training."""
        if self.model is self.plain:
            return self.plain
        with torch.no_grad():
            return self.model.merge_and_unload()

    def save_adapter(self, folder: Path) -> None:
        """Write adapters as peft does, for whoever wants them apart from the model."""
        self.model.save_pretrained(str(folder))


def attach(
    blocks: Resident,
    bank: Bank,
    recovery: Recovery,
    *,
    rank: int,
    alpha: float,
    norms: bool,
    ranks: Mapping[int, int] | None = None,
) -> Trainee:
    """Freeze a model and put into it what a recovery trains.

    `ranks` gives blocks ranks of their own, by index.

    Raises:
        RecipeError: the model has not what the recovery trains, or the rank is no rank.
    """
    plain = blocks.model
    plain.requires_grad_(False)
    parts = {*recovery.trains} - {"norms"} | ({"norms"} if norms else set())
    own = trained_params(blocks, parts)
    if recovery.adapter is None:
        params = {name: plain.get_parameter(name) for name in own}
        for name, param in params.items():
            owner, _, leaf = name.rpartition(".")
            whole = nn.Parameter(param.data.float(), requires_grad=True)
            plain.get_submodule(owner)._parameters[leaf] = whole
            params[name] = whole
        held = {name: keep for name, keep in bank.keeps.items() if name in params}
        touched = frozenset(own)
        return Trainee(model=plain, plain=plain, params=params, held=held, touched=touched)
    check_rank(blocks, recovery, rank)
    linears = _linear_params(blocks)
    model = _with_adapters(blocks, bank, recovery, own, rank, alpha, ranks or {})
    params = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in params.values():
        value.data = value.data.float()
    touched = frozenset({*own, *linears, *_biases_of(plain, linears)})
    return Trainee(model=model, plain=plain, params=params, held={}, touched=touched)


def check_rank(blocks: Resident, recovery: Recovery, rank: int) -> None:
    """Check that a rank is below the sizes of the linears it is to update.

    Raises:
        RecipeError: it is larger; names a linear.
    """
    if recovery.adapter == "ia3":
        return
    for index in range(len(blocks)):
        for name, linear in blocks.anatomy(index).linears.items():
            if rank > min(linear.shape):
                raise RecipeError(
                    f"recover.rank: {rank} is larger than {name} of block {index} has rows or "
                    f"columns ({linear.shape[0]} x {linear.shape[1]}), so nothing is saved by it. "
                    f"Type --rank {max(1, min(linear.shape) // 4)}, or --method full."
                )


def trained_params(blocks: Resident, parts: set[str]) -> list[str]:
    """Return the parameters of a model that are trained themselves, by what they are.

    Raises:
        RecipeError: it has none of them.
    """
    model, found = blocks.model, []
    inside = blocks.family.blocks + "."
    weights = _linear_params(blocks)
    head = _head(model) if "head" in parts else None
    for name, param in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        is_norm = param.dim() == 1 and "norm" in type(model.get_submodule(owner)).__name__.lower()
        if (
            ("norms" in parts and is_norm)
            or ("biases" in parts and leaf == "bias" and not is_norm)
            or ("weights" in parts and name.startswith(inside) and name in weights)
            or name == head
        ):
            found.append(name)
    if parts and not found:
        wanted = " or ".join(sorted(parts))
        raise RecipeError(
            f"recover.method: {model.config.model_type} has no {wanted} to train. Type --method "
            "mask-lora or --method norms."
        )
    return found


def _head(model: Any) -> str:
    """Return the name of the final matrix.

    Raises:
        RecipeError: it is the embeddings' as well, which would be trained with it.
    """
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        raise RecipeError(
            "recover.method: this model's final matrix is its embeddings too, so that training it "
            "alone is not possible. Type --method norms or --method mask-lora."
        )
    return next(str(name) for name, value in model.named_parameters() if value is head)


def _linear_params(blocks: Resident) -> dict[str, Any]:
    """Return the parameters that hold linears, with one of these each."""
    prefix = blocks.family.blocks
    return {
        f"{prefix}.{index}.{linear.param}": linear
        for index in range(len(blocks))
        for linear in blocks.anatomy(index).linears.values()
    }


def _biases_of(model: Any, weights: Iterable[str]) -> set[str]:
    """Return the biases that stand beside weights."""
    names = {name for name, _ in model.named_parameters()}
    return {name.removesuffix("weight") + "bias" for name in weights} & names


def _with_adapters(
    blocks: Resident,
    bank: Bank,
    recovery: Recovery,
    own: list[str],
    rank: int,
    alpha: float,
    ranks: Mapping[int, int],
) -> Any:
    """Put peft's adapters around linears, ours where masks have a say."""
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    linears = _linear_params(blocks)
    modules = [name.removesuffix(".weight") for name in linears if name.endswith(".weight")]
    stacks = [name for name in linears if not name.endswith(".weight")]
    saved = sorted({name.rpartition(".")[0] for name in own})
    transposed = any(isinstance(blocks.model.get_submodule(name), Conv1D) for name in modules)
    config = _config(recovery, modules, stacks, saved, rank, alpha, transposed)
    _check_modules(blocks.model, recovery, modules, stacks)
    if ranks and hasattr(config, "rank_pattern"):
        prefix = re.escape(blocks.family.blocks)
        config.rank_pattern = {rf"{prefix}\.{i}\..*": r for i, r in ranks.items()}
        config.alpha_pattern = {rf"{prefix}\.{i}\..*": alpha * r / rank for i, r in ranks.items()}
    if recovery.adapter == "shira":
        config.mask_fn = _DrawnKept(blocks.model, bank)
    model = get_peft_model(blocks.model, config)
    _give_masks(model, bank, recovery)
    return model


def _config(
    recovery: Recovery, modules: list[str], stacks: list[str], saved: list[str], rank: int,
    alpha: float, transposed: bool,
) -> Any:  # fmt: skip
    """Return the config of peft for an adapter."""
    import peft

    from llmprune.recovery.layers import CutLinear, MaskedLinear, ScaledLinear

    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM", "target_modules": modules, "modules_to_save": saved or None,
    }  # fmt: skip
    if recovery.adapter == "ia3":
        wide = [name for name in modules if WIDE.search(name)]
        last = [name for name in wide if not name.endswith(("k_proj", "v_proj", "key_value"))]
        common["target_modules"] = wide
        return peft.IA3Config(feedforward_modules=last, fan_in_fan_out=transposed, **common)
    if recovery.adapter == "hira":
        return peft.HiraConfig(r=rank, fan_in_fan_out=transposed, **common)
    if recovery.adapter == "shira":
        return peft.ShiraConfig(r=rank, fan_in_fan_out=transposed, **common)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_parameters=stacks or None, fan_in_fan_out=transposed,
        **common,
    )  # fmt: skip
    layers = {"mask-lora": MaskedLinear, "lora-prune": CutLinear, "scale-lora": ScaledLinear}
    if recovery.adapter in layers:
        layer = layers[recovery.adapter]
        from transformers.pytorch_utils import Conv1D

        config._register_custom_module({nn.Linear: layer, Conv1D: layer})
    return config


def _check_modules(model: Any, recovery: Recovery, modules: list[str], stacks: list[str]) -> None:
    """Check that an adapter can stand beside all linears of a model.

    Raises:
        RecipeError: it cannot; says which can.
    """
    kinds = {type(model.get_submodule(name)) for name in modules}
    plain_only = recovery.adapter in ("hira", "shira", "ia3")
    if plain_only and (stacks or any(not issubclass(kind, nn.Linear) for kind in kinds)):
        what = "experts stacked in one tensor" if stacks else "linears of its own kind"
        raise RecipeError(
            f"recover.method: {model.config.model_type} has {what}, which {recovery.title} does "
            "not know. Type --method mask-lora or --method full."
        )
    if stacks and recovery.adapter in ("lora-prune", "scale-lora"):
        raise RecipeError(
            f"recover.method: {model.config.model_type} has experts stacked in one tensor, which "
            f"{recovery.title} does not know. Type --method mask-lora or --method full."
        )


def _give_masks(model: Any, bank: Bank, recovery: Recovery) -> None:
    """Hand every adapter the mask of its weight; none where the zeros say the same."""
    from peft.tuners.lora.layer import ParamWrapper

    from llmprune.recovery.layers import CutLinear, MaskedLinear, MaskedStack, ScaledLinear

    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, MaskedLinear | CutLinear | ScaledLinear):
            keep = _needed(bank, f"{path}.weight", module.get_base_layer().weight)
            module.register_buffer("keep", keep, persistent=False)
        elif isinstance(module, ParamWrapper) and recovery.adapter == "mask-lora":
            module.__class__ = MaskedStack  # peft has no way to register a layer for parameters
            keep = _needed(bank, f"{path}.{module.parameter_name}", module.get_param())
            module.register_buffer("keep", keep, persistent=False)


def _needed(bank: Bank, name: str, weight: Tensor) -> Tensor | None:
    """Return a mask where the zeros of the frozen weight do not say the same."""
    keep = bank.keeps.get(name)
    if keep is None:
        return torch.ones((), dtype=torch.bool, device=weight.device).expand_as(weight)
    return None if torch.equal(weight != 0, keep) else keep


class _DrawnKept:
    """Draws the kept weights that SHiRA trains: rank times rows plus columns of each linear."""

    def __init__(self, model: Any, bank: Bank) -> None:
        self.keeps = {id(model.get_parameter(name)): keep for name, keep in bank.keeps.items()}

    def __call__(self, layer: nn.Module, rank: int, **options: Any) -> Tensor:
        """Return a mask with ones where weights are trained.

        Raises:
            RecipeError: fewer weights are kept than are to be trained.
        """
        weight: Any = layer.weight
        keep = self.keeps.get(id(weight), torch.ones_like(weight, dtype=torch.bool))
        places = keep.flatten().nonzero().flatten()
        wanted = rank * sum(weight.shape)
        if wanted > len(places):
            raise RecipeError(
                f"recover.rank: {rank} trains {wanted} weights of a linear of "
                f"{weight.shape[0]} x {weight.shape[1]} that keeps {len(places)}. Type --rank "
                f"{max(1, len(places) // sum(weight.shape))}."
            )
        draw = torch.Generator().manual_seed(int(options.get("random_seed") or 0))
        drawn = places[torch.randperm(len(places), generator=draw)[:wanted].to(places.device)]
        mask = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        mask[drawn] = 1
        return mask.view_as(weight)
