"""What a repair is: it improves a whole block in place, after the cut and before it is stored.

Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmprune.calibration.hidden import HiddenStates
from llmprune.solver.types import Fact
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream


@dataclass(frozen=True, kw_only=True)
class Work:
    """A block that was cut, and what a repair may look at.

    `stream` holds the block's inputs, as its stored predecessors make them; they stay as they are.
    `seen` is what `Repair.watch` returned of the block before it was cut. `keep` are the masks by
    linear (name relative to the block, True = kept). `decide` observes and cuts the block again, as
    its weights are now, and returns the new masks; `undo` makes the first decision count again,
    whose weights the repair puts back itself. `seed` is a number of the run's and the block.
    `dense` is there for a repair that asks for it: what this block gives in the dense model.
    `touch` hears of parameters that changed beside those of `keep`, such as norms.

    For a repair that chooses masks itself: `within` is how many consecutive inputs of a row make a
    group that keeps as many as it does, all of them if None. `reordered` puts what was seen of
    linears, by name, in the order in which the cut may have put their rows and columns. `remask`
    makes masks by linear count instead of the first decision's.
    """

    block: Block
    stream: Stream
    seen: Any
    keep: Mapping[str, Tensor]
    decide: Callable[[], Mapping[str, Tensor]]
    seed: int
    options: Mapping[str, float]
    dense: HiddenStates | None = None
    undo: Callable[[], None] = lambda: None
    touch: Callable[[set[str]], None] = lambda params: None
    within: int | None = None
    reordered: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda known: known
    remask: Callable[[Mapping[str, Tensor]], None] = lambda keep: None


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One row of the table of repairs.

    `watch(block, stream, options, seed)` looks at the block before it is cut and changes nothing.
    `fn(work)` edits weights of `work.block` in place, so that every pruned weight is 0 at the end,
    and returns what the report says of it. It leaves the block as it was where it does not help.
    With `dense` the engine walks the dense model alongside, for `Work.dense`. `passes(options)` is
    what it costs, in forwards of the calibration tokens through the block. With `swaps` it
    exchanges single weights, which patterns of whole tiles do not have.
    """

    watch: Callable[[Block, Stream, Mapping[str, float], int], Any]
    fn: Callable[[Work], Mapping[str, Fact]]
    paper: str
    passes: Callable[[Mapping[str, float]], float]
    options: Mapping[str, float] = field(default_factory=dict)
    dense: bool = False
    swaps: bool = False
