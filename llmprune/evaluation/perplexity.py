"""Perplexity by the protocol of the pruning papers: non-overlapping windows of one joined text.

Every window predicts its own tokens but the first; the mean is over all predicted tokens.
Legend: N windows, B windows of a micro-batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import NumericalError, RecipeError
from llmprune.walk.block import Blocks
from llmprune.walk.forward import embed, logits, walk

if TYPE_CHECKING:
    from torch import Tensor


HIDDEN_BYTES = 2_000_000_000  # of hidden states held at once; more windows are walked in groups


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A perplexity and what it was measured on."""

    value: float
    num_windows: int
    seq_len: int
    num_predicted: int
    bos: bool
    data: str

    def __str__(self) -> str:
        bos = "BOS first" if self.bos else "no BOS"
        text = f"{self.num_windows} windows of {self.seq_len} tokens of {self.data}, {bos}"
        return f"{self.value:.3f} ({text})"


def cut_windows(
    token_ids: list[int], seq_len: int, *, num_windows: int | None = None, bos_id: int | None = None
) -> Tensor:
    """Return windows_NT (int64) from the start of a text; with `bos_id` each begins with it.

    Raises:
        RecipeError: the text is shorter than one window.
    """
    import torch

    content = seq_len if bos_id is None else seq_len - 1
    count = len(token_ids) // content
    if count == 0:
        raise RecipeError(
            f"the text has {len(token_ids)} tokens, fewer than one window of {seq_len}. "
            "Give a longer text, or a smaller --seq-len."
        )
    count = min(count, num_windows) if num_windows else count
    windows = torch.tensor(token_ids[: count * content], dtype=torch.int64).view(count, content)
    if bos_id is None:
        return windows
    return torch.cat([torch.full((count, 1), bos_id), windows], dim=1)


def of_blocks(blocks: Blocks, windows_NT: Tensor, *, micro_batch: int = 1) -> tuple[float, int]:
    """Return (perplexity, predicted tokens) of a model walked block by block.

    Windows are walked together as long as their hidden states fit `HIDDEN_BYTES`.

    Raises:
        NumericalError: the loss is not finite.
    """
    text = blocks.model.config.get_text_config()
    per_window = windows_NT.shape[1] * text.hidden_size * 4
    at_once = max(micro_batch, HIDDEN_BYTES // per_window // micro_batch * micro_batch)
    total, count = 0.0, 0
    for group_NT in windows_NT.split(at_once):
        stream = embed(blocks, group_NT, micro_batch)
        walk(blocks, stream)
        batches = group_NT.split(micro_batch)
        for batch, start, logits_BtV in logits(blocks, stream):
            added, predicted = _loss(logits_BtV, batches[batch], start)
            total, count = total + added, count + predicted
        stream.hidden.close()
    return _perplexity(total, count), count


def of_model(model: Any, windows_NT: Tensor, *, micro_batch: int = 1) -> tuple[float, int]:
    """Return (perplexity, predicted tokens) of a model in memory.

    Raises:
        NumericalError: the loss is not finite.
    """
    import torch

    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids_BT in windows_NT.split(micro_batch):
            output = model(input_ids=ids_BT.to(model.device), use_cache=False)
            added, predicted = _loss(output.logits, ids_BT, 0)
            total, count = total + added, count + predicted
    model.train(training)
    return _perplexity(total, count), count


def _loss(logits_BtV: Tensor, ids_BT: Tensor, start: int) -> tuple[float, int]:
    """Return the summed negative log-likelihood that a chunk of positions gives its next tokens."""
    import torch

    end = min(start + logits_BtV.shape[1], ids_BT.shape[1] - 1)
    target = ids_BT[:, start + 1 : end + 1].to(logits_BtV.device)
    predicted = logits_BtV[:, : end - start].float()
    loss = torch.nn.functional.cross_entropy(
        predicted.flatten(0, 1), target.flatten(), reduction="sum"
    )
    return float(loss), target.numel()


def _perplexity(total: float, count: int) -> float:
    """Return exp of the mean loss."""
    mean = total / count
    if not math.isfinite(mean):
        raise NumericalError(
            "the loss is NaN or infinite: the model does not compute. In float16 use --dtype "
            "bfloat16."
        )
    return math.exp(min(mean, 700.0))
