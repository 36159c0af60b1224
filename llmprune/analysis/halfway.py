"""Whether two results lie in one basin: the loss along the straight line between their weights.

Where it hardly rises, the two found the same solution, and their average is one as well. The
barrier is the most that the loss lies above the straight line between the losses of the two ends.

Source: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.analysis.types import Chart, Finding

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.arch.types import Family
    from llmprune.walk.block import Block, Blocks

NAME, TITLE = "between", "Between two results"
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
FLAT = 0.02  # nats: what Frankle et al. call stable is 2 % of error; here a perplexity 2 % higher


@dataclass(frozen=True, kw_only=True)
class Blend:
    """The blocks of (1 - t) one + t other, opened one at a time; `one` and `other` are not open."""

    one: Blocks
    other: Blocks
    t: float

    def __len__(self) -> int:
        return len(self.one)

    @property
    def model(self) -> Any:
        return self.one.model

    @property
    def family(self) -> Family:
        return self.one.family

    @property
    def device(self) -> torch.device:
        return self.one.device

    @property
    def modules(self) -> Any:
        return self.one.modules

    @contextmanager
    def open(self, index: int) -> Iterator[Block]:
        """Open a block of both and blend it."""
        with self.one.open(index) as block, self.other.open(index) as beside:
            self._blend(block.module, beside.module)
            yield block

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        """Open the trunk of both and blend it."""
        with self.one.trunk(head=head) as model, self.other.trunk(head=head) as beside:
            self._blend(model, beside)
            yield model

    def _blend(self, module: Any, beside: Any) -> None:
        others = dict(beside.named_parameters())
        for name, value in module.named_parameters():
            other = others[name]
            if value.device.type != "meta" and value.is_floating_point():
                value.data = between(value.data, other.data, self.t)


def between(one: Tensor, other: Tensor, t: float) -> Tensor:
    """Return (1 - t) one + t other, exact at both ends.

    >>> between(torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0]), 0.25).tolist()
    [1.0, 2.0]
    """
    if t in (0.0, 1.0):
        return other if t else one
    return torch.lerp(one, other, t)


def why_not(one: Blocks, other: Blocks) -> str | None:
    """Say why there is no line between two models; None where there is one."""
    shapes = [
        {name: tuple(value.shape) for name, value in side.model.named_parameters()}
        for side in (one, other)
    ]
    missing = sorted(shapes[0].keys() ^ shapes[1].keys())
    if missing:
        return f"only one of the two has {missing[0]}, and a line needs the same parameters"
    for name, shape in shapes[0].items():
        if shape != shapes[1][name]:
            return (
                f"{name} is {list(shape)} in one and {list(shapes[1][name])} in the other, and a "
                "line needs equal shapes"
            )
    return None


def barrier(losses: Sequence[float], points: Sequence[float] = POINTS) -> tuple[float, float]:
    """Return (rise in nats, t) where the loss is furthest above the line between its ends.

    >>> barrier([1.0, 1.5, 2.0], [0.0, 0.5, 1.0]), barrier([1.0, 2.0, 2.0], [0.0, 0.5, 1.0])
    ((0.0, 0.0), (0.5, 0.5))
    """
    first, last = losses[0], losses[-1]
    rises = [(loss - (1 - t) * first - t * last, t) for loss, t in zip(losses, points, strict=True)]
    return max(rises, key=lambda pair: pair[0])


def between_finding(
    losses: Sequence[float], shared: float | None, *, names: tuple[str, str]
) -> Finding:
    """Return the table along the line, from mean losses in nats at `POINTS`.

    `shared` is the share of the masks' removed weights that both removed; None without masks.
    """
    rise, at = barrier(losses)
    rows = tuple(
        (t, loss, math.exp(min(700.0, loss))) for t, loss in zip(POINTS, losses, strict=True)
    )
    return Finding(
        name=NAME,
        title=TITLE,
        means=_means(losses, rise, at, shared, names),
        columns=("t", "loss", "perplexity"),
        rows=rows,
        charts=(
            Chart(
                kind="lines",
                title="Loss along the line between the two results",
                series={"loss": [(t, loss) for t, loss, _ in rows]},
                x_label="0 is the first, 1 the second",
                y_label="nats",
            ),
        ),
        numbers={"barrier": rise, "at": at, **({} if shared is None else {"shared": shared})},
    )


def _means(
    losses: Sequence[float], rise: float, at: float, shared: float | None, names: tuple[str, str]
) -> tuple[str, ...]:
    middle = losses[POINTS.index(0.5)]
    if rise <= FLAT:
        best = min(losses[0], losses[-1])
        first = (
            f"{names[0]} and {names[1]} lie in one basin: along the line between them the loss "
            f"rises by {max(rise, 0.0):.3f} nats. Their average has a loss of {middle:.3f}, "
            + (
                "lower than either, so averaging the two helps."
                if middle < best
                else f"and the better of the two {best:.3f}."
            )
        )
    else:
        first = (
            f"{names[0]} and {names[1]} are different solutions: the loss rises by {rise:.3f} nats "
            f"at t = {at:g}. Do not average them; and what one seed gives need not hold for others."
        )
    if shared is None or shared == 1.0:
        return (first,)
    return (
        first,
        f"Of the weights that either removed, both removed {shared:.0%}: between them weights are "
        "kept that one of them has lost.",
    )
