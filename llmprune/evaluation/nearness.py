"""Loss of a model and its KL from the dense model, both of one walk through its blocks.

The dense model is walked once: its hidden states after all blocks lie in a folder, a file for each
micro-batch, and of them only the head is computed again, beside the other model's.

Legend: N windows, B windows of a micro-batch, T tokens, t positions of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmprune.checkpoint.sink import write_tensors
from llmprune.evaluation.perplexity import answers, finite, nats_of
from llmprune.evaluation.windows import IGNORED, Windows
from llmprune.walk.block import Blocks
from llmprune.walk.forward import Stream, logits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmprune.calibration.hidden import HiddenStates

HIDDEN = "hidden"


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """Summed loss in nats, predicted tokens, and the mean KL(dense || model) per token in nats.

    `stderr` is the standard error of that mean by windows, whose tokens are no independent draws;
    None where there is one window alone.
    """

    nats: float
    count: int
    kl: float
    stderr: float | None


def keep_dense(
    blocks: Blocks, windows: Windows, folder: Path, *, micro_batch: int = 1
) -> tuple[float, int]:
    """Walk the dense model once: return (summed loss in nats, predicted tokens), and write its
    hidden states after all blocks to a folder.

    Raises:
        NumericalError: the loss is not finite.
        TooLarge: the disk is full.
    """

    def keep(batch: int, hidden_BTD: Tensor) -> None:
        write_tensors(_file(folder, batch), {HIDDEN: hidden_BTD.cpu()}, settled=False)

    folder.mkdir(parents=True, exist_ok=True)
    total, count = 0.0, 0
    for asked in answers(blocks, *windows, micro_batch=micro_batch, keep=keep):
        added, predicted = nats_of(asked.logits_BtV, asked.wanted_Bt)
        total, count = total + added, count + predicted
    return finite(total), count


def measure_nearness(
    blocks: Blocks, windows: Windows, dense: Blocks, folder: Path, *, micro_batch: int = 1
) -> Nearness:
    """Walk a model once; compare it with what `keep_dense` wrote of the same windows.

    Both models have the same vocabulary; the micro-batch is that of the dense walk.

    Raises:
        NumericalError: the loss is not finite.
    """
    import torch

    num = len(windows.inputs_NT)
    nats_N, count_N = torch.zeros(num, dtype=torch.float64), torch.zeros(num, dtype=torch.int64)
    said, total = _dense_logits(dense, folder, -(-num // micro_batch)), 0.0
    for asked in answers(blocks, *windows, micro_batch=micro_batch):
        batch, start, dense_BtV = next(said)
        assert (batch, start) == (asked.batch, asked.start)
        total += nats_of(asked.logits_BtV, asked.wanted_Bt)[0]
        kl_B, asked_B = _apart(dense_BtV, asked.logits_BtV, asked.wanted_Bt)
        own = slice(batch * micro_batch, batch * micro_batch + len(kl_B))
        nats_N[own] += kl_B
        count_N[own] += asked_B
    said.close()
    kl, stderr = ratio_of_sums(nats_N.tolist(), count_N.tolist())
    return Nearness(nats=finite(total), count=int(count_N.sum()), kl=finite(kl), stderr=stderr)


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Return sum(sums) / sum(counts) and its standard error, groups being what was drawn.

    The error is sqrt(n / (n - 1) * sum (s_i - mean * c_i)^2) / sum c_i; of groups of equal counts
    that is the standard error of the mean of the groups' means. None for one group.

    Source: Cochran, Sampling Techniques, equation 6.13: the ratio estimator, without the
    correction for a finite population.

    >>> ratio_of_sums([2.0, 6.0], [2, 2])
    (2.0, 1.0)
    """
    mean, groups = sum(sums) / sum(counts), len(sums)
    if groups < 2:
        return mean, None
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return mean, math.sqrt(groups / (groups - 1) * squares) / sum(counts)


def _apart(dense_BtV: Tensor, other_BtV: Tensor, wanted_Bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per window, the summed KL(dense || other) where something is asked, float64 (B,), and
    how often that is, int64 (B,); both on the host."""
    dense_BtV = dense_BtV.float().log_softmax(dim=-1)
    other_BtV = other_BtV.float().log_softmax(dim=-1)
    kl_Bt = (dense_BtV.exp() * (dense_BtV - other_BtV)).sum(dim=-1).cpu().double()
    asked_Bt = wanted_Bt.cpu() != IGNORED
    return (kl_Bt * asked_Bt).sum(dim=-1), asked_Bt.sum(dim=-1)


@dataclass(frozen=True)
class _Kept:
    """Hidden states in files, as a stream reads them."""

    folder: Path

    def get(self, batch: int, device: torch.device) -> Tensor:
        from safetensors.torch import load_file

        return load_file(_file(self.folder, batch))[HIDDEN].to(device)


def _dense_logits(
    dense: Blocks, folder: Path, num_batches: int
) -> Generator[tuple[int, int, Tensor], None, None]:
    """Yield (micro-batch, first position, logits_BtV) of the dense model."""
    hidden = cast("HiddenStates", _Kept(folder))
    stream = Stream(hidden=hidden, arguments=tuple([] for _ in range(num_batches)))
    yield from logits(dense, stream)


def _file(folder: Path, batch: int) -> Path:
    return folder / f"hidden-{batch:05d}.safetensors"
