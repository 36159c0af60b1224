"""Losses that draw a pruned model towards the dense one: by the tokens it expects, or inside.

    kl          sum of p_T (log p_T - log p_S), the classes of a token being the vocabulary
    reverse-kl  sum of p_S (log p_S - log p_T), which punishes what the teacher would never say
    hidden      sum over blocks of mean (h_S - h_T)^2 / (mean h_T^2 + eps)

All are means over the tokens whose targets are asked for, in float32 at least. Of a teacher that is
not at hand, its k most likely tokens will do: what they leave is one more class, a bucket, in which
both models' other tokens are counted together.

Logits are read in chunks of tokens, on the way back too: beside the gradient itself, which has the
student's dtype, one chunk of float32 is all that a loss over a large vocabulary costs.

Source: Hinton et al., Distilling the Knowledge in a Neural Network, for the factor T^2; Gu et al.,
MiniLLM, for the reverse; arcee-ai/DistillKit for the treatments of what k tokens leave; Kurtic et
al., Sparse Fine-tuning for Inference Acceleration of Large Language Models (SquareHead) and Zhang
et al., LAPTOP-Diff, for features in units of the teacher's.
Legend: B windows of a micro-batch, T tokens, N tokens in one row after another, n tokens of a
chunk, V vocabulary, K most likely tokens, C classes, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmprune.base.errors import NumericalError
from llmprune.base.registry import Registry
from llmprune.evaluation.windows import IGNORED
from llmprune.walk.forward import LOGITS

EPS = 2**-7  # of SquareHead's code: the spacing of bfloat16 at 1

Missing = Literal["bucket", "zero"]
Rows = Callable[..., Tensor]  # (student_nV, parts of the teacher by token) -> loss_n


class TopK(NamedTuple):
    """What a teacher says of its most likely next tokens, the likeliest first.

    `rest_BT` is the log of what all others have together, float32; without it that is what the
    rounded log probabilities leave of 1.
    """

    log_prob_BTK: Tensor
    index_BTK: Tensor
    rest_BT: Tensor | None = None


def strongest(logits_BTV: Tensor, k: int) -> TopK:
    """Return the log probabilities (float16) and indices (int32) of the k most likely tokens.

    Of equal ones the lower indices come first, and a vocabulary of fewer tokens gives all it has.

    Raises:
        NumericalError: the logits are not finite.
        ValueError: k is below 1.

    >>> strongest(torch.tensor([[[0.0, 2.0, 2.0, 1.0]]]), 2).index_BTK.tolist()
    [[[1, 2]]]
    """
    if k < 1:
        raise ValueError(f"{k} most likely tokens are none. It takes 1 or more; pass k=64.")
    wide_BTV = _wide(logits_BTV)
    total_BT1 = wide_BTV.logsumexp(-1, keepdim=True)
    if not torch.isfinite(total_BT1).all():
        raise NumericalError(
            "the teacher's logits hold NaN or infinity. In float16 large activations overflow: use "
            "--dtype bfloat16 or float32; otherwise the checkpoint is damaged."
        )
    kept_BTV = _first(wide_BTV, min(k, wide_BTV.shape[-1]))
    index_BTK = kept_BTV.nonzero()[:, -1].view(*wide_BTV.shape[:-1], -1)
    value_BTK, order_BTK = wide_BTV.gather(-1, index_BTK).sort(dim=-1, descending=True, stable=True)
    rest_BT1 = wide_BTV.masked_fill(kept_BTV, -torch.inf).logsumexp(-1, keepdim=True) - total_BT1
    return TopK(
        log_prob_BTK=(value_BTK - total_BT1).half(),
        index_BTK=index_BTK.gather(-1, order_BTK).int(),
        rest_BT=rest_BT1[..., 0].float(),
    )


def kl(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    targets_BT: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Return KL(teacher || student) of logits over a temperature, times its square, in nats.

    The teacher may lie on another device, and gets no gradient. `chunk` is a number of tokens.

    Raises:
        ValueError: the shapes differ, or the temperature is not above 0.

    Source: Hinton et al.
    """
    _check_logits(student_BTV, teacher_BTV, temperature)
    rows = partial(_logit_rows, temperature=temperature, reverse=False)
    return _mean(rows, student_BTV, [teacher_BTV], targets_BT, chunk)


