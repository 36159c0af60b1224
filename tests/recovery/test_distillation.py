"""Losses against a teacher: worked examples, the slow sums they stand for, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.base.errors import NumericalError, UnknownName
from llmprune.evaluation.windows import IGNORED
from llmprune.recovery.distillation import (
    DISTILLATIONS,
    TopK,
    data_weight,
    kl,
    normalized_mse,
    reverse_kl,
    strongest,
    topk_kl,
    topk_reverse_kl,
)

TEACHER, STUDENT = torch.tensor([[[2.0, 1, 0]]]), torch.tensor([[[1.0, 1, 1]]])
ONE = torch.tensor([[0]])
VOCAB = 7


def drawn(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * spread


def targets(seed: int, asked: float = 0.6) -> Tensor:
    """Return targets of 2 windows of 5 tokens, some of which are not asked for."""
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) < asked
    return torch.where(mask, 1, IGNORED)


def probabilities(logits_V: Sequence[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in logits_V]
    return [power / sum(powers) for power in powers]


def slow_divergence(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(one, two, strict=True) if p > 0)


def slow_mean(per_token: Callable[[int, int], float], targets_BT: Tensor) -> float:
    asked = [(b, t) for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist()]
    found = [per_token(b, t) for b, t in asked if targets_BT[b, t] != IGNORED]
    return sum(found) / len(found) if found else 0.0


def plain(
    student_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor, temperature: float, reverse: bool
) -> Tensor:
    """Return the loss over all logits at once, as autograd differentiates it."""
    log_s, log_t = (
        (value[targets_BT != IGNORED] / temperature).log_softmax(-1)
        for value in (student_BTV, teacher_BTV)
    )
    one, two = (log_s, log_t) if reverse else (log_t, log_s)
    return (one.exp() * (one - two)).sum(-1).mean() * temperature**2


def half_of(logits_BTV: Tensor, k: int) -> TopK:
    """Return the k most likely tokens, not rounded, and no word about the rest."""
    top = logits_BTV.log_softmax(-1).topk(k)
    return TopK(top.values, top.indices.int())


def test_the_worked_examples() -> None:
    assert kl(STUDENT, TEACHER, ONE).item() == pytest.approx(0.266217, abs=1e-6)
    assert kl(STUDENT, TEACHER, ONE, temperature=2).item() == pytest.approx(0.313684, abs=1e-6)
    assert reverse_kl(STUDENT, TEACHER, ONE).item() == pytest.approx(0.308994, abs=1e-6)
    top = half_of(TEACHER, 2)
    assert topk_kl(STUDENT, top, ONE, missing="zero").item() == pytest.approx(0.516409, abs=1e-6)
    assert topk_kl(STUDENT, top, ONE, missing="bucket").item() == pytest.approx(0.266217, abs=1e-6)
    one, two = torch.tensor([[[1.0, 1, 3]]]), torch.tensor([[[1.0, 2, 2]]])
    assert normalized_mse([one], [two], ONE, eps=0).item() == pytest.approx(2 / 9)


@settings(max_examples=30)
@given(st.integers(0, 999), st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 12))
def test_chunks_give_the_slow_sum(seed: int, temperature: float, chunk: int) -> None:
    student, teacher = drawn(seed, 2, 5, VOCAB), drawn(seed + 1, 2, 5, VOCAB)
    wanted = targets(seed)

    def pair(b: int, t: int) -> tuple[list[float], list[float]]:
        said = (probabilities(logits[b, t].tolist(), temperature) for logits in (teacher, student))
        return tuple(said)  # type: ignore[return-value]

    expected = slow_mean(lambda b, t: slow_divergence(*pair(b, t)), wanted) * temperature**2
    back = slow_mean(lambda b, t: slow_divergence(*pair(b, t)[::-1]), wanted) * temperature**2
    options: dict[str, Any] = {"temperature": temperature, "chunk": chunk}
    assert kl(student, teacher, wanted, **options).item() == pytest.approx(expected)
    assert reverse_kl(student, teacher, wanted, **options).item() == pytest.approx(back)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_of_chunks_are_those_of_all_at_once(
    reverse: bool, chunk: int | None, temperature: float
) -> None:
    student, teacher = drawn(1, 2, 5, VOCAB).requires_grad_(), drawn(2, 2, 5, VOCAB)
    wanted = targets(3)
    assert 0 < (wanted != IGNORED).sum() < 10
    loss = (reverse_kl if reverse else kl)(
        student, teacher, wanted, temperature=temperature, chunk=chunk
    )
    (found,) = torch.autograd.grad(3 * loss, student)
    whole = plain(student, teacher, wanted, temperature, reverse)
    (expected,) = torch.autograd.grad(3 * whole, student)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, expected)
    assert found[wanted == IGNORED].abs().sum() == 0


def test_the_gradient_of_kl_is_the_difference_of_probabilities() -> None:
    student, teacher = drawn(4, 2, 5, VOCAB).requires_grad_(), drawn(5, 2, 5, VOCAB)
    wanted = targets(6)
    (found,) = torch.autograd.grad(kl(student, teacher, wanted, temperature=2, chunk=2), student)
    apart = ((student.detach() / 2).softmax(-1) - (teacher / 2).softmax(-1)) * 2
    asked = (wanted != IGNORED)[..., None]
    torch.testing.assert_close(found, apart * asked / asked.sum())


@pytest.mark.parametrize("missing", ["bucket", "zero", "reverse"])
@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_gradients_over_few_tokens_agree_with_differences(missing: Any, k: int) -> None:
    student, wanted = drawn(7, 2, 5, VOCAB).requires_grad_(), targets(8)
    top = half_of(drawn(9, 2, 5, VOCAB), k)

    def loss(student: Tensor) -> Tensor:
        if missing == "reverse":
            return topk_reverse_kl(student, top, wanted, chunk=2)
        return topk_kl(student, top, wanted, missing=missing, chunk=2)

    assert torch.autograd.gradcheck(loss, student)


class _Largest(TorchDispatchMode):
    """Sees how many values the largest float32 tensor has that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.dtype == torch.float32:
                self.size = max(self.size, each.numel())
        return result


