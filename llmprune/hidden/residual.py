"""What the residual stream holds, at every norm that stands on it, over all calibration tokens.

Legend: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from llmprune.calibration.replay import call
from llmprune.hidden.roles import Blueprint
from llmprune.stats.gram import GramMatrix
from llmprune.walk.block import Blocks
from llmprune.walk.forward import Stream, check_activation

_ROWS = 4096  # tokens that are cast to float64 at a time


@dataclass(frozen=True, kw_only=True)
class Residual:
    """Statistics of the stream: `gram_DD` for its principal axes, `activity_D` to choose channels.

    `num_tokens` counts a token once for every norm that it met.
    """

    gram_DD: Tensor
    activity_D: Tensor
    num_tokens: int


class ResidualGram:
    """Sum of X^T X over tokens at all norms, in float64 (on the host where a device has none).

    With `per_token` every token is divided by its root mean square before, as the norm that reads
    it does: then no token weighs more than another, and no block more than another, however large
    the stream has grown there.

    >>> seen = ResidualGram(per_token=False)
    >>> seen.update(torch.tensor([[2.0, 2.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]))
    >>> seen.result()
    tensor([[7., 5.],
            [5., 7.]], dtype=torch.float64)
    """

    def __init__(self, *, per_token: bool = True) -> None:
        self.per_token = per_token
        self._gram = GramMatrix()

    @property
    def num_tokens(self) -> int:
        return self._gram.num_tokens

    def update(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., D) as they enter a norm."""
        for part_TD in x.detach().reshape(-1, x.shape[-1]).split(_ROWS):
            home = "cpu" if part_TD.device.type == "mps" else part_TD.device
            wide_TD = part_TD.to(home, torch.float64)
            if self.per_token:
                mean_T1 = wide_TD.square().mean(dim=-1, keepdim=True)
                wide_TD = wide_TD / mean_T1.sqrt().clamp_(min=torch.finfo(torch.float32).tiny)
            self._gram.update(wide_TD)

    def merge(self, other: Self) -> None:
        """Add the sum of another accumulator."""
        self._gram.merge(other._gram)

    def result(self) -> Tensor:
        """Return gram_DD."""
        return self._gram.result()["gram"]


class ChannelActivity:
    """How much every channel of a norm's output says: sqrt(sum over sequences of (mean |a|)^2).

    One for each norm; their sum over norms is the score of a channel. Source: Muralidharan et al.,
    Minitron (2024), with "mean" over tokens and "l2" over sequences.

    >>> seen = ChannelActivity()
    >>> seen.update(torch.tensor([[[3.0, 0.0]], [[-4.0, 1.0]]]))
    >>> seen.result()
    tensor([5., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._sum_D: Tensor | None = None

    def update(self, a_BTD: Tensor) -> None:
        """Add sequences as a norm gave them out."""
        mean_BD = a_BTD.detach().abs().mean(dim=-2, dtype=torch.float32).to("cpu", torch.float64)
        added_D = mean_BD.square().sum(dim=0)
        self._sum_D = added_D if self._sum_D is None else self._sum_D + added_D

    def merge(self, other: Self) -> None:
        """Add the sequences of another accumulator."""
        if other._sum_D is not None:
            own_D = self._sum_D
            self._sum_D = other._sum_D.clone() if own_D is None else own_D + other._sum_D

    def result(self) -> Tensor:
        """Return activity_D, float64."""
        assert self._sum_D is not None
        return self._sum_D.sqrt()


def survey_residual(
    blocks: Blocks, stream: Stream, blueprint: Blueprint, *, per_token: bool = True
) -> Residual:
    """Send hidden states through all blocks and the last norm; return what the stream held.

    A block with one norm for both halves is seen at one point, others at two. The hidden states of
    `stream` are those after all blocks in the end.

    Raises:
        NumericalError: an activation is not finite; names the block.
    """
    gram = ResidualGram(per_token=per_token)
    activities: list[ChannelActivity] = []
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            norms = [name for name, _ in block.module.named_parameters() if name in blueprint.norms]
            with torch.no_grad(), _watched(block.module, norms, gram) as seen:
                for batch, arguments in enumerate(stream.arguments):
                    hidden = stream.hidden.get(batch, block.device)
                    output = call(block.module, hidden, arguments[index])
                    check_activation(output, f"output of block {index}")
                    stream.hidden.set(batch, output)
            activities += seen
    with torch.no_grad(), blocks.trunk(head=True) as model:
        with _watched(model, [blueprint.norm], gram) as seen:
            norm = model.get_submodule(blueprint.norm.removesuffix(".weight"))
            for batch in range(len(stream)):
                norm(stream.hidden.get(batch, blocks.device))
        activities += seen
    activity_D = torch.stack([each.result() for each in activities]).sum(dim=0)
    return Residual(gram_DD=gram.result(), activity_D=activity_D, num_tokens=gram.num_tokens)


@contextmanager
def _watched(module: Any, norms: list[str], gram: ResidualGram) -> Iterator[list[ChannelActivity]]:
    """Watch what goes into and comes out of norms, named by their weights."""
    seen = [ChannelActivity() for _ in norms]
    hooks = []
    for name, activity in zip(norms, seen, strict=True):

        def note(_: Any, args: Any, out: Tensor, activity: ChannelActivity = activity) -> None:
            gram.update(args[0])
            activity.update(out)

        hooks.append(module.get_submodule(name.removesuffix(".weight")).register_forward_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
