"""How concentrated the weights of every linear are: the PQ index, dense and pruned.

The index is 1 - d^(1/q - 1/p) ||w||_p / ||w||_q of the d weights that are left: 0 where all are
equally large, towards 1 where few hold everything. A concentrated linear can spare more.

Source: Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective.
Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmprune.allocation.concentration import pq_index
from llmprune.analysis.types import Chart, Finding
from llmprune.stats.types import Stats

if TYPE_CHECKING:
    from torch import Tensor

NAME, TITLE = "pq", "How concentrated the weights are (PQ index)"
COLUMNS = ("block", "linear", "dense pq", "pruned pq", "weights left", "share removed")


class Concentration(NamedTuple):
    """The PQ index (p = 1, q = 2) of the weights that are left in a linear; counts of weights."""

    block: int
    linear: str
    pq: float
    num_left: int
    num_weights: int


def concentration(
    block: int, linear: str, weight_OI: Tensor, keep_OI: Tensor | None = None
) -> Concentration:
    """Return the PQ index of a linear; `keep_OI` says what is left, by default what is not zero.

    >>> import torch
    >>> round(concentration(0, "q", torch.tensor([[3.0, 4.0, 0.0]])).pq, 6)  # 1 - 7 / (5 2^0.5)
    0.010051
    """
    left_OI = (weight_OI != 0) if keep_OI is None else keep_OI
    index, num = pq_index(weight_OI, Stats(num_tokens=0, values={}), left_OI, p=1.0, q=2.0).tolist()
    return Concentration(block, linear, index, round(num), weight_OI.numel())


def concentration_finding(
    pruned: Sequence[Concentration], dense: Sequence[Concentration]
) -> Finding:
    """Return the table by linear; `dense` is empty where the dense model is not at hand.

    What is said of the dense model's linears holds for the pruned one's where that is missing.
    """
    before = {(each.block, each.linear): each for each in dense}
    after = {(each.block, each.linear): each for each in pruned}
    rows = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        num = old.num_weights if old else new.num_weights if new else 0
        left = new.num_left if new else 0
        rows.append((*key, old and old.pq, new and new.pq, left, 1 - left / num if num else None))
    rows.sort(key=lambda row: int(row[0]))
    ranked = sorted(before.values() or after.values(), key=lambda each: -each.pq)
    if not ranked:
        return Finding(name=NAME, title=TITLE, means=("There are no linears to look at.",))
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(ranked, after, dense=bool(before)),
        columns=COLUMNS,
        rows=tuple(rows),
        charts=_charts(pruned, dense),
        numbers={
            "highest": ranked[0].pq,
            "lowest": ranked[-1].pq,
            "mean": sum(each.pq for each in ranked) / len(ranked),
        },
    )


def _means(
    ranked: Sequence[Concentration],
    after: dict[tuple[int, str], Concentration],
    *,
    dense: bool,
) -> tuple[str, ...]:
    top, low = ranked[0], ranked[-1]
    of = "dense" if dense else "pruned"
    first = (
        f"In the {of} model the weights of block {top.block}, {top.linear} are the most "
        f"concentrated (PQ {top.pq:.3f}): few hold most, so it can spare more than others. "
        f"Those of block {low.block}, {low.linear} are the most even (PQ {low.pq:.3f}), where "
        "every cut costs about the same."
    )
    tenth = max(1, len(ranked) // 10)
    gone = [_removed(part, after) for part in (ranked[:tenth], ranked[-tenth:])]
    if gone[0] - gone[1] > 0.02:
        second = (
            f"What was removed follows this: {gone[0]:.0%} of the most concentrated tenth of the "
            f"linears and {gone[1]:.0%} of the most even tenth."
        )
    else:
        second = (
            f"What was removed does not follow this: {gone[0]:.0%} of the most concentrated tenth "
            f"of the linears and {gone[1]:.0%} of the most even tenth. To try it: "
            "--set prune.allocation=pq."
        )
    return (first, second)


def _removed(
    linears: Sequence[Concentration], after: dict[tuple[int, str], Concentration]
) -> float:
    """Return the share of their weights that these linears have lost."""
    left = sum(
        new.num_left
        for each in linears
        if (new := after.get((each.block, each.linear))) is not None
    )
    total = sum(each.num_weights for each in linears)
    return 1 - left / total if total else 0.0


def _charts(pruned: Sequence[Concentration], dense: Sequence[Concentration]) -> tuple[Chart, ...]:
    return tuple(
        Chart(
            kind="heat",
            title=f"PQ index of the {name} model's weights",
            series=_grid(found),
            x_label="block",
            y_label="linear",
            names=tuple(str(block) for block in sorted({each.block for each in found})),
        )
        for name, found in (("dense", dense), ("pruned", pruned))
        if found
    )


def _grid(found: Sequence[Concentration]) -> dict[str, list[tuple[float, float | None]]]:
    """Return the indices by linear, a value per block; experts of a kind as their mean."""
    blocks = sorted({each.block for each in found})
    kinds: dict[str, dict[int, list[float]]] = {}
    for each in found:
        kind = ".".join("*" if part.isdigit() else part for part in each.linear.split("."))
        kinds.setdefault(kind, {}).setdefault(each.block, []).append(each.pq)
    return {
        kind: [
            (float(place), sum(row[block]) / len(row[block]) if block in row else None)
            for place, block in enumerate(blocks)
        ]
        for kind, row in kinds.items()
    }