def reverse_kl(
    student_BTV: Tensor,
    teacher_BTV: Tensor,
    targets_BT: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Return KL(student || teacher) of logits over a temperature, times its square, in nats.

    Otherwise as `kl`. Infinite where the teacher excludes a token that the student does not.

    Source: Gu et al., MiniLLM, for single tokens.
    """
    _check_logits(student_BTV, teacher_BTV, temperature)
    rows = partial(_logit_rows, temperature=temperature, reverse=True)
    return _mean(rows, student_BTV, [teacher_BTV], targets_BT, chunk)


def topk_kl(
    student_BTV: Tensor,
    teacher: TopK,
    targets_BT: Tensor,
    *,
    missing: Missing = "bucket",
    chunk: int | None = None,
) -> Tensor:
    """Return KL(teacher || student) over the k tokens that a teacher finds most likely, in nats.

    With "bucket" all other tokens are one class, for both; with "zero" the teacher never says them,
    and says the k so much the more, which pulls the student's other tokens down. At temperature 1:
    probabilities of some tokens cannot be cooled.

    Raises:
        ValueError: the shapes do not go together, or `missing` is neither.

    Source: arcee-ai/DistillKit.
    """
    if missing not in ("bucket", "zero"):
        raise ValueError(
            f"missing={missing!r} is no treatment of what k tokens leave. There are bucket and "
            "zero; pass missing='bucket'."
        )
    rows = partial(_class_rows, bucket=missing == "bucket", reverse=False)
    return _mean(rows, student_BTV, _parts(student_BTV, teacher), targets_BT, chunk)


def topk_reverse_kl(
    student_BTV: Tensor, teacher: TopK, targets_BT: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Return KL(student || teacher) over a teacher's k most likely tokens and a bucket, in nats.

    Otherwise as `topk_kl`. Give `rest_BT`: without it rounding may leave the bucket nothing, and
    the loss is infinite.

    Raises:
        ValueError: the shapes do not go together.
    """
    rows = partial(_class_rows, bucket=True, reverse=True)
    return _mean(rows, student_BTV, _parts(student_BTV, teacher), targets_BT, chunk)


def normalized_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], targets_BT: Tensor, *, eps: float = EPS
) -> Tensor:
    """Return the squared errors of hidden states, in units of the teacher's squares, over blocks.

    Each is a sequence of hidden_BTD by block, what the block returns, before any final norm. Each
    block's error is the mean over asked tokens and D; the blocks' are summed, not averaged.

    Raises:
        ValueError: the numbers of blocks or the shapes differ.

    >>> one, two = torch.tensor([[[1.0, 1, 3]]]), torch.tensor([[[1.0, 2, 2]]])
    >>> round(normalized_mse([one], [two], torch.tensor([[7]]), eps=0).item(), 4)
    0.2222

    Source: Kurtic et al., SquareHead, with eps as in their code.
    """
    if [h.shape for h in student] != [h.shape for h in teacher]:
        raise ValueError(
            f"hidden states of the student {_sizes(student)} and of the teacher {_sizes(teacher)} "
            "do not match. Compare as many blocks, of equal width; pass those of the teacher that "
            "the student has kept."
        )
    asked_BT = targets_BT != IGNORED
    total = torch.zeros((), device=targets_BT.device)
    if not asked_BT.any():
        return total + sum(hidden_BTD.flatten()[:1].sum() * 0 for hidden_BTD in student)
    for student_BTD, teacher_BTD in zip(student, teacher, strict=True):
        asked = asked_BT.to(student_BTD.device)
        teacher_ND = _wide(teacher_BTD.detach().to(student_BTD.device)[asked])
        error = (_wide(student_BTD[asked]) - teacher_ND).square().mean()
        total = total.to(error) + error / (teacher_ND.square().mean() + eps)
    return total


