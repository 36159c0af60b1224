"""Perplexity of tokens, as the pruning papers report it, over windows of one joined text.

Legend: N windows, B windows of a micro-batch, T tokens, t positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.base.errors import NumericalError
from llmprune.calibration.windows import token_ids
from llmprune.evaluation.windows import (
    IGNORED,
    Bos,
    Windows,
    adds_bos,
    bos_token,
    cut_windows,
    next_tokens,
)
from llmprune.walk.block import Blocks
from llmprune.walk.forward import embed, logits, walk

if TYPE_CHECKING:
    import torch
    from torch import Tensor


HIDDEN_BYTES = 2_000_000_000  # of hidden states held at once; more windows are walked in groups
STRANGE = 100.0  # a perplexity above this makes one ask whether BOS was missing


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity of tokens and what it was measured on.

    `bos` tells whether every window began with BOS, `tokenizer_adds_bos` whether the tokenizer
    would begin a text so, `dtype` what was computed in.
    """

    value: float
    num_windows: int
    seq_len: int
    num_predicted: int
    bos: bool
    data: str
    stride: int | None = None
    tokenizer_adds_bos: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.protocol})"

    @property
    def protocol(self) -> str:
        """Return what the value was measured on: numbers of unequal protocols do not compare."""
        stride = "" if self.stride is None else f", stride {self.stride}"
        bos = "BOS first" if self.bos else "no BOS"
        if self.tokenizer_adds_bos and not self.bos:
            bos += " (the tokenizer would add it)"
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        windows = f"{self.num_windows} windows of {self.seq_len} tokens of {self.data}"
        return f"{windows}{stride}, {bos}{dtype}"

    @property
    def warning(self) -> str | None:
        """Return what to try where the value is strange and BOS, which belongs there, was not."""
        if self.bos or not self.tokenizer_adds_bos or self.value < STRANGE:
            return None
        return (
            f"a perplexity of {self.value:.4g} without BOS, with which this tokenizer begins every "
            "text. Some models (Gemma) compute nonsense without it: measure with --bos auto before "
            "you trust the number."
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """Windows to be predicted, and how they came about; the same for every model asked."""

    windows: Windows
    seq_len: int
    stride: int | None
    bos: bool
    tokenizer_adds_bos: bool
    data: str

    def answer(self, nats: float, num_predicted: int, *, dtype: torch.dtype) -> Perplexity:
        """Return the perplexity of a model whose loss summed to `nats`."""
        return Perplexity(
            value=of_loss(nats, num_predicted),
            num_windows=len(self.windows.inputs_NT),
            seq_len=self.seq_len,
            num_predicted=num_predicted,
            bos=self.bos,
            data=self.data,
            stride=self.stride,
            tokenizer_adds_bos=self.tokenizer_adds_bos,
            dtype=str(dtype).removeprefix("torch."),
        )


def pose(
    text: str,
    tokenizer: Any,
    *,
    data: str,
    seq_len: int,
    stride: int | None = None,
    num_windows: int | None = None,
    num_tokens: int | None = None,
    bos: Bos = False,
) -> Question:
    """Tokenize a text, called `data`, and cut it into windows; see `cut_windows`.

    Of the text the first `num_tokens` tokens are taken, and of the windows the first `num_windows`.

    Raises:
        RecipeError: the text is shorter than one window, or stride or BOS cannot be had.
    """
    bos_id = bos_token(tokenizer, bos)
    limits = [num_tokens, None if num_windows is None else num_windows * seq_len + 1]
    limit = min((limit for limit in limits if limit is not None), default=None)
    ids = token_ids(text, tokenizer, limit=limit)
    windows = cut_windows(ids, seq_len, stride=stride, num_windows=num_windows, bos_id=bos_id)
    return Question(
        windows=windows,
        seq_len=seq_len,
        stride=stride,
        bos=bos_id is not None,
        tokenizer_adds_bos=adds_bos(tokenizer),
        data=data,
    )


def loss_of_blocks(
    blocks: Blocks, inputs_NT: Tensor, targets_NT: Tensor | None = None, *, micro_batch: int = 1
) -> tuple[float, int]:
    """Return (summed negative log-likelihood in nats, predicted tokens), block by block.

    Without targets every window predicts its own tokens but the first. Windows are walked together
    as long as their hidden states fit `HIDDEN_BYTES`.

    Raises:
        NumericalError: the loss is not finite.
    """
    total, count = 0.0, 0
    for asked in answers(blocks, inputs_NT, targets_NT, micro_batch=micro_batch):
        added, predicted = nats_of(asked.logits_BtV, asked.wanted_Bt)
        total, count = total + added, count + predicted
    return finite(total), count


class Answer(NamedTuple):
    """What a model says of some positions of a micro-batch, from `start` on, and what is asked."""

    batch: int
    start: int
    logits_BtV: Tensor
    wanted_Bt: Tensor


def answers(
    blocks: Blocks,
    inputs_NT: Tensor,
    targets_NT: Tensor | None = None,
    *,
    micro_batch: int = 1,
    keep: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Answer]:
    """Yield the logits of all windows in chunks of positions, from one walk through the blocks.

    `keep` is given the number of every micro-batch and its hidden states after all blocks.
    """
    text = blocks.model.config.get_text_config()
    per_window = inputs_NT.shape[1] * text.hidden_size * 4
    at_once = max(micro_batch, HIDDEN_BYTES // per_window // micro_batch * micro_batch)
    targets_NT = next_tokens(inputs_NT) if targets_NT is None else targets_NT
    passed = 0
    for group_NT, wanted_NT in zip(
        inputs_NT.split(at_once), targets_NT.split(at_once), strict=True
    ):
        stream = embed(blocks, group_NT, micro_batch)
        walk(blocks, stream)
        if keep is not None:
            for batch in range(len(stream)):
                keep(passed + batch, stream.hidden.get(batch, blocks.device))
        batches = wanted_NT.split(micro_batch)
        for batch, start, logits_BtV in logits(blocks, stream):
            wanted_Bt = batches[batch][:, start : start + logits_BtV.shape[1]]
            yield Answer(passed + batch, start, logits_BtV, wanted_Bt)
        passed += len(stream)
        stream.hidden.close()


def loss_of_model(
    model: Any, inputs_NT: Tensor, targets_NT: Tensor | None = None, *, micro_batch: int = 1
) -> tuple[float, int]:
    """Return (summed negative log-likelihood in nats, predicted tokens) of a model in memory.

    Raises:
        NumericalError: the loss is not finite.
    """
    import torch

    targets_NT = next_tokens(inputs_NT) if targets_NT is None else targets_NT
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids_BT, wanted_BT in zip(
            inputs_NT.split(micro_batch), targets_NT.split(micro_batch), strict=True
        ):
            output = model(input_ids=ids_BT.to(model.device), use_cache=False)
            added, predicted = nats_of(output.logits, wanted_BT)
            total, count = total + added, count + predicted
    model.train(training)
    return finite(total), count


def nats_of(logits_BtV: Tensor, targets_Bt: Tensor) -> tuple[float, int]:
    """Return the summed negative log-likelihood of the targets that are asked for, and how many."""
    import torch

    loss = torch.nn.functional.cross_entropy(
        logits_BtV.float().flatten(0, 1),
        targets_Bt.to(logits_BtV.device).flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return float(loss), int((targets_Bt != IGNORED).sum())


def finite(total: float) -> float:
    """Return a summed loss.

    Raises:
        NumericalError: it is NaN or infinite.
    """
    if not math.isfinite(total):
        raise NumericalError(
            "the loss is NaN or infinite: the model does not compute. In float16 use --dtype "
            "bfloat16."
        )
    return total


def of_loss(total: float, count: int) -> float:
    """Return the perplexity of a summed loss in nats: exp of its mean over `count` tokens."""
    return math.exp(min(total / count, 700.0))
