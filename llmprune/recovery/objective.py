"""What a micro-batch is trained towards: the next token, and what the dense model says of it.

Legend: B windows of a micro-batch, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from llmprune.base.errors import RecipeError
from llmprune.evaluation.windows import IGNORED
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.teacher import TeacherCache

if TYPE_CHECKING:
    from torch import Tensor


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return the negative log-likelihood of targets in nats, summed, in float32."""
    return cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORED,
        reduction="sum",
    )  # fmt: skip


@dataclass(kw_only=True)
class Objective:
    """The loss of training: (1 - weight) of the text's, `weight` of the teacher's.

    `kinds` are rows of the table of distillations. Of two, the second counts as much as the first
    does where training begins; `scale` is what that takes, and `hidden` are the outputs of blocks
    in the forward at hand. `kept` are the teacher's blocks that the student still has.
    """

    kinds: tuple[str, ...] = ()
    weight: float = 0.0
    teacher: TeacherCache | None = None
    scale: float | None = None
    hidden: list[Tensor] = field(default_factory=list)
    kept: Sequence[int] | None = None

    def watch(self, blocks: Sequence[Any]) -> None:
        """Keep what blocks give, where a loss compares it."""
        if not any(DISTILLATIONS[kind].needs == "hidden" for kind in self.kinds):
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            self.hidden.append(output[0] if isinstance(output, tuple | list) else output)

        for block in blocks:
            block.register_forward_hook(keep)

    def begin(self) -> None:
        """Forget what blocks gave: of an evaluation, or when they were computed again."""
        self.hidden = []

    def loss(self, output: Any, windows: Sequence[int], targets_BT: Tensor) -> Tensor:
        """Return the loss of a micro-batch, summed over the tokens that are asked for."""
        hidden, self.hidden = self.hidden, []  # a graph lives no longer than its backward
        total: Tensor = output.logits.new_zeros((), dtype=torch.float32)
        if self.weight < 1:
            total = total + (1 - self.weight) * next_token_loss(output.logits, targets_BT)
        if self.teacher is None:
            return total
        parts = [
            self._from_teacher(kind, output, hidden, windows, targets_BT) for kind in self.kinds
        ]
        if len(parts) > 1 and self.scale is None:
            self.scale = float(parts[0].detach() / parts[1].detach().clamp_min(1e-12))
        factors = (1.0, self.scale or 1.0)
        count = int((targets_BT != IGNORED).sum())
        for part, factor in zip(parts, factors, strict=False):
            total = total + self.weight * factor * count * part
        return total

    def _from_teacher(
        self,
        kind: str,
        output: Any,
        hidden: list[Tensor],
        windows: Sequence[int],
        targets_BT: Tensor,
    ) -> Tensor:
        """Return one of the teacher's losses, a mean over tokens."""
        assert self.teacher is not None
        row = DISTILLATIONS[kind]
        found: Tensor
        if row.needs == "hidden":
            taught = self.teacher.hidden(windows)
            taught = taught if self.kept is None else [taught[index] for index in self.kept]
            found = row.stored(hidden, taught, targets_BT)
        else:
            found = row.stored(output.logits, self.teacher.top(windows), targets_BT)
        return found


def kinds_of(text: str) -> tuple[str, ...]:
    """Return the losses of `kl+hidden`.

    Raises:
        UnknownName: one is none. RecipeError: three, or one twice.

    >>> kinds_of("kl+hidden")
    ('kl', 'hidden')
    """
    kinds = tuple(part.strip() for part in text.split("+"))
    for kind in kinds:
        DISTILLATIONS[kind]
    if len(kinds) > 2 or len(set(kinds)) < len(kinds):
        raise RecipeError(
            f"recover.distill: {text!r} names more losses than go together. Give one, or two "
            "different ones with a plus, such as kl+hidden."
        )
    return kinds