@pytest.mark.parametrize("loss", ["kl", "reverse-kl"])
@pytest.mark.parametrize("stored", [False, True])
def test_no_more_than_a_chunk_is_ever_held_in_float32(loss: str, stored: bool) -> None:
    student = drawn(1, 4, 16, 50).bfloat16().requires_grad_()
    teacher = drawn(2, 4, 16, 50).bfloat16()
    said: Any = strongest(teacher, 5) if stored else teacher
    row = DISTILLATIONS[loss]
    wanted = torch.ones(4, 16, dtype=torch.int64)
    for chunk in (4, 16):
        with _Largest() as seen:
            (row.stored if stored else row.fn)(student, said, wanted, chunk=chunk).backward()
        assert seen.size == chunk * 50
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = drawn(1, 2, 5, VOCAB).bfloat16(), drawn(2, 2, 5, VOCAB).bfloat16()
    found = kl(student, teacher, targets(3))
    assert found.dtype == torch.float32
    expected = kl(student.double(), teacher.double(), targets(3))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_that_both_exclude_cost_nothing(reverse: bool) -> None:
    student, teacher = drawn(1, 2, 5, VOCAB), drawn(2, 2, 5, VOCAB)
    loss, wanted = reverse_kl if reverse else kl, targets(3)
    expected = loss(student, teacher, wanted)
    barred = torch.full((2, 5, 1), -torch.inf, dtype=torch.float64)
    wide = torch.cat([student, barred], -1).requires_grad_()
    found = loss(wide, torch.cat([teacher, barred], -1), wanted)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert wide.grad is not None and torch.isfinite(wide.grad).all()


