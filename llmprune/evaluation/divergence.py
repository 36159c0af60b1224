"""How far a model's outputs are from the dense model's, per sequence.

Besides KL and the loss there are, by name, where asked for:

    angular  arccos of the cosine between the centred logits, over pi: 0 to 1, blind to their scale
    norm     squared norm of the difference of the centred logits, relative to the dense ones'
    js       Jensen-Shannon divergence of the next-token distributions in nats, 0 to ln 2
    shift    how far mean and standard deviation over tokens move in the final hidden states

Centred logits have mean 0 over the vocabulary: a constant added to all changes no distribution. The
first three are means over tokens; a shift is one number of a sequence.

Source: angular, norm and js as compared by Zhang et al., FinerCut: Finer-grained Interpretable
Layer Pruning for Large Language Models; shift, the score of Castells et al., LD-Pruner: Efficient
Pruning of Latent Diffusion Models using Task-Agnostic Insights, for hidden states as the latent.
Legend: B sequences of a micro-batch, t positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llmprune.calibration.replay import head
from llmprune.walk.block import Blocks
from llmprune.walk.forward import LOGITS

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Distance(NamedTuple):
    """What is said of every sequence, float64 (B,), on the host: sums over the predicted tokens in
    nats, and under `means` the distances that were asked for by name."""

    kl_B: Tensor
    loss_B: Tensor
    means: Mapping[str, Tensor]


def distances(
    blocks: Blocks,
    dense_BTD: Tensor,
    others: Sequence[Tensor],
    ids_BT: Tensor,
    names: Sequence[str] = (),
) -> list[Distance]:
    """Return KL(dense || other) and the loss of each of `others`, hidden states after all blocks.

    The head must be open. Positions that predict nothing, the last of each sequence, do not count.
    Logits are made in chunks of positions, those of the dense model once for all others. Only the
    distances that `names` lists are computed besides.
    """
    import torch

    size = dense_BTD.shape[:-2].numel()
    by_token = [name for name in names if name in BY_TOKEN]
    found = [
        Distance(
            kl_B=torch.zeros(size, dtype=torch.float64),
            loss_B=torch.zeros(size, dtype=torch.float64),
            means={name: torch.zeros(size, dtype=torch.float64) for name in by_token},
        )
        for _ in others
    ]
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
            found[place].kl_B.add_(_sums(apart_Bt))
            found[place].loss_B.sub_(_sums(said_Bt))
            for name in by_token:
                mean_B = _sums(BY_TOKEN[name](dense_BtV, other_BtV)) / length
                found[place].means[name].add_(mean_B)
    if "shift" not in names:
        return found
    dense_BTD = dense_BTD[..., :length, :]
    return [
        each._replace(means={**each.means, "shift": shift(dense_BTD, other_BTD[..., :length, :])})
        for each, other_BTD in zip(found, others, strict=True)
    ]


def angular(dense_BtV: Tensor, other_BtV: Tensor) -> Tensor:
    """Return the angle between centred logits over pi, (B, t), from logits or log probabilities.

    Two logits that are constant are no angle apart, and one is at a right angle to any other.

    >>> import torch
    >>> angular(torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.0, -1.0, 1.0])).item()
    0.3333333432674408
    """
    one_BtV, two_BtV = (_unit(_centred(each_BtV)) for each_BtV in (dense_BtV, other_BtV))
    apart_Bt, along_Bt = (one_BtV - two_BtV).norm(dim=-1), (one_BtV + two_BtV).norm(dim=-1)
    angle_Bt: torch.Tensor = apart_Bt.atan2(along_Bt) * (2 / math.pi)
    return angle_Bt  # exact for small angles, as arccos is not


def relative_norm(dense_BtV: Tensor, other_BtV: Tensor) -> Tensor:
    """Return ||other - dense||^2 / ||dense||^2 of centred logits, (B, t).

    >>> import torch
    >>> relative_norm(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 1.0])).item()
    0.25
    """
    apart_Bt = _centred(other_BtV - dense_BtV).square().sum(dim=-1)
    size_Bt = _centred(dense_BtV).square().sum(dim=-1)
    return apart_Bt / size_Bt.clamp(min=_TINY)


def jensen_shannon(dense_BtV: Tensor, other_BtV: Tensor) -> Tensor:
    """Return the mean of the divergences of two distributions from their mean, (B, t), in nats.

    Both are given as log probabilities.
    """
    import torch

    middle_BtV = torch.logaddexp(dense_BtV, other_BtV) - math.log(2)
    one_Bt = (dense_BtV.exp() * (dense_BtV - middle_BtV)).sum(dim=-1)
    two_Bt = (other_BtV.exp() * (other_BtV - middle_BtV)).sum(dim=-1)
    mean_Bt: torch.Tensor = (one_Bt + two_Bt).clamp(min=0) / 2  # rounding goes below 0
    return mean_Bt


def shift(dense_BTD: Tensor, other_BTD: Tensor) -> Tensor:
    """Return ||difference of means|| + ||difference of deviations|| over tokens, float64 (B,).

    Deviations are those of a population. The result is on the host.

    >>> import torch
    >>> shift(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[3.0], [9.0]]])).tolist()
    [6.0]
    """
    one_BTD, two_BTD = dense_BTD.float(), other_BTD.float()
    mean_B = (two_BTD.mean(dim=-2) - one_BTD.mean(dim=-2)).norm(dim=-1)
    std_B = (two_BTD.std(dim=-2, correction=0) - one_BTD.std(dim=-2, correction=0)).norm(dim=-1)
    moved_B: torch.Tensor = (mean_B + std_B).reshape(-1).cpu().double()
    return moved_B


BY_TOKEN: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "angular": angular,
    "norm": relative_norm,
    "js": jensen_shannon,
}
_TINY = 1e-30  # below every squared norm that a float32 keeps apart from 0


def _centred(logits_BtV: Tensor) -> Tensor:
    return logits_BtV - logits_BtV.mean(dim=-1, keepdim=True)


def _unit(vector_BtV: Tensor) -> Tensor:
    unit_BtV: torch.Tensor = vector_BtV / vector_BtV.norm(dim=-1, keepdim=True).clamp(min=_TINY)
    return unit_BtV


def _sums(values_Bt: Tensor) -> Tensor:
    """Return the sums over positions in float64, on the host."""
    return values_Bt.cpu().double().sum(dim=1)


def _log_probs(blocks: Blocks, hidden_BtD: Tensor) -> Tensor:
    """Return log probabilities float32 (B, t, V)."""
    logits = head(blocks.model, blocks.modules, hidden_BtD, returns=blocks.family.returns)
    log_probs: torch.Tensor = logits.float().log_softmax(dim=-1)
    return log_probs
