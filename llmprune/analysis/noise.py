"""How dense and pruned model take text with slips: perplexity at several rates of wrong characters.

A slip puts another letter in a letter's place, doubles a character, or drops it. What slips at a
low rate slips at every higher one in the same way, so rates differ in how many slips there are and
in nothing else. Both models read the same tokens, so their perplexities compare at every rate;
those of two rates do not, because noised text has other tokens.

Legend: N windows, T tokens, B windows of a micro-batch, t positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmprune.analysis.types import Chart, Finding
from llmprune.evaluation.windows import IGNORED, next_tokens
from llmprune.walk.forward import embed, logits, walk

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.walk.block import Blocks

NAME, TITLE = "robustness", "How it takes text with slips"
RATES = (0.0, 0.02, 0.05, 0.1)  # shares of characters


def noised(text: str, rate: float, seed: int) -> str:
    """Return a text in which a share `rate` of the characters has slipped.

    >>> noised("a quiet house", 0.0, 0)
    'a quiet house'
    """
    draw = random.Random(seed)
    out = []
    for letter in text:
        chance, kind, other = draw.random(), draw.randrange(3), draw.choice(string.ascii_lowercase)
        if chance >= rate:
            out.append(letter)
        elif kind == 0 and letter.isalpha():
            out.append(other)
        elif kind == 1:
            out.append(letter * 2)
    return "".join(out)


def losses(blocks: Blocks, inputs_NT: Tensor, micro_batch: int) -> Tensor:
    """Return the summed loss in nats of every window, float64 (N,), in one walk."""
    import torch

    stream = embed(blocks, inputs_NT, micro_batch)
    walk(blocks, stream)
    batches = next_tokens(inputs_NT).split(micro_batch)
    found = [torch.zeros(len(batch), dtype=torch.float64) for batch in batches]
    for batch, start, logits_BtV in logits(blocks, stream):
        wanted_Bt = batches[batch][:, start : start + logits_BtV.shape[1]]
        loss_Bt = torch.nn.functional.cross_entropy(
            logits_BtV.float().transpose(1, 2),
            wanted_Bt.to(logits_BtV.device),
            ignore_index=IGNORED,
            reduction="none",
        )
        found[batch] += loss_Bt.cpu().double().sum(dim=1)
    stream.hidden.close()
    return torch.cat(found)


def perplexities(losses_N: Tensor, num_windows: Sequence[int], seq_len: int) -> list[float]:
    """Return the perplexity of each stretch of windows, one stretch per rate.

    >>> import torch
    >>> perplexities(torch.tensor([math.log(2.0), math.log(4.0)]), [1, 1], 2)
    [2.0, 4.0]
    """
    parts = losses_N.split(list(num_windows))
    return [math.exp(min(700.0, float(part.sum()) / (len(part) * (seq_len - 1)))) for part in parts]


def noise_finding(
    pruned: Sequence[float], dense: Sequence[float] | None, *, rates: Sequence[float] = RATES
) -> Finding:
    """Return the table by rate; `dense` is None where it is not at hand or reads other tokens."""
    rows = tuple(
        (rate, dense[i] if dense else None, pruned[i], pruned[i] / dense[i] if dense else None)
        for i, rate in enumerate(rates)
    )
    series: Mapping[str, Sequence[float]] = {
        **({"dense": dense} if dense else {}),
        "pruned": pruned,
    }
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(pruned, dense, rates),
        columns=("rate", "dense perplexity", "pruned perplexity", "ratio"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title="Perplexity by share of wrong characters",
                series={
                    name: list(zip(rates, values, strict=True)) for name, values in series.items()
                },
                x_label="share of characters that slipped",
                y_label="perplexity",
            ),
        ),
        numbers={
            "clean": pruned[0],
            "noisiest": pruned[-1],
            **({"clean ratio": pruned[0] / dense[0]} if dense else {}),
            **({"noisiest ratio": pruned[-1] / dense[-1]} if dense else {}),
        },
    )


def _means(
    pruned: Sequence[float], dense: Sequence[float] | None, rates: Sequence[float]
) -> tuple[str, ...]:
    if not dense:
        return (
            f"With {rates[-1]:.0%} of the characters wrong the pruned model's perplexity is "
            f"{pruned[-1]:.2f}, on clean text {pruned[0]:.2f}. Without the dense model's beside it "
            "this does not tell what pruning did.",
        )
    clean, noisy = pruned[0] / dense[0], pruned[-1] / dense[-1]
    first = (
        f"On clean text the pruned model's perplexity is {clean:.2f} times the dense model's, with "
        f"{rates[-1]:.0%} of the characters wrong {noisy:.2f} times."
    )
    if noisy > 1.1 * clean:
        second = (
            "It has lost more on text with slips than a clean measurement shows: if your text is "
            "typed by people, calibrate on such text (--calib FILE)."
        )
    elif noisy < clean / 1.1:
        second = "Text with slips is hard for both, and the pruned model loses less there."
    else:
        second = "Text with slips harms both alike: pruning has not made the model more brittle."
    return (first, second)
