"""How alike hidden states of dense and pruned model are after every block: linear CKA.

CKA is ||X'Y||^2 / (||X'X|| ||Y'Y||) of centred hidden states: 1 where one is a turned and scaled
copy of the other, towards 0 where they have nothing in common; widths may differ. The sums run over
tokens, so hidden states are never in memory together. A few very large channels weigh much in it.

Source: Kornblith et al., Similarity of Neural Network Representations Revisited, section 3.
Legend: T tokens, D and E hidden sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmprune.analysis.types import Chart, Finding, by_block

NAME, TITLE = "cka", "How far hidden states moved (CKA)"
NEAR = 0.95  # below it a block is called moved


class CrossGram:
    """Running sums of two sets of hidden states over tokens, in float64.

    >>> sums = CrossGram()
    >>> sums.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]))
    >>> sums.add(torch.tensor([[3.0]]), torch.tensor([[4.0]]))
    >>> round(sums.cka(), 6)  # 3^2 / (2 * 42 / 9), the squared correlation
    0.964286
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.sums: list[Tensor] = []

    def add(self, one_TD: Tensor, two_TE: Tensor) -> None:
        """Add tokens, whatever axes precede the last."""
        x_TD, y_TE = (_wide(each).flatten(0, -2) for each in (one_TD, two_TE))
        found = [x_TD.sum(0), y_TE.sum(0), x_TD.T @ x_TD, y_TE.T @ y_TE, x_TD.T @ y_TE]
        if not self.sums:
            self.sums = found
        else:
            for total, more in zip(self.sums, found, strict=True):
                total += more
        self.num_tokens += len(x_TD)

    def cka(self) -> float:
        """Return linear CKA, in [0, 1]; 0 where one side does not vary."""
        x_D, y_E, xx_DD, yy_EE, xy_DE = self.sums
        num = self.num_tokens
        pairs = ((xx_DD, x_D, x_D), (yy_EE, y_E, y_E), (xy_DE, x_D, y_E))
        own, other, both = (float((sums - torch.outer(a, b) / num).norm()) for sums, a, b in pairs)
        return min(1.0, both * both / (own * other)) if own * other > 0 else 0.0


def alignment_finding(found: Sequence[tuple[int, float, bool]]) -> Finding:
    """Return the table by block of the dense model: block, CKA, and whether the block is left."""
    rows = tuple((block, cka, "yes" if left else "no") for block, cka, left in found)
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(found),
        columns=("block", "cka", "is left"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title="CKA of hidden states, dense and pruned, after each block",
                series=by_block(rows, {"cka": 1}),
                x_label="block",
                y_label="CKA",
            ),
        ),
        numbers={"lowest": min(cka for _, cka, _ in found), "last": found[-1][1]},
    )


def _means(found: Sequence[tuple[int, float, bool]]) -> tuple[str, ...]:
    block, low, _ = min(found, key=lambda row: row[1])
    says = [
        f"The hidden states after block {block} are furthest from the dense model's (CKA "
        f"{low:.3f}; 1 is the same up to rotation and scale)."
    ]
    falls = [
        (a - b, row)
        for row, a, b in zip(
            found, [1.0] + [c for _, c, _ in found], [c for _, c, _ in found], strict=False
        )
    ]
    fall, (at, cka, left) = max(falls, key=lambda pair: pair[0])
    if low >= NEAR:
        says.append("No block has moved far; what quality was lost, was not lost in one place.")
    elif not left:
        says.append(
            f"Most of it came at block {at}, which was removed (it falls by {fall:.3f} "
            f"there): if quality matters, keep this one."
        )
    else:
        says.append(
            f"Most of it came in block {at} (it falls by {fall:.3f} there, to {cka:.3f}): if "
            f"quality matters, give this block more weights, by prune.sparsities for '*.{at}.*', "
            "or let prune.allocation (owl, for one) find what each is worth."
        )
    last = found[-1][1]
    if last > low + 0.02:
        says.append(f"After the last block it is {last:.3f} again: later blocks make up for some.")
    return tuple(says)


def _wide(hidden_TD: Tensor) -> Tensor:
    """Return values in float64, where the device has that."""
    return (hidden_TD.cpu() if hidden_TD.device.type == "mps" else hidden_TD).double()
