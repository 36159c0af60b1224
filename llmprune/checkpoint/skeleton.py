"""A model without weights: modules on meta, buffers real, blocks filled one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.arch.anatomy import EXPERT
from llmprune.arch.couplings import heads_of
from llmprune.arch.experts import mixture_of
from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError, UnsupportedModel, first_line
from llmprune.checkpoint.source import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

QUANTISED = (
    "is quantised ({method}). Quantised weights cannot be pruned: their values are codes. Prune "
    "the 16-bit checkpoint it was made from, then quantise the result."
)


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """A model on meta and where its blocks are."""

    model: Any
    family: Family

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def blocks(self) -> Any:
        """Return the list of block modules."""
        return self.model.get_submodule(self.family.blocks)

    def prefix(self, index: int) -> str:
        """Return the start of the parameter names of a block."""
        return f"{self.family.blocks}.{index}."

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a block's parameters by name relative to the block."""
        return {name: tuple(p.shape) for name, p in self.blocks[index].named_parameters()}

    def stored_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all that a checkpoint may hold of a block: buffers as well."""
        return {name: tuple(v.shape) for name, v in self.blocks[index].state_dict().items()}

    def trunk_params(self) -> list[str]:
        """Return the parameters that are not in a block."""
        inside = self.family.blocks + "."
        return [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the config of a causal language model.

    Raises:
        UnsupportedModel: quantised, with towers of other modalities, or in need of remote code.
        CheckpointError: config.json is not understood.
    """
    from transformers import AutoConfig

    data = read_json(folder / "config.json")
    if quantised := data.get("quantization_config"):
        said = quantised if isinstance(quantised, dict) else {}
        method = said.get("quant_method", said.get("fmt", "unknown format"))
        raise UnsupportedModel(f"{folder} " + QUANTISED.format(method=method))
    if towers := sorted(k for k in ("vision_config", "audio_config") if data.get(k)):
        raise UnsupportedModel(
            f"{folder} is a {data.get('model_type')} model with a {towers[0].split('_')[0]} tower. "
            "Only pure text decoders are pruned: save its language model on its own and prune that "
            "folder."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # validators of many kinds; all mean that this config is unusable
        if "auto_map" in data and "trust_remote_code" in str(error):  # no family of transformers
            raise UnsupportedModel(
                f"{folder} brings its own Python code (auto_map in config.json), which is not run "
                "unasked. Read the code, then add --trust-remote-code."
            ) from error
        first = first_line(error)
        raise CheckpointError(f"{folder / 'config.json'} is not understood: {first}") from error


def build_skeleton(
    config: Any,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    trust_remote_code: bool = False,
    family: Family | None = None,
) -> Skeleton:
    """Build a model whose parameters are on meta and whose buffers are real.

    `family` is given where it is known: a result's is that of its source.

    Raises:
        UnsupportedModel: no causal LM class, no family row, or blocks not where the row says.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    if family is None:
        family = find_family(config, trust_remote_code=trust_remote_code)
    else:
        heads, mixture = heads_of(config), mixture_of(config)
        family = replace(family, heads=heads, mixture=mixture, seen=None)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # of many kinds; all mean that no model follows from this config
        raise UnsupportedModel(
            f"transformers cannot build {config.model_type}: {first_line(error)}"
        ) from error
    use_eager_experts(model)
    tie(model)
    try:
        model.get_submodule(family.blocks)
    except AttributeError:
        raise UnsupportedModel(
            f"{type(model).__name__} has no blocks at {family.blocks!r}, where the row of "
            f"{config.model_type!r} in llmprune/arch/table.py expects them."
        ) from None
    check_blocks(model, family)
    return Skeleton(model=model.eval().requires_grad_(False), family=family)


def check_blocks(model: Any, family: Family) -> None:
    """Check that no two blocks share a parameter, and that none has what the probe has not seen.

    Raises:
        UnsupportedModel: they do.
    """
    owner: dict[int, int] = {}
    for index, block in enumerate(model.get_submodule(family.blocks)):
        for name, value in block.named_parameters():
            if owner.setdefault(id(value), index) != index:
                raise UnsupportedModel(
                    f"blocks {owner[id(value)]} and {index} of {type(model).__name__} share "
                    f"{name!r}: a parameter that serves several blocks cannot be pruned block by "
                    "block."
                )
            if family.seen is not None and _template(name) not in family.seen:
                raise UnsupportedModel(
                    f"block {index} of {type(model).__name__} has a parameter {name!r}, which its "
                    "miniature lacks, so what it reads is not known. Name the family's taps in a "
                    "row of llmprune/arch/table.py."
                )


def _template(name: str) -> str:
    """Return the name of a parameter in the first of the modules it belongs to (experts)."""
    return EXPERT.sub("experts.0", name)


def use_eager_experts(model: Any) -> None:
    """Make expert modules multiply one expert at a time, so that each one's input can be seen."""
    if hasattr(model.config, "_experts_implementation") and hasattr(
        model, "set_experts_implementation"
    ):
        model.set_experts_implementation("eager")


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in place of a module's (meta) parameters, by name relative to the module."""
    import torch

    for name, tensor in tensors.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            before = owner._parameters[leaf]
            trained = before is not None and before.requires_grad
            owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=trained)


def empty(module: nn.Module, names: Iterable[str] | None = None) -> None:
    """Move a module's parameters back to meta, freeing their memory; buffers stay."""
    import torch

    wanted = [name for name, _ in module.named_parameters()] if names is None else list(names)
    for name in wanted:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        param = owner._parameters.get(leaf)
        if param is not None:
            owner._parameters[leaf] = torch.nn.Parameter(
                torch.empty_like(param, device="meta"), requires_grad=False
            )


def tie(model: Any) -> None:
    """Let tied parameters (head and embeddings) be one tensor again."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for name, original in tied.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(original)


def untie(model: Any, stored: set[str]) -> None:
    """Part tied parameters of which the checkpoint stores both, as transformers does on load."""
    import torch

    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, original in list(tied.items()):
        if name in stored and original in stored:
            del tied[name]
            owner, _, leaf = name.rpartition(".")
            own = torch.nn.Parameter(
                torch.empty_like(model.get_parameter(original)), requires_grad=False
            )
            model.get_submodule(owner)._parameters[leaf] = own
    model.all_tied_weights_keys = tied
