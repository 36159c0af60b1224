"""How much every block changes what passes through it: ShortGPT's block influence.

It is 1 less the mean over tokens of the cosine of a block's input and output.

Source: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmprune.analysis.types import Chart, Finding, by_block
from llmprune.stats.types import Stats

NAME, TITLE = "influence", "How much each block does (block influence)"


def block_influence(residual: Stats) -> float:
    """Return the influence of a block from the sums that `ResidualSums` collects.

    >>> import torch
    >>> block_influence(
    ...     Stats(num_tokens=2, values={"residual": torch.tensor([1.5, 0.0, 0.0, 2.0])}))
    0.25
    """
    sums = residual["residual"]
    return float(1 - sums[0] / sums[3])


def influence_finding(pruned: Mapping[int, float], dense: Mapping[int, float]) -> Finding:
    """Return the table by block; `dense` is empty where the dense model is not at hand."""
    rows = tuple(
        (block, dense.get(block), pruned.get(block)) for block in sorted({*dense, *pruned})
    )
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(pruned, dense),
        columns=("block", "dense influence", "pruned influence"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title="Block influence",
                series=by_block(rows, {"dense": 1, "pruned": 2}),
                x_label="block",
                y_label="1 - cosine of input and output",
            ),
        ),
        numbers={"lowest": min(pruned.values()), "highest": max(pruned.values())},
    )


def _means(pruned: Mapping[int, float], dense: Mapping[int, float]) -> tuple[str, ...]:
    low = min(pruned, key=lambda block: pruned[block])
    top = max(pruned, key=lambda block: pruned[block])
    says = [
        f"In the pruned model block {low} changes least of what passes through it "
        f"({pruned[low]:.3f}), block {top} most ({pruned[top]:.3f}). If whole blocks are to go, "
        f"--pattern blocks begins with those like block {low}."
    ]
    moved = {block: pruned[block] - dense[block] for block in pruned if block in dense}
    if moved:
        block = max(moved, key=lambda each: abs(moved[each]))
        verb = "more" if moved[block] > 0 else "less"
        says.append(
            f"Pruning changed the work of block {block} most: it does {verb} than in the dense "
            f"model ({dense[block]:.3f} before, {pruned[block]:.3f} now)."
        )
    if gone := sorted(set(dense) - set(pruned)):
        most = max(gone, key=lambda block: dense[block])
        says.append(
            f"Of the {len(gone)} blocks that went, block {most} did most ({dense[most]:.3f})."
        )
    return tuple(says)
