"""What a family of models looks like, as data: spans, sites, taps, couplings, fused parameters.

All names of linears are relative to their block (`self_attn.q_proj`); O = out, I = in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

RANK = "rank"
Axis = Literal["weight", "out", "in", "all"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of one linear that units own: single weights, rows, columns, or all of it.

    Of rows ("out") and columns ("in") unit u owns `width`, from `offset + u * width` on: several
    spans may lie in one linear, as those of a fused query-key-value do. "all" belongs to one unit.
    """

    linear: str
    axis: Axis
    width: int = 1
    offset: int = 0
    unit: int = 0


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linears whose mask is decided together; `unit_cost` is in parameters per unit.

    `kind` says what a unit is: a weight (or tile) of one linear, whose `shape` is (O, I), or a unit
    of the coupling of that name, whose site has no shape. A unit of kind "rank" is one value
    between the two linears that one becomes, up to as many as make these as large as it was. Units
    compete within `num_groups` equal groups, which lose equally many. The number of units that stay
    is a multiple of `grid`, and `least` at least; `entry` is that of the config which counts them.
    """

    name: str
    block: int
    spans: tuple[Span, ...]
    num_units: int
    unit_cost: int
    shape: tuple[int, int] | None = None
    kind: str = "weight"
    num_groups: int = 1
    grid: int = 1
    least: int = 1
    entry: str = ""

    @property
    def num_weights(self) -> int:
        """Return the number of weights that the units of this site cover."""
        if self.kind == RANK and self.shape is not None:
            return self.shape[0] * self.shape[1]
        return self.num_units * self.unit_cost

    def freed(self, count: int) -> int:
        """Return the weights that are gone once `count` units are.

        A linear that loses no rank stays whole; two linears leave over what fills no further rank.
        """
        if self.kind == RANK and count:
            return self.num_weights - (self.num_units - count) * self.unit_cost
        return count * self.unit_cost


@dataclass(frozen=True, kw_only=True)
class Tap:
    """An activation read by one or more linears; statistics are collected once per tap."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What of several linears moves together when a unit is dropped; one kind of unit of a block.

    Units compete within `num_groups` equal, consecutive groups, which lose equally many.
    `config_keys` are the entries of the config that count units, with how many each unit counts,
    and `pinned` those that must be said once a count changes, with their value. `module_sizes` are
    attributes of modules (path relative to the block, attribute, count per unit) that hold such
    counts, and `vectors` parameters without rows and columns that have entries per unit. The number
    of units that stay is a multiple of `grid`, and `least` at least. The name is that of the kind
    and, of kinds that a block has several of, a number: `expert-channels.3`.
    """

    name: str
    spans: tuple[Span, ...]
    num_units: int
    num_groups: int = 1
    grid: int = 1
    least: int = 1
    config_keys: tuple[tuple[str, int], ...] = ()
    pinned: tuple[tuple[str, int], ...] = ()
    vectors: tuple[tuple[str, int], ...] = ()
    module_sizes: tuple[tuple[str, str, int], ...] = ()

    @property
    def kind(self) -> str:
        """Return the kind of unit."""
        return self.name.partition(".")[0]

    @property
    def reader(self) -> str | None:
        """Return the linear that reads the units as columns, if there is one."""
        return next((span.linear for span in self.spans if span.axis == "in"), None)


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """Where the channels of a family's feed-forward half lie.

    Rows of each of `wide` (in `parts` equal parts, one after the other, where gate and up are
    fused) write them, columns of `narrow` read them; `config_key` counts them.
    """

    wide: tuple[str, ...]
    narrow: str
    config_key: str = "intermediate_size"
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where the heads of a family's attention lie.

    Query, key and value are linears of their own, or rows of a fused one: all of one after all of
    another ("stacked"), or key/value group by group, the group's queries first ("grouped").
    `heads_key` and `groups_key` count query heads and key/value heads in the config; without
    `groups_key` every head has its own key and value. `dim_key` is the entry that keeps the size
    of a head when their number changes.
    """

    query: str
    key: str
    value: str
    output: str
    layout: Literal["apart", "stacked", "grouped"] = "apart"
    heads_key: str = "num_attention_heads"
    groups_key: str | None = "num_key_value_heads"
    dim_key: str | None = "head_dim"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one model: query heads, key/value heads, values of a head.

    Where they `differ`, blocks may have fewer, as many as their linears have room for.
    """

    num_heads: int
    num_groups: int
    head_dim: int
    differ: bool = False

    @property
    def per_group(self) -> int:
        """Return the query heads that share one key/value head."""
        return self.num_heads // self.num_groups


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What a config says of its mixtures of experts.

    A token meets `active` of `num_experts`, which `count_key` counts. Where the router first
    chooses `top_groups` of `num_groups` equal, consecutive groups, each needs `least` experts.
    `widths` are the entries that may count the channels of an expert. Shared experts are as many
    times as wide as their number, unless an entry of the config counts their channels `apart`.
    """

    num_experts: int
    count_key: str
    active: int
    widths: tuple[tuple[str, int], ...]
    num_shared: int = 0
    apart: bool = False
    num_groups: int = 1
    top_groups: int = 1
    least: int = 1


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

    `blocks` is the path of the list of blocks. Taps and halves of all kinds of block stand side by
    side: a block has those whose linears it holds. `returns` is the length of the tuple that a
    block's forward returns, hidden states first; 0 where it returns these alone. `seen` is set by
    the probe: the parameters of the blocks it has looked at. `heads` and `mixture` are those of the
    model at hand, from its config; a row of the table has none.
    """

    model_types: tuple[str, ...]
    blocks: str
    taps: tuple[Tap, ...]
    ffns: tuple[Ffn, ...] = ()
    attentions: tuple[Attention, ...] = ()
    unfuse: tuple[Unfuse, ...] = ()
    returns: int = 0
    seen: frozenset[str] | None = None
    heads: Heads | None = None
    mixture: Mixture | None = None


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
