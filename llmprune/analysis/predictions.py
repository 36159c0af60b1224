"""What dense and pruned model predict, token by token, of the same windows.

Legend: N windows, T tokens, P = T - 1 predicted positions, B windows of a micro-batch, t positions
of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune.walk.forward import LOGITS, Stream, logits

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.walk.block import Blocks


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """KL(dense || pruned) and the losses, float32 (N, P) in nats; the likeliest tokens int64."""

    kl_NP: Tensor
    dense_loss_NP: Tensor
    pruned_loss_NP: Tensor
    dense_best_NP: Tensor
    pruned_best_NP: Tensor


def predict(
    dense: Blocks, pruned: Blocks, streams: tuple[Stream, Stream], ids_NT: Tensor, micro_batch: int
) -> Predictions:
    """Return what both models predict from hidden states that have passed all blocks.

    The two have one vocabulary. Logits are made in chunks of positions; both heads are in memory.
    """
    import torch

    vocab = dense.model.config.get_text_config().vocab_size
    chunk = max(1, LOGITS // (2 * vocab * micro_batch))
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(len(streams[0]))]
    batches = ids_NT.split(micro_batch)
    sides = (logits(dense, streams[0], chunk=chunk), logits(pruned, streams[1], chunk=chunk))
    for (batch, start, one_BtV), (_, _, two_BtV) in zip(*sides, strict=True):
        targets_Bt = batches[batch][:, start + 1 : start + 1 + one_BtV.shape[1]]
        if targets_Bt.shape[1]:
            size = targets_Bt.shape[1]  # the last position predicts nothing
            found[batch].append(_compare(one_BtV[:, :size], two_BtV[:, :size], targets_Bt))
    parts = [
        torch.cat([torch.cat([row[place] for row in rows], dim=1) for rows in found])
        for place in range(5)
    ]
    return Predictions(
        kl_NP=parts[0],
        dense_loss_NP=parts[1],
        pruned_loss_NP=parts[2],
        dense_best_NP=parts[3],
        pruned_best_NP=parts[4],
    )


def _compare(one_BtV: Tensor, two_BtV: Tensor, targets_Bt: Tensor) -> tuple[Tensor, ...]:
    """Return KL, both losses and both likeliest tokens, each (B, t), on the host."""
    targets_Bt = targets_Bt.to(one_BtV.device)
    dense_BtV = one_BtV.float().log_softmax(dim=-1)
    pruned_BtV = two_BtV.to(one_BtV.device).float().log_softmax(dim=-1)
    kl_Bt = (dense_BtV.exp() * (dense_BtV - pruned_BtV)).sum(dim=-1).clamp(min=0)  # rounding
    losses = [-side.gather(-1, targets_Bt[..., None])[..., 0] for side in (dense_BtV, pruned_BtV)]
    best = [side.argmax(dim=-1) for side in (dense_BtV, pruned_BtV)]
    return tuple(each.cpu() for each in (kl_Bt, *losses, *best))
