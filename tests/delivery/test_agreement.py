"""When two sets of logits agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmprune.delivery.agreement import Agreement, compare


@pytest.fixture
def logits() -> Tensor:
    return 4 * torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(0))


def compared(folder: Path, ours: Tensor, stock: Tensor, dtype: str = "float32") -> Agreement:
    for name, value in (("ours", ours), ("stock", stock)):
        save_file({"logits": value.contiguous()}, folder / name)
    return compare(folder / "ours", folder / "stock", f"torch.{dtype}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equal_logits_agree(tmp_path: Path, logits: Tensor, dtype: str) -> None:
    found = compared(tmp_path, logits, logits, dtype)
    assert found.passed and found.relative == found.kl == 0 and found.same_argmax == 1
    assert found.exact == (dtype == "float32")


@pytest.mark.parametrize(("share", "passes"), [(0.9e-5, True), (1.2e-5, False)])
def test_float32_is_compared_with_the_largest_logit(
    tmp_path: Path, logits: Tensor, share: float, passes: bool
) -> None:
    moved = logits.clone()
    moved[1, 69, 3] += share * float(logits.abs().max())  # the last position counts too
    found = compared(tmp_path, moved, logits)
    assert found.passed == passes
    assert found.relative == pytest.approx(share, rel=0.1)


def test_16_bits_may_round(tmp_path: Path, logits: Tensor) -> None:
    found = compared(tmp_path, logits.bfloat16(), logits, "bfloat16")
    assert found.relative > 1e-3 and found.passed
    assert not compared(tmp_path, logits.bfloat16(), logits, "float32").passed


def test_kl_is_the_mean_over_positions(tmp_path: Path, logits: Tensor) -> None:
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    found = compared(tmp_path, logits, other, "bfloat16")
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert found.kl == pytest.approx(float(expected), rel=1e-5)
    assert not found.passed


def test_16_bits_need_the_same_predictions(tmp_path: Path) -> None:
    """Another winner counts as the same only where the two best are nearer than rounding."""
    stock = torch.zeros(2, 70, 16)
    stock[..., 0], stock[..., 1] = 8.0, 7.5  # bfloat16 rounds 8 to 1/16
    stock[0, :7, 1] = 7.95
    ours = stock.clone()
    ours[0, :7, 1] = 8.05  # wins now, within rounding
    found = compared(tmp_path, ours, stock, "bfloat16")
    assert found.same_argmax == 1.0 and found.passed
    assert compared(tmp_path, ours, stock, "float16").same_argmax == pytest.approx(1 - 7 / 140)
    ours = stock.clone()
    ours[1, 4, 1] = 8.05  # wins now, from far below
    found = compared(tmp_path, ours, stock, "bfloat16")
    assert found.same_argmax == pytest.approx(1 - 1 / 140)
    assert found.kl < 1e-3 and not found.passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("both", [False, True])
def test_what_is_not_finite_never_passes(
    tmp_path: Path, logits: Tensor, value: float, dtype: str, both: bool
) -> None:
    broken = logits.clone()
    broken[0, 3, 2] = value
    assert not compared(tmp_path, broken, broken if both else logits, dtype).passed


def test_shapes_must_be_equal(tmp_path: Path, logits: Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        compared(tmp_path, logits, logits[:, :60])
    with pytest.raises((ValueError, RuntimeError)):
        compared(tmp_path, logits[:, :64], logits[:1, :64])


def test_the_numbers_are_told(tmp_path: Path, logits: Tensor) -> None:
    text = compared(tmp_path, logits * 1.1, logits).text()
    assert "1.0e-01 of the largest logit" in text and "KL" in text and "100.00 %" in text