def data_weight(fraction: float) -> float:
    """Return the weight of a teacher's loss beside that of the text, by the share of data kept.

    The less text, the more the teacher counts: 1 - fraction / 2, between a half and 1.

    Raises:
        ValueError: the fraction is not between 0 and 1.

    >>> data_weight(0.5)
    0.75

    Source: our line through what Ben-Baruch et al., Distilling the Knowledge in Data Pruning, find.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"{fraction} is no share of the data, which lies between 0 and 1. Pass 1.0 for all."
        )
    return min(1.0, max(0.5, 1 - fraction / 2))


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A loss against a teacher, `fn(student, teacher, targets_BT)`, and what it takes of both.

    With "logits" the student's are logits_BTV, and the teacher's too; `stored` takes a `TopK` in
    their place. With "hidden" both are the outputs of blocks, and `stored` is the same.
    """

    fn: Callable[..., Tensor]
    stored: Callable[..., Tensor]
    needs: Literal["logits", "hidden"]
    paper: str


DISTILLATIONS: Registry[Distillation] = Registry(
    "recover.distill",
    {
        "kl": Distillation(
            fn=kl,
            stored=topk_kl,
            needs="logits",
            paper="Hinton et al., Distilling the Knowledge in a Neural Network",
        ),
        "reverse-kl": Distillation(
            fn=reverse_kl,
            stored=topk_reverse_kl,
            needs="logits",
            paper="Gu et al., MiniLLM: Knowledge Distillation of Large Language Models",
        ),
        "hidden": Distillation(
            fn=normalized_mse,
            stored=normalized_mse,
            needs="hidden",
            paper="Kurtic et al., Sparse Fine-tuning for Inference Acceleration of Large Language "
            "Models",
        ),
    },
)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _first(value_BTV: Tensor, k: int) -> Tensor:
    """Return a mask of the k largest of each row, of equal ones those that come first."""
    least_BT1 = value_BTV.topk(k, dim=-1).values[..., -1:]
    above_BTV, level_BTV = value_BTV > least_BT1, value_BTV == least_BT1
    room_BT1 = k - above_BTV.sum(-1, keepdim=True)
    return above_BTV | (level_BTV & (level_BTV.cumsum(-1, dtype=torch.int32) <= room_BT1))


def _divergence(one_nC: Tensor, two_nC: Tensor) -> Tensor:
    """Return KL(one || two) of log probabilities by row, (n,); classes without `one` add nothing.

    Their difference is replaced before it is multiplied: 0 times infinity has no gradient.
    """
    prob_nC = one_nC.exp()
    apart_nC = torch.where(prob_nC > 0, one_nC - two_nC, 0)
    return (prob_nC * apart_nC).sum(-1)


def _logit_rows(
    student_nV: Tensor, teacher_nV: Tensor, *, temperature: float, reverse: bool
) -> Tensor:
    """Return the divergence of logits by token, times the temperature's square."""
    log_student_nV = (student_nV / temperature).log_softmax(-1)
    log_teacher_nV = (teacher_nV / temperature).log_softmax(-1)
    pair = (log_student_nV, log_teacher_nV) if reverse else (log_teacher_nV, log_student_nV)
    return _divergence(*pair) * temperature**2


def _class_rows(
    student_nV: Tensor,
    log_prob_nK: Tensor,
    index_nK: Tensor,
    rest_n1: Tensor | None = None,
    *,
    bucket: bool,
    reverse: bool,
) -> Tensor:
    """Return the divergence over a teacher's k tokens, and the bucket of all others, by token."""
    log_student_nV, index_nK = student_nV.log_softmax(-1), index_nK.long()
    student_nC = log_student_nV.gather(-1, index_nK)
    mass_n1 = log_prob_nK.logsumexp(-1, keepdim=True)
    teacher_nC = log_prob_nK - mass_n1
    if bucket and index_nK.shape[-1] < student_nV.shape[-1]:
        if rest_n1 is None:
            rest_n1 = (1 - mass_n1.exp()).clamp(min=0).log()
        # log probabilities were rounded: what they sum to gives way to what is known of the rest
        teacher_nC = torch.cat([teacher_nC + (-rest_n1.exp()).log1p(), rest_n1], dim=-1)
        others_nV = log_student_nV.scatter(-1, index_nK, -torch.inf)
        student_nC = torch.cat([student_nC, others_nV.logsumexp(-1, keepdim=True)], dim=-1)
    return _divergence(*((student_nC, teacher_nC) if reverse else (teacher_nC, student_nC)))


