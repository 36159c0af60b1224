"""Dense and pruned model walked side by side: one block of each in memory, looked at in passing.

Legend: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmprune.analysis.alignment import CrossGram
from llmprune.analysis.concentrations import Concentration, concentration
from llmprune.analysis.influences import block_influence
from llmprune.analysis.outstanding import share_of_outliers
from llmprune.analysis.predictions import Predictions, predict
from llmprune.analysis.reach import Dead, Reach, reach_of
from llmprune.walk.block import Block
from llmprune.walk.forward import Stream, embed
from llmprune.walk.observation import observe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.walk.streamed import Streamed

Masks = Callable[[Block], Mapping[str, "Tensor"]]


@dataclass(kw_only=True)
class Notes:
    """What was seen of one model, by the numbers that the dense model's blocks have."""

    concentrations: list[Concentration] = field(default_factory=list)
    outliers: dict[int, float | None] = field(default_factory=dict)
    influences: dict[int, float] = field(default_factory=dict)
    dead: list[Dead] = field(default_factory=list)
    reach: list[Reach] = field(default_factory=list)


@dataclass(kw_only=True)
class Seen:
    """What was seen of both models; `alignment` has (block, CKA, whether it is left)."""

    pruned: Notes = field(default_factory=Notes)
    dense: Notes = field(default_factory=Notes)
    alignment: list[tuple[int, float, bool]] = field(default_factory=list)
    predictions: Predictions | None = None


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model to be walked: its windows (None reads no text), and which masks it has.

    `numbers` are, for every block, the number that the dense model's block has.
    """

    blocks: Streamed
    ids_NT: Tensor | None
    numbers: Sequence[int]
    masks: Masks = lambda block: {}

    def stream(self, micro_batch: int) -> Stream | None:
        """Return the embedded windows."""
        return None if self.ids_NT is None else embed(self.blocks, self.ids_NT, micro_batch)


def walk_together(
    pruned: Side,
    dense: Side | None,
    wanted: frozenset[str],
    *,
    micro_batch: int = 1,
    passed: Callable[[str], None] = lambda label: None,
) -> Seen:
    """Look at all blocks of one model or of two; `wanted` names the analyses.

    Both read the same tokens where hidden states (`cka`) or predictions (`kl`, `worst`) are wanted.
    Calls `passed` after every block.

    Raises:
        NumericalError: an activation is not finite.
    """
    seen = Seen()
    flow = pruned.stream(micro_batch)
    beside = dense.stream(micro_batch) if dense else None
    places = {number: place for place, number in enumerate(pruned.numbers)}
    for number in dense.numbers if dense else pruned.numbers:
        if dense is not None:
            _visit(dense, number, number, beside, seen.dense, wanted - {"dead"})
        if number in places:
            _visit(pruned, places[number], number, flow, seen.pruned, wanted)
        if "cka" in wanted and flow is not None and beside is not None:
            cka = _cka(beside, flow, pruned.blocks.device)
            seen.alignment.append((number, cka, number in places))
        passed(f"block {number}")
    if {"kl", "worst"} & wanted and dense is not None and flow and beside:
        assert pruned.ids_NT is not None
        sides = (dense.blocks, pruned.blocks)
        seen.predictions = predict(*sides, (beside, flow), pruned.ids_NT, micro_batch)
    for stream in (flow, beside):
        if stream is not None:
            stream.hidden.close()
    return seen


def _visit(
    side: Side,
    place: int,
    number: int,
    stream: Stream | None,
    notes: Notes,
    wanted: frozenset[str],
) -> None:
    """Open one block, note what is wanted of it, and send the hidden states through it."""
    with side.blocks.open(place) as block:
        if {"pq", "dead"} & wanted:
            masks = side.masks(block)
        if "pq" in wanted:
            for linear in block.anatomy.linears:
                found = concentration(number, linear, block.weight(linear), masks.get(linear))
                notes.concentrations.append(found)
        if "dead" in wanted:
            dead, reach = reach_of(block, masks)
            notes.dead += [each._replace(block=number) for each in dead]
            notes.reach += [each._replace(block=number) for each in reach]
        if stream is None:
            return
        taps = block.anatomy.taps if "outliers" in wanted else ()
        seen = observe(block, stream, {tap.name: ("col_sq",) for tap in taps}, dense=True)
        assert seen.residual is not None
        notes.influences[number] = block_influence(seen.residual)
        if "outliers" in wanted:
            notes.outliers[number] = share_of_outliers(block, seen.stats)


def _cka(one: Stream, other: Stream, device: torch.device) -> float:
    """Return CKA of the hidden states of two streams."""
    sums = CrossGram()
    for batch in range(len(one)):
        sums.add(one.hidden.get(batch, device), other.hidden.get(batch, device))
    return sums.cka()
