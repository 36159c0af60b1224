"""Blocks of a model that is already in memory: pruned in place, through the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.limits import EXPERTS
from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.base.errors import UnsupportedModel
from llmprune.checkpoint.skeleton import Skeleton, check_blocks, use_eager_experts
from llmprune.walk.block import Block, add_bias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A `PreTrainedModel`, visited block by block; committing leaves the block where it is.

    Blocks that are `gone` stay in their places until `drop_blocks`, but nothing passes them.
    """

    model: Any
    family: Family
    gone: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def modules(self) -> Any:
        return self.model.get_submodule(self.family.blocks)

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def anatomy(self, index: int) -> Anatomy:
        """Return the linears and taps of a block."""
        shapes = {name: tuple(p.shape) for name, p in self.modules[index].named_parameters()}
        return anatomy_of(self.family, shapes)

    @contextmanager
    def open(self, index: int) -> Iterator[Block]:
        """Yield a block where it is."""
        yield Block(
            index=index,
            prefix=f"{self.family.blocks}.{index}.",
            module=self.modules[index],
            anatomy=self.anatomy(index),
            device=self.device,
            resident=True,
        )

    stored = open

    def expect(self, index: int) -> None:
        """Do nothing: all blocks are in memory."""

    def is_gone(self, index: int) -> bool:
        """Tell whether the result has nothing of a block."""
        return index in self.gone

    def complete_biases(self, skeleton: Skeleton) -> None:
        """Give linears the biases, of zeros, that the result's config asks for beside new ones."""
        for index, block in enumerate(self.modules):
            held = dict(block.named_parameters())
            for name, shape in skeleton.shapes(index).items():
                if name not in held and name.endswith(".bias"):
                    weight = held[name.removesuffix("bias") + "weight"]
                    add_bias(block, name, weight.new_zeros(shape))

    def drop_blocks(self) -> None:
        """Take the blocks that are gone out of the model, and number the others anew."""
        if not self.gone:
            return
        modules = self.modules
        for index in sorted(self.gone, reverse=True):
            del modules[index]
        for place, block in enumerate(modules):
            for module in block.modules():
                for name in ("layer_idx", "layer_id"):
                    if isinstance(vars(module).get(name), int):
                        setattr(module, name, place)

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        """Yield the model, whose trunk is in place."""
        yield self.model

    def commit(
        self, block: Block, touched: set[str], redo: Callable[[Block], None] | None = None
    ) -> None:
        """Keep the block; its parameters were edited in place."""


@contextmanager
def in_memory(model: Any) -> Iterator[Resident]:
    """Open a model in memory for pruning; mode, experts and cache settings come back at the end.

    Raises:
        UnsupportedModel: the model's family is not known, or its blocks are not what it says.
    """
    check_resident(model)
    family = find_family(model.config)
    check_blocks(model, family)
    modes = {module: module.training for module in model.modules()}
    experts = getattr(model.config, "_experts_implementation", None)
    use_eager_experts(model)
    model.eval()
    try:
        yield Resident(model=model, family=family)
    finally:
        for module, training in modes.items():
            module.training = training
        if experts is not None and hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation(experts)


def set_sizes(model: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Put what changed into a model's config, and into the counts of experts that it holds."""
    for key, value in after.items():
        if before.get(key) != value:
            setattr(model.config, key, value)
            for name in EXPERTS if key in EXPERTS else ():
                if name in vars(model):
                    setattr(model, name, value)


def check_resident(model: Any) -> None:
    """Check that a model in memory can be pruned in place.

    Raises:
        UnsupportedModel: adapters, no head, weights elsewhere than in memory, or quantised.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        raise UnsupportedModel(
            f"{type(model).__name__} is no plain PreTrainedModel. Merge adapters first "
            "(model.merge_and_unload()), and unwrap what wraps the model."
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no head for language. Load it with AutoModelForCausalLM."
        )
    if any(value.device.type == "meta" for value in model.parameters()):
        raise UnsupportedModel(
            "parts of the model are offloaded, not in memory. Give its folder instead of the "
            "model: a folder is streamed and may be larger than memory."
        )
    quantised = getattr(model.config, "quantization_config", None)
    if quantised or any(not value.is_floating_point() for value in model.parameters()):
        raise UnsupportedModel(
            "the model is quantised: its values are codes. Load the 16-bit checkpoint it was made "
            "from, prune that, then quantise the result."
        )
