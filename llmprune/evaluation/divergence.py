"""How far a model's next-token distributions are from the dense model's, per sequence.

Legend: B sequences of a micro-batch, t positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmprune.calibration.replay import head
from llmprune.walk.block import Blocks
from llmprune.walk.forward import LOGITS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Distance(NamedTuple):
    """Sums over the predicted tokens of every sequence, float64 (B,), on the host, in nats."""

    kl_B: Tensor
    loss_B: Tensor


def distances(
    blocks: Blocks, dense_BTD: Tensor, others: Sequence[Tensor], ids_BT: Tensor
) -> list[Distance]:
    """Return KL(dense || other) and the loss of each of `others`, hidden states after all blocks.

    The head must be open. Positions that predict nothing, the last of each sequence, do not count.
    Logits are made in chunks of positions, those of the dense model once for all others.
    """
    import torch

    size = dense_BTD.shape[:-2].numel()
    found = [Distance(*torch.zeros(2, size, dtype=torch.float64)) for _ in others]
    vocab = blocks.model.config.get_text_config().vocab_size
    step = max(1, LOGITS // (2 * vocab * size))
    length = ids_BT.shape[1] - 1
    for start in range(0, length, step):
        stop = min(start + step, length)
        targets_Bt = ids_BT[:, start + 1 : stop + 1].to(dense_BTD.device)
        dense_BtV = _log_probs(blocks, dense_BTD[..., start:stop, :])
        for place, other_BTD in enumerate(others):
            other_BtV = _log_probs(blocks, other_BTD[..., start:stop, :])
            said_Bt = other_BtV.gather(-1, targets_Bt[..., None])[..., 0]
            apart_Bt = (dense_BtV.exp() * (dense_BtV - other_BtV)).sum(dim=-1)
            found[place].kl_B.add_(apart_Bt.cpu().double().sum(dim=1))
            found[place].loss_B.sub_(said_Bt.cpu().double().sum(dim=1))
    return found


def _log_probs(blocks: Blocks, hidden_BtD: Tensor) -> Tensor:
    """Return log probabilities float32 (B, t, V)."""
    logits = head(blocks.model, blocks.modules, hidden_BtD, returns=blocks.family.returns)
    log_probs: torch.Tensor = logits.float().log_softmax(dim=-1)
    return log_probs
