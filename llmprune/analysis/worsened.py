"""Which tokens the pruned model predicts worse than the dense one, with what stood before them.

Legend: N windows, T tokens, P predicted positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmprune.analysis.predictions import Predictions
from llmprune.analysis.types import Chart, Finding

if TYPE_CHECKING:
    from torch import Tensor

NAME, TITLE = "worst", "The tokens that got worst"
MOST, CONTEXT = 24, 24  # tokens that are shown, and tokens before each
COLUMNS = ("window", "position", "extra loss", "before", "token", "dense says", "pruned says")
FEW = 20  # tokens of a kind below which nothing is said of it


def worst_places(extra_NP: Tensor, most: int) -> list[tuple[int, int]]:
    """Return (window, position) of the largest values, of equal ones the first.

    >>> worst_places(torch.tensor([[0.0, 2.0], [3.0, 2.0]]), 2)
    [(1, 0), (0, 1)]
    """
    order = extra_NP.flatten().sort(descending=True, stable=True).indices[:most].tolist()
    return [divmod(place, extra_NP.shape[1]) for place in order]


def share_of_worst(extra_NP: Tensor, share: float = 0.01) -> float:
    """Return how much of the sum of all increases comes from the largest `share` of positions.

    >>> share_of_worst(torch.tensor([[3.0, 1.0, -5.0, 0.0]]), 0.25)
    0.75
    """
    risen = extra_NP.flatten().double().clamp(min=0).sort(descending=True).values
    total = float(risen.sum())
    return float(risen[: max(1, math.ceil(share * len(risen)))].sum()) / total if total else 0.0


def kind_of(text: str) -> str:
    """Return what kind of token a text is.

    >>> [kind_of(text) for text in (" 12", "The", " the", "ing", ".", "\\n")]
    ['numbers', 'capitalised', 'beginnings of words', 'inside words', 'punctuation', 'white space']
    """
    bare = text.strip()
    if not bare:
        return "white space"
    if bare[0].isdigit():
        return "numbers"
    if not any(letter.isalnum() for letter in bare):
        return "punctuation"
    if bare[0].isupper():
        return "capitalised"
    return "beginnings of words" if text[0].isspace() else "inside words"


def worst_finding(found: Predictions, ids_NT: Tensor, tokenizer: Any) -> Finding:
    """Return the table of the tokens whose loss rose most, and what rose by kind of token."""
    extra_NP = found.pruned_loss_NP - found.dense_loss_NP

    def word(token: int) -> str:
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def row(window: int, place: int) -> tuple[int, int, float, str, str, str, str]:
        before = ids_NT[window, max(0, place + 1 - CONTEXT) : place + 1].tolist()
        return (
            window,
            place + 1,
            float(extra_NP[window, place]),
            str(tokenizer.decode(before)),
            word(int(ids_NT[window, place + 1])),
            word(int(found.dense_best_NP[window, place])),
            word(int(found.pruned_best_NP[window, place])),
        )

    kinds = extra_by_kind(extra_NP, ids_NT, word)
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(extra_NP, kinds),
        columns=COLUMNS,
        rows=tuple(row(*place) for place in worst_places(extra_NP, MOST)),
        charts=(
            Chart(
                kind="bars",
                title="How much the loss rose, by kind of token",
                series={"extra loss": [(float(i), kind[1]) for i, kind in enumerate(kinds)]},
                x_label="nats per token",
                y_label="",
                names=tuple(name for name, _, _ in kinds),
            ),
        ),
        numbers={
            "mean extra loss": float(extra_NP.double().mean()),
            "share of the worst hundredth": share_of_worst(extra_NP),
        },
    )


def extra_by_kind(
    extra_NP: Tensor, ids_NT: Tensor, word: Callable[[int], str]
) -> list[tuple[str, float, int]]:
    """Return (kind, mean increase in nats, tokens) of the predicted tokens, the most first."""
    targets_NP = ids_NT[:, 1:]
    kinds: dict[str, list[Tensor]] = {}
    for token in targets_NP.unique().tolist():
        kinds.setdefault(kind_of(word(token)), []).append(extra_NP[targets_NP == token])
    found = []
    for name in sorted(kinds):
        values = torch.cat(kinds[name]).double()
        found.append((name, float(values.mean()), len(values)))
    return sorted(found, key=lambda row: -row[1])


def _means(extra_NP: Tensor, kinds: Sequence[tuple[str, float, int]]) -> tuple[str, ...]:
    share, mean = share_of_worst(extra_NP), float(extra_NP.double().mean())
    better = float((extra_NP < 0).double().mean())
    says = [
        f"A token costs {mean:.3f} nats more on average; {better:.0%} of them are even predicted "
        f"better. The worst hundredth carries {share:.0%} of all that rose: the damage is "
        + ("concentrated in few places." if share > 0.15 else "spread over many places.")
    ]
    common = [row for row in kinds if row[2] >= FEW]
    if len(common) > 1:
        (top, most, _), (low, least, _) = common[0], common[-1]
        says.append(
            f"By kind of token, {top} got worst (+{most:.3f} nats) and {low} least "
            f"({least:+.3f}); if that is what your use depends on, calibrate on text that has much "
            "of it: --calib FILE."
        )
    return tuple(says)
