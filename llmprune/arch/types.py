"""What a family of models looks like, as data: spans, sites, taps, couplings, fused parameters.

All names of linears are relative to their block (`self_attn.q_proj`); O = out, I = in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["weight", "out", "in", "all"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of one linear that a unit owns: single weights, or `width` rows or columns."""

    linear: str
    axis: Axis
    width: int = 1


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linears whose mask is decided together; `unit_cost` is in parameters per unit.

    `shape` is that of the linear (O, I); none where several linears make one site.
    """

    name: str
    block: int
    spans: tuple[Span, ...]
    num_units: int
    unit_cost: int
    shape: tuple[int, int] | None = None

    @property
    def num_weights(self) -> int:
        """Return the number of weights that the units of this site cover."""
        return self.num_units * self.unit_cost


@dataclass(frozen=True, kw_only=True)
class Tap:
    """An activation read by one or more linears; statistics are collected once per tap."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Rows and columns of several linears that move together when a unit is dropped.

    `config_key` is the entry of the config that counts the units, `module_sizes` the attributes of
    modules (path relative to the block, attribute) that hold the same number.
    """

    name: str
    spans: tuple[Span, ...]
    config_key: str
    module_sizes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Unfuse:
    """How one parameter of a block splits into 2-D linears.

    `parts` are the names of the equal parts along the output axis, one after the other or, where
    `interleaved`, in turn; a name may hold `{expert}` when the parameter stacks one matrix per
    expert on its first axis; `transposed` matrices are (I, O).
    """

    param: str
    parts: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the family table, or what the probe found of a family that has none.

    `blocks` is the path of the list of blocks. Taps and couplings of all kinds of block stand side
    by side: a block has those whose linears it holds. `returns` is the length of the tuple that a
    block's forward returns, hidden states first; 0 where it returns these alone. `seen` is set by
    the probe: the parameters of the blocks it has looked at.
    """

    model_types: tuple[str, ...]
    blocks: str
    taps: tuple[Tap, ...]
    couplings: tuple[Coupling, ...] = ()
    unfuse: tuple[Unfuse, ...] = ()
    returns: int = 0
    seen: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A plain 2-D linear (O, I) inside a parameter of a block."""

    name: str
    param: str
    shape: tuple[int, int]
    expert: int | None = None
    part: int = 0
    num_parts: int = 1
    transposed: bool = False
    interleaved: bool = False

    def view(self, param: Tensor) -> Tensor:
        """Return this linear's weight_OI as a view of its parameter."""
        matrix = self.matrix(param)
        if self.interleaved:
            return matrix[self.part :: self.num_parts]
        rows = matrix.shape[0] // self.num_parts
        return matrix[self.part * rows : (self.part + 1) * rows]

    def matrix(self, param: Tensor) -> Tensor:
        """Return the whole (O, I) matrix that the model multiplies with, all fused parts."""
        stored = self.stored(param)
        return stored.T if self.transposed else stored

    def stored(self, param: Tensor) -> Tensor:
        """Return the matrix as it lies in the parameter, without its expert axis."""
        return param if self.expert is None else param[self.expert]
