"""Which parameters read the residual stream, which write it, and which norms stand on it.

Legend: D hidden size, O outputs, I inputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune.arch.anatomy import EXPERT
from llmprune.base.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The parameters of a block, or of the trunk, that have an axis of the stream's width.

    `readers` multiply what a norm gives out: their axis of the stream, and that norm's weight.
    `writers` add to the stream (matrices, their biases, token embeddings). `norms` are the weights
    of norms on the stream, with the offset that the module adds to them: 0, or 1 where it
    multiplies with 1 + weight.
    """

    width: int
    readers: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    writers: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, float] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, int]:
        """Return the axis of the stream of every parameter that has one."""
        readers = {name: axis for name, (axis, _) in self.readers.items()}
        return readers | dict(self.writers) | dict.fromkeys(self.norms, 0)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """What a miniature showed of a family: the roles of a block's parameters, and the trunk's.

    Names are relative to the block, with the first expert standing for all; `seen` are all of its
    parameters. `embedding`, `norm` and `head` are the trunk's parameters by their whole names.
    """

    readers: Mapping[str, tuple[int, str]]
    writers: Mapping[str, int]
    norms: Mapping[str, float]
    seen: frozenset[str]
    embedding: str
    norm: str
    head: str
    offset: float

    def block(self, shapes: Mapping[str, tuple[int, ...]], width: int) -> Roles:
        """Return the roles of a block whose parameters have these shapes.

        Raises:
            UnsupportedModel: a parameter was not in the miniature, or has another width.
        """
        names = {name: EXPERT.sub("experts.0", name) for name in shapes}
        if strange := sorted(name for name, known in names.items() if known not in self.seen):
            raise UnsupportedModel(
                f"the hidden size cannot be cut: a block has a parameter {strange[0]!r}, which the "
                "miniature that is looked at lacks, so whether it reads the residual stream is not "
                "known. Prune widths inside the blocks instead: --pattern ffn-channels or heads."
            )
        found = Roles(
            width=width,
            readers={n: self.readers[k] for n, k in names.items() if k in self.readers},
            writers={n: self.writers[k] for n, k in names.items() if k in self.writers},
            norms={n: self.norms[k] for n, k in names.items() if k in self.norms},
        )
        for name, axis in found.axes.items():
            if shapes[name][axis] != width:
                raise UnsupportedModel(
                    f"the hidden size cannot be cut: {name!r} has shape {list(shapes[name])} where "
                    f"its axis {axis} should be the {width} channels of the residual stream. Prune "
                    "widths inside the blocks instead: --pattern ffn-channels or heads."
                )
        return found

    def trunk(self, width: int) -> Roles:
        """Return the roles of embeddings, last norm and head."""
        return Roles(
            width=width,
            readers={self.head: (1, self.norm)},
            writers={self.embedding: 1},
            norms={self.norm: self.offset},
        )
