"""What is trained on: windows of tokens with targets, a part held out, in an order drawn by seed.

Legend: N windows, T tokens in each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import RecipeError
from llmprune.calibration.mix import Loss, Windows, read_windows, window_record
from llmprune.evaluation.windows import IGNORED, next_tokens
from llmprune.recipe import Calibration

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.recipe import Recipe, RecoverStep

HELD, MOST_HELD = 16, 32  # one of so many windows is held out, at most so many


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Token ids (N, T) and what each position is to predict (N, T); the last are held out."""

    ids_NT: Tensor
    targets_NT: Tensor
    num_held: int
    seed: int

    def __len__(self) -> int:
        """Return how many windows are trained on."""
        return len(self.ids_NT) - self.num_held

    def of_step(self, step: int, batch: int) -> list[int]:
        """Return the windows of an optimizer step; every pass over the text has its own order.

        A function of the seed and the step, so that a resumed run reads on where it was.
        """
        places = range(step * batch, (step + 1) * batch)
        return [self._order(place // len(self))[place % len(self)] for place in places]

    @property
    def held(self) -> range:
        """Return the windows held out."""
        return range(len(self), len(self.ids_NT))

    def _order(self, turn: int) -> list[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        order: list[int] = torch.randperm(len(self), generator=draw).tolist()
        return order


def with_text_of(recipe: Recipe, wish: RecoverStep, seq_len: int) -> Recipe:
    """Return the recipe whose calibration text is what a recovery trains on.

    Without a text of its own that is the text of calibration, another part of it where there is
    more.
    """
    base = recipe.calibration if wish.data == "auto" else wish
    text = base.model_dump(include={"data", "split", "config", "revision", "column"})
    wanted = wish.steps * wish.batch
    num_samples = wanted + min(MOST_HELD, -(-wanted // HELD))
    asked = Calibration(**text, num_samples=num_samples, seq_len=seq_len, bos=wish.bos)
    return recipe.model_copy(update={"calibration": asked})


def read_examples(
    recipe: Recipe, tokenizer: Any, *, seq_len: int, loss: Loss = "auto"
) -> tuple[Examples, Windows]:
    """Read the windows that a recovery trains on, and what its report and its user are told.

    ``loss`` says which tokens are asked for, as in `read_windows`. A window without any is left
    out.

    Raises:
        RecipeError: the text is not there, too short to hold anything out, or asks for nothing.
    """
    found = read_windows(recipe, tokenizer, seq_len=seq_len, loss=loss)
    targets_NT = asked_targets(found.tokens, found.asked)
    some_N = (targets_NT != IGNORED).any(dim=1)
    num_left_out = int((~some_N).sum())
    notices = [_of_training(notice) for notice in found.notices]
    if num_left_out:
        _check_some_asked(some_N)
        notices.append(
            f"recover leaves out {num_left_out} of {len(some_N)} windows, in which an assistant "
            "says nothing. All tokens are asked for with --set recover.loss=all."
        )
    ids_NT, targets_NT = found.tokens[some_N], targets_NT[some_N]
    examples = examples_of(ids_NT, seed=recipe.seed, targets_NT=targets_NT)
    own = window_record(found.record["data"], ids_NT, texts=found.record["texts"])
    record = {**found.record, **own, "num_asked": int((targets_NT != IGNORED).sum())}
    return examples, replace(
        found, tokens=ids_NT, asked=None, record=record, notices=tuple(notices)
    )


def asked_targets(ids_NT: Tensor, asked_NT: Tensor | None = None) -> Tensor:
    """Return what positions (N, T) are to predict: the next token, where that one is asked for.

    >>> ids_NT, asked_NT = torch.tensor([[4, 5, 6]]), torch.tensor([[True, False, True]])
    >>> asked_targets(ids_NT, asked_NT).tolist()
    [[-100, 6, -100]]
    """
    if asked_NT is None:
        return next_tokens(ids_NT)
    return next_tokens(ids_NT.masked_fill(~asked_NT, IGNORED))


def _check_some_asked(some_N: Tensor) -> None:
    """Check that windows that ask for a token are enough to train on, and to hold one out.

    Raises:
        RecipeError: fewer than two do.
    """
    if some_N.sum() < 2:
        raise RecipeError(
            f"recover.loss: an assistant says something in {int(some_N.sum())} of {len(some_N)} "
            "windows, and training needs two. Give conversations (a column of messages, and a "
            "tokenizer with a chat template), or type --set recover.loss=all."
        )


def _of_training(notice: str) -> str:
    """Return a notice of reading in the words of a recovery."""
    words = {
        "calibration uses": "recover trains on",
        "calibration leaves out": "recover leaves out",
        "`calibration.seq_len`": "--seq-len",
    }
    for theirs, ours in words.items():
        notice = notice.replace(theirs, ours)
    return notice


def examples_of(ids_NT: Tensor, *, seed: int, targets_NT: Tensor | None = None) -> Examples:
    """Return windows as examples: without targets each predicts its own tokens but the first.

    Raises:
        RecipeError: fewer than two windows.
    """
    if len(ids_NT) < 2:
        raise RecipeError(
            f"recover.data: the text fills {len(ids_NT)} window of {ids_NT.shape[1]} tokens, and "
            "one is held out. Give more text, or a shorter --seq-len."
        )
    targets_NT = next_tokens(ids_NT) if targets_NT is None else targets_NT
    num_held = min(MOST_HELD, max(1, len(ids_NT) // HELD))
    return Examples(ids_NT=ids_NT, targets_NT=targets_NT, num_held=num_held, seed=seed)
