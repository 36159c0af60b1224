"""How far predictions are from the dense model's by place in the window: KL per position.

Legend: N windows, P predicted positions.
"""

from __future__ import annotations

import math
from itertools import pairwise

from llmprune.analysis.predictions import Predictions
from llmprune.analysis.types import Chart, Finding

NAME, TITLE = "kl", "How far predictions moved, by place in the text (KL)"
POINTS = 64  # of the picture; the table has every position


def position_finding(found: Predictions) -> Finding:
    """Return the table by position: mean KL, dense and pruned loss, all in nats."""
    sides = (found.kl_NP, found.dense_loss_NP, found.pruned_loss_NP)
    kl, dense, pruned = (side.double().mean(dim=0).tolist() for side in sides)
    rows = tuple(zip(range(1, len(kl) + 1), kl, dense, pruned, strict=True))
    agree = float((found.dense_best_NP == found.pruned_best_NP).double().mean())
    numbers = {
        "kl": sum(kl) / len(kl),
        "same token": agree,
        "dense perplexity": math.exp(sum(dense) / len(dense)),
        "pruned perplexity": math.exp(sum(pruned) / len(pruned)),
    }
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(kl, numbers),
        columns=("position", "kl", "dense loss", "pruned loss"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title="KL(dense || pruned), mean over windows",
                series={"KL": smoothed(kl)},
                x_label="tokens read",
                y_label="nats",
            ),
            Chart(
                kind="lines",
                title="Loss of the next token",
                series={"dense": smoothed(dense), "pruned": smoothed(pruned)},
                x_label="tokens read",
                y_label="nats",
            ),
        ),
        numbers=numbers,
    )


def smoothed(values: list[float], most: int = POINTS) -> list[tuple[float, float | None]]:
    """Return means of at most `most` equal stretches, each at the middle of its positions.

    >>> smoothed([1.0, 3.0, 5.0, 7.0], 2)
    [(1.5, 2.0), (3.5, 6.0)]
    """
    num = min(most, len(values))
    ends = [len(values) * k // num for k in range(num + 1)]
    return [((a + 1 + b) / 2, sum(values[a:b]) / (b - a)) for a, b in pairwise(ends)]


def _means(kl: list[float], numbers: dict[str, float]) -> tuple[str, ...]:
    first = (
        f"The pruned model's predictions are {numbers['kl']:.3f} nats from the dense model's, and "
        f"its likeliest next token is the same {numbers['same token']:.0%} of the time. Perplexity "
        f"on these windows is {numbers['pruned perplexity']:.2f} against "
        f"{numbers['dense perplexity']:.2f}."
    )
    if len(kl) < 8:
        return (first,)
    half, quarter = len(kl) // 2, len(kl) // 4
    early = sum(kl[quarter:half]) / (half - quarter)
    late = sum(kl[-quarter:]) / quarter
    ratio = late / early if early else 1.0
    if ratio > 1.15:
        second = (
            f"It drifts with length: over the last quarter of a window KL is {ratio:.2f} times "
            "that of the second quarter. Calibrate on longer windows (--seq-len) if texts are long."
        )
    elif ratio < 1 / 1.15:
        second = (
            f"More context helps it: over the last quarter of a window KL is {ratio:.2f} times "
            "that of the second quarter. Short prompts suffer most."
        )
    else:
        second = (
            f"It does not drift with length: over the last quarter of a window KL is {ratio:.2f} "
            "times that of the second quarter."
        )
    return (first, second)
