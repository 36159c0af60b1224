"""What a result consists of, block by block: what is left of each, in the words of its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["E0", "E1", "E2", "E3"]
SUBLAYERS = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """One block of a result: its place in the source, its sizes, and the sublayers it lacks.

    `sizes` are the config's entries that count units, with what this block has of them, such as
    `{"intermediate_size": 640, "num_key_value_heads": 2, "num_attention_heads": 8}`.
    """

    source: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    without: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All blocks of a result in order, and the sizes that all of them share (hidden, vocabulary).

    >>> blocks = tuple(BlockLayout(source=i, sizes={"intermediate_size": 4}) for i in (0, 2))
    >>> Layout(blocks=blocks).uniform
    True
    """

    blocks: tuple[BlockLayout, ...]
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """Tell whether one number of every size serves all blocks, and none lacks a half."""
        widest = self.widest
        return not any(block.without for block in self.blocks) and all(
            widest[key] == size for block in self.blocks for key, size in block.sizes.items()
        )

    @property
    def widest(self) -> dict[str, int]:
        """Return the largest number of every size that any block has."""
        keys = {key for block in self.blocks for key in block.sizes}
        return {
            key: max(block.sizes[key] for block in self.blocks if key in block.sizes)
            for key in sorted(keys)
        }