def test_windows_without_a_question_cost_nothing() -> None:
    student, nothing = drawn(1, 2, 5, VOCAB).requires_grad_(), torch.full((2, 5), IGNORED)
    for loss in (
        kl(student, drawn(2, 2, 5, VOCAB), nothing),
        topk_kl(student, half_of(drawn(2, 2, 5, VOCAB), 2), nothing),
        normalized_mse([student], [drawn(2, 2, 5, VOCAB)], nothing),
    ):
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0 and grad.abs().sum() == 0


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, VOCAB))
def test_few_tokens_and_a_bucket_give_the_slow_sum(seed: int, k: int) -> None:
    student, teacher = drawn(seed, 2, 5, VOCAB), drawn(seed + 1, 2, 5, VOCAB)
    wanted, top = targets(seed), half_of(teacher, k)

    def classes(b: int, t: int, bucket: bool) -> tuple[list[float], list[float]]:
        ours, theirs = (probabilities(z[b, t].tolist()) for z in (student, teacher))
        kept = top.index_BTK[b, t].tolist()
        rest = [sum(p for i, p in enumerate(said) if i not in kept) for said in (theirs, ours)]
        one, two = [theirs[i] for i in kept], [ours[i] for i in kept]
        if bucket:
            return (one, two) if k == VOCAB else ([*one, rest[0]], [*two, rest[1]])
        return [p / sum(one) for p in one], two

    for missing in ("bucket", "zero"):
        expected = slow_mean(
            lambda b, t, kind=missing: slow_divergence(*classes(b, t, kind == "bucket")), wanted
        )
        found = topk_kl(student, top, wanted, missing=missing, chunk=3)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(expected, abs=1e-9)
    back = slow_mean(lambda b, t: slow_divergence(*classes(b, t, True)[::-1]), wanted)
    assert topk_reverse_kl(student, top, wanted).item() == pytest.approx(back, abs=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 999))
def test_a_bucket_sees_more_the_fewer_tokens_are_in_it(seed: int) -> None:
    student, teacher = drawn(seed, 2, 5, VOCAB), drawn(seed + 1, 2, 5, VOCAB)
    wanted = targets(seed, asked=1)
    found = [topk_kl(student, half_of(teacher, k), wanted).item() for k in range(1, VOCAB + 1)]
    assert all(one <= two + 1e-12 for one, two in pairwise(found))
    full = kl(student, teacher, wanted).item()
    assert found[-2:] == pytest.approx([full, full])  # one token is left, or none


def test_the_rest_counts_as_it_was_before_log_probabilities_were_rounded() -> None:
    logits = drawn(1, 2, 5, 40, spread=8)  # a few tokens have almost everything
    wanted = targets(2, asked=1)
    said = strongest(logits, 4)
    with_rest = topk_kl(logits, said, wanted).item()
    without = topk_kl(logits, said._replace(rest_BT=None), wanted).item()
    assert 0 <= with_rest < 1e-7 < without
    assert math.isfinite(topk_reverse_kl(logits, said, wanted).item())


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 12), st.booleans())
def test_the_strongest_are_the_first_of_a_stable_sort(seed: int, k: int, tied: bool) -> None:
    logits = drawn(seed, 2, 3, 10)
    logits = logits.round() if tied else logits
    found = strongest(logits, k)
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :k]
    assert found.index_BTK.dtype == torch.int32 and torch.equal(found.index_BTK.long(), order)
    log_prob = logits.log_softmax(-1)
    assert torch.equal(found.log_prob_BTK, log_prob.gather(-1, order).half())
    rest = 1 - log_prob.gather(-1, order).exp().sum(-1)
    assert found.rest_BT is not None
    torch.testing.assert_close(found.rest_BT.exp(), rest.float(), atol=1e-6, rtol=0)


def test_logits_that_are_not_finite_have_no_strongest() -> None:
    logits = torch.zeros(1, 2, 4)
    for bad in (math.nan, math.inf):
        logits[0, 1, 2] = bad
        with pytest.raises(NumericalError, match="--dtype bfloat16"):
            strongest(logits, 2)
    logits[0, 1, 2] = -math.inf  # a token barred by the model itself
    assert strongest(logits, 4).log_prob_BTK[0, 1, -1] == -math.inf
    with pytest.raises(ValueError, match="0 most likely tokens are none"):
        strongest(logits, 0)


