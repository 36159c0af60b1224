"""Which blocks hold the outliers: the share of scores far above their block's mean.

A score is |W_ij| ||X_j||, and an outlier one above 5 times the mean of its block.

Source: Yin et al., Outlier Weighed Layerwise Sparsity (OWL).
Legend: O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmprune.allocation.outliers import outlier_share
from llmprune.allocation.types import Evidence
from llmprune.analysis.types import Chart, Finding, by_block

if TYPE_CHECKING:
    from llmprune.stats.types import Stats
    from llmprune.walk.block import Block

NAME, TITLE = "outliers", "Where the outliers are"
TIMES = 5.0  # the papers' M


def share_of_outliers(block: Block, stats: Mapping[str, Stats]) -> float | None:
    """Return the share of a block's scores above `TIMES` their mean; None where none was seen.

    `stats` holds `col_sq` of every tap.
    """
    evidence = {
        linear: Evidence(block.weight(linear), stats[tap.name])
        for tap in block.anatomy.taps
        if tap.name in stats
        for linear in tap.readers
    }
    found = outlier_share(evidence, outliers=TIMES)
    value = float(next(iter(found.values()))) if found else math.nan
    return value if math.isfinite(value) else None


def outlier_finding(
    pruned: Mapping[int, float | None], dense: Mapping[int, float | None]
) -> Finding:
    """Return the table by block; `dense` is empty where the dense model is not at hand."""
    rows = tuple(
        (block, dense.get(block), pruned.get(block)) for block in sorted({*dense, *pruned})
    )
    known = {block: share for block, share in (dense or pruned).items() if share is not None}
    if not known:
        return Finding(name=NAME, title=TITLE, means=("No token reached any linear.",))
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(known, pruned if dense else {}),
        columns=("block", "dense share", "pruned share"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title=f"Share of scores above {TIMES:g} times their block's mean",
                series=by_block(rows, {"dense": 1, "pruned": 2}),
                x_label="block",
                y_label="share",
            ),
        ),
        numbers={"highest": max(known.values()), "lowest": min(known.values())},
    )


def _means(known: Mapping[int, float], pruned: Mapping[int, float | None]) -> tuple[str, ...]:
    top = max(known, key=lambda block: known[block])
    low = min(known, key=lambda block: known[block])
    says = [
        f"Block {top} holds the most outliers ({known[top]:.2%} of its scores), block {low} the "
        f"fewest ({known[low]:.2%})."
    ]
    ratio = known[top] / known[low] if known[low] else math.inf
    if ratio > 2:
        says.append(
            f"They are {ratio:.1f} times as many: blocks are worth different amounts, and above "
            "about 60 % sparsity --method owl, which keeps more where outliers are, is worth a try."
        )
    else:
        says.append(
            f"That is {ratio:.1f} times as many, little: equal shares for all blocks suit this "
            "model, as far as outliers tell."
        )
    moved = {
        block: new - known[block]
        for block, new in pruned.items()
        if new is not None and block in known
    }
    if moved:
        block = max(moved, key=lambda each: abs(moved[each]))
        says.append(
            f"Pruning changed it most in block {block}, from {known[block]:.2%} to "
            f"{known[block] + moved[block]:.2%}; weights that are gone count as scores of 0, which "
            "lowers the mean."
        )
    return tuple(says)
