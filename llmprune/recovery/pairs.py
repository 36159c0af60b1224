"""A fine-tuned checkpoint and the base it was tuned from, read together, tensor by tensor.

Only what blocks multiply with in attention and FFN is pruned; whatever else differs stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import CheckpointError, NumericalError
from llmprune.checkpoint.source import Source
from llmprune.recovery.deltas import DELTA_METHODS, chosen, generator_of, pruned
from llmprune.walk.rewriting import DTYPE_NAMES
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two checkpoints of the same names and shapes, and how their difference is pruned.

    `names` are the tensors that the fine-tuned model reads, `eligible` those that are pruned.
    """

    tuned: Source
    base: Source
    names: tuple[str, ...]
    eligible: frozenset[str]
    method: str
    sparsity: float
    seed: int

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a tensor of both, in the dtype that the fine-tuned model stores it in.

        Raises:
            NumericalError: one that is to be pruned holds NaN or infinity.
        """
        tuned = self.tuned.get([name])[name]
        base = self.base.get([name])[name].to(tuned.dtype)
        if name in self.eligible:
            for value, source in ((tuned, self.tuned), (base, self.base)):
                _check_finite(value, f"{name} of {source.name} holds NaN or infinity")
        return tuned, base

    def keep(self, name: str, tuned: Tensor, base: Tensor) -> Tensor:
        """Return which entries of a difference stay (bool)."""
        generator = generator_of(self.seed, name)
        return chosen(tuned, base, DELTA_METHODS[self.method], self.sparsity, generator)

    def pruned(
        self, name: str, tuned: Tensor, base: Tensor, keep: Tensor, q: float | None
    ) -> Tensor:
        """Return base plus pruned difference.

        Raises:
            NumericalError: the rescaled difference is too large for the dtype.
        """
        value = pruned(tuned, base, keep, DELTA_METHODS[self.method].scale(self.sparsity, q))
        _check_finite(value, f"{name} overflows {value.dtype} once its difference is rescaled")
        return value


def _check_finite(value: Tensor, what: str) -> None:
    low, high = torch.aminmax(value)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NumericalError(
            f"{what}. Differences must be finite; take a sound checkpoint, or --method magnitude, "
            "which rescales nothing."
        )


@dataclass(frozen=True, kw_only=True)
class PrunedSource(Source):
    """Base plus pruned difference as one more checkpoint, made when its tensors are read.

    `q_of` says what a tensor's survivors are divided by. Which entries stay is looked up in `keeps`
    first: several sources may share it, and whoever made it empties it.
    """

    pair: Pair
    q_of: Callable[[str], float | None]
    keeps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def get(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors: pruned ones rebuilt, all others as the fine-tuned model has them."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self.pair.eligible:
                found |= self.pair.tuned.get([name])
                continue
            tuned, base = self.pair.read(name)
            if name not in self.keeps:
                self.keeps[name] = self.pair.keep(name, tuned, base)
            found[name] = self.pair.pruned(name, tuned, base, self.keeps[name], self.q_of(name))
        return found


def pruned_source(
    pair: Pair, q_of: Callable[[str], float | None], keeps: dict[str, Tensor]
) -> PrunedSource:
    """Return the checkpoint that a pair makes, with the names and small files of the tuned one."""
    tuned = pair.tuned
    return PrunedSource(
        name=f"{tuned.name}, pruned",
        folder=tuned.folder,
        entries=tuned.entries,
        pair=pair,
        q_of=q_of,
        keeps=keeps,
    )


def eligible_tensors(blocks: Streamed) -> frozenset[str]:
    """Return the tensors that hold the linears of attention and FFN, under their names on disk.

    Raises:
        CheckpointError: one is stored in a quantised type.
    """
    params = {
        blocks.skeleton.prefix(index) + linear.param
        for index in range(len(blocks))
        for linear in blocks.anatomy(index).linears.values()
    }
    names = blocks.naming.disk_names_of(params)
    for name in sorted(names):
        if (dtype := blocks.source.entries[name].dtype) not in DTYPE_NAMES:
            raise CheckpointError(
                f"{name} of {blocks.source.name} is stored as {dtype}, a quantised type. "
                "Differences are taken of 16-bit or 32-bit weights; give the checkpoint that it "
                "was made from."
            )
    return frozenset(names)


def check_pair(tuned: Source, base: Source, names: Iterable[str]) -> None:
    """Check that a base can be what a model was tuned from: family, vocabulary, names, shapes.

    Raises:
        CheckpointError: it cannot.
    """
    asks = f"Give the model that {tuned.name} was tuned from, with --base"
    for key, what in (("model_type", "family"), ("vocab_size", "vocabulary")):
        ours, theirs = (_setting(source, key) for source in (tuned, base))
        if ours != theirs:
            raise CheckpointError(
                f"base: {base.name} is of another {what} ({key} {theirs}) than {tuned.name} "
                f"({ours}). {asks}."
            )
    names = list(names)
    if missing := [name for name in names if name not in base.entries]:
        raise CheckpointError(
            f"base: {base.name} lacks {len(missing)} tensors of {tuned.name}, such as "
            f"{missing[0]}. Both must store the same names. {asks}; if it is that, load and save "
            "both once with the same transformers."
        )
    for name in names:
        ours, theirs = (source.entries[name].shape for source in (tuned, base))
        if ours != theirs:
            raise CheckpointError(
                f"base: {name} of {base.name} has shape {list(theirs)}, and of {tuned.name} "
                f"{list(ours)}. A difference needs equal shapes. {asks}."
            )
        dtype = base.entries[name].dtype
        if dtype not in DTYPE_NAMES and tuned.entries[name].dtype in DTYPE_NAMES:
            raise CheckpointError(
                f"base: {name} of {base.name} is stored as {dtype}, a quantised type. Give the "
                "16-bit checkpoint that it was made from."
            )


def _setting(source: Source, key: str) -> Any:
    """Return an entry of a config, or of its part about text."""
    config = source.config()
    text = config.get("text_config")
    return config.get(key, text.get(key) if isinstance(text, dict) else None)