def _parts(student_BTV: Tensor, teacher: TopK) -> list[Tensor]:
    """Return a teacher's k tokens as tensors with a last dimension each.

    Raises:
        ValueError: they are not those of as many tokens, or more than the vocabulary.
    """
    log_prob_BTK, index_BTK, rest_BT = teacher
    shape, k = student_BTV.shape[:-1], log_prob_BTK.shape[-1]
    wrong = log_prob_BTK.shape != index_BTK.shape or log_prob_BTK.shape[:-1] != shape
    if wrong or k > student_BTV.shape[-1] or (rest_BT is not None and rest_BT.shape != shape):
        raise ValueError(
            f"a teacher's tokens {tuple(log_prob_BTK.shape)} with indices {tuple(index_BTK.shape)} "
            f"do not go with logits {tuple(student_BTV.shape)}. Read the windows that the student "
            "reads, of a teacher with the same vocabulary."
        )
    return [log_prob_BTK, index_BTK] + ([] if rest_BT is None else [rest_BT[..., None]])


def _check_logits(student_BTV: Tensor, teacher_BTV: Tensor, temperature: float) -> None:
    """Check what is compared.

    Raises:
        ValueError: it cannot be.
    """
    if student_BTV.shape != teacher_BTV.shape:
        raise ValueError(
            f"logits {tuple(student_BTV.shape)} of the student and {tuple(teacher_BTV.shape)} of "
            "the teacher differ in shape. Both must read the same windows and know the same "
            "vocabulary; pass the model that this one was pruned from."
        )
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"a temperature of {temperature} divides logits by nothing sensible. It lies above 0; "
            "pass temperature=1.0."
        )


def _mean(
    rows: Rows,
    student_BTV: Tensor,
    teacher: Sequence[Tensor],
    targets_BT: Tensor,
    chunk: int | None,
) -> Tensor:
    """Return the mean loss of the tokens whose targets are asked for; 0 where none is.

    Raises:
        ValueError: the targets are not of as many tokens.
    """
    if targets_BT.shape != student_BTV.shape[:-1]:
        raise ValueError(
            f"targets {tuple(targets_BT.shape)} do not go with logits {tuple(student_BTV.shape)}. "
            "Each position has one target, the next token; pass next_tokens(ids)."
        )
    asked_N = (targets_BT.flatten() != IGNORED).nonzero().flatten()
    size = chunk or max(1, LOGITS // student_BTV.shape[-1])
    flat = [part.detach().flatten(0, -2) for part in teacher]
    total: Tensor = _InChunks.apply(  # type: ignore[no-untyped-call]
        student_BTV.flatten(0, -2), asked_N.to(student_BTV.device), rows, size, *flat
    )
    return total / max(1, len(asked_N))


class _InChunks(torch.autograd.Function):
    """A sum over rows, of which no more than a chunk is ever held in float32.

    On the way back each chunk is computed again, and differentiated alone. (Checkpointing slices of
    the logits would give every chunk a gradient as large as all of them.)
    """

    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, asked_N: Tensor, rows: Rows, size: int, *teacher: Tensor
    ) -> Tensor:
        """Return the sum of `rows` over the rows asked for."""
        ctx.rows, ctx.size = rows, size
        ctx.save_for_backward(student_NV, asked_N, *teacher)
        total = _wide(student_NV.new_zeros(()))
        for part_n in asked_N.split(size):
            total += rows(_wide(student_NV[part_n]), *_taken(teacher, part_n, total)).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, in their dtype; rows not asked for have none."""
        student_NV, asked_N, *teacher = ctx.saved_tensors
        grad_NV = torch.zeros_like(student_NV)
        for part_n in asked_N.split(ctx.size):
            student_nV = _wide(student_NV[part_n]).detach().requires_grad_()
            with torch.enable_grad():
                loss = ctx.rows(student_nV, *_taken(teacher, part_n, student_nV)).sum()
            (found_nV,) = torch.autograd.grad(loss, student_nV)
            grad_NV[part_n] = (found_nV * grads[0]).to(grad_NV.dtype)
        return grad_NV, None, None, None, *[None] * len(teacher)


def _taken(teacher: Sequence[Tensor], part_n: Tensor, like: Tensor) -> list[Tensor]:
    """Return rows of what a teacher says, beside the student, floats as wide as it."""
    found = [value[part_n.to(value.device)].to(like.device) for value in teacher]
    return [value.to(like.dtype) if value.is_floating_point() else value for value in found]


def _sizes(hidden: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(hidden_BTD.shape) for hidden_BTD in hidden]