@settings(max_examples=30)
@given(st.integers(0, 999), st.floats(0.1, 100))
def test_hidden_errors_are_in_units_of_the_teacher(seed: int, scale: float) -> None:
    student = [drawn(seed + block, 2, 5, 4) for block in range(3)]
    teacher = [drawn(seed + 10 + block, 2, 5, 4) for block in range(3)]
    wanted = targets(seed)
    expected = 0.0
    for one, two in zip(student, teacher, strict=True):
        places = (wanted != IGNORED).nonzero().tolist()
        error = [(one[b, t, d] - two[b, t, d]).item() ** 2 for b, t in places for d in range(4)]
        size = [two[b, t, d].item() ** 2 for b, t in places for d in range(4)]
        if places:
            expected += (sum(error) / len(error)) / (sum(size) / len(size) + 0.5)
    assert normalized_mse(student, teacher, wanted, eps=0.5).item() == pytest.approx(expected)
    larger = ([value * scale for value in side] for side in (student, teacher))
    found = normalized_mse(*larger, wanted, eps=0).item()
    assert found == pytest.approx(normalized_mse(student, teacher, wanted, eps=0).item())


def test_hidden_errors_reach_the_student_alone_and_only_where_asked() -> None:
    student = [drawn(1, 2, 5, 4).requires_grad_(), drawn(2, 2, 5, 4).requires_grad_()]
    teacher = [drawn(3, 2, 5, 4).requires_grad_(), drawn(4, 2, 5, 4)]
    wanted = targets(5)
    normalized_mse(student, teacher, wanted).backward()
    assert teacher[0].grad is None
    for one, two in zip(student, teacher, strict=True):
        asked = (wanted != IGNORED)[..., None].expand_as(one)
        slope = 2 * (one - two) / asked.sum() / (two[asked].square().mean() + 2**-7)
        torch.testing.assert_close(one.grad, (slope * asked).detach())


def test_the_less_data_the_more_the_teacher_counts() -> None:
    found = [data_weight(fraction) for fraction in (0.0, 0.2, 0.5, 1.0)]
    assert found == pytest.approx([1.0, 0.9, 0.75, 0.5])
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="no share of the data"):
            data_weight(wrong)


def test_the_table_says_what_each_loss_takes() -> None:
    assert {key: row.needs for key, row in DISTILLATIONS.items()} == {
        "kl": "logits",
        "reverse-kl": "logits",
        "hidden": "hidden",
    }
    logits, wanted = drawn(1, 2, 5, VOCAB), targets(2)
    same: dict[str, Any] = {"logits": logits, "hidden": [logits]}
    for row in DISTILLATIONS.values():
        value = same[row.needs]
        said = strongest(logits, 3) if row.needs == "logits" else value
        assert row.fn(value, value, wanted).item() == pytest.approx(0)
        assert row.stored(value, said, wanted).item() == pytest.approx(0, abs=1e-6)
        assert row.paper
    with pytest.raises(UnknownName, match=r"recover\.distill: 'reverse_kl'.*'reverse-kl'"):
        DISTILLATIONS["reverse_kl"]


def test_what_does_not_go_together_is_refused() -> None:
    logits, wanted, top = drawn(1, 2, 5, VOCAB), targets(2), half_of(drawn(1, 2, 5, VOCAB), 3)
    with pytest.raises(ValueError, match=r"\(2, 5, 7\) of the student and \(2, 5, 6\)"):
        kl(logits, logits[..., :6], wanted)
    with pytest.raises(ValueError, match="temperature of 0 "):
        kl(logits, logits, wanted, temperature=0)
    with pytest.raises(ValueError, match=r"targets \(2, 4\) do not go with logits"):
        kl(logits, logits, wanted[:, 1:])
    with pytest.raises(ValueError, match="missing='nothing'"):
        topk_kl(logits, top, wanted, missing="nothing")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(1, 5, 3\) with indices \(1, 5, 3\) do not go"):
        topk_kl(logits, TopK(*(value[:1] for value in top[:2])), wanted)
    with pytest.raises(ValueError, match="same vocabulary"):
        topk_kl(logits[..., :2], top, wanted)
    with pytest.raises(ValueError, match="as many blocks, of equal width"):
        normalized_mse([logits], [logits, logits], wanted)
