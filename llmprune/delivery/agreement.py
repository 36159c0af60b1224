"""Do two sets of logits agree? In float32 to rounding, in 16 bits by what they predict.

Legend: N rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FLOAT32_TOLERANCE = 1e-5
KL_TOLERANCE = 1e-3
ARGMAX_SHARE = 0.999


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two sets of logits are apart; `relative` is max|d| over max|logit|."""

    passed: bool
    relative: float
    kl: float
    same_argmax: float
    exact: bool

    def text(self) -> str:
        """Return the numbers as a person reads them."""
        return (
            f"max difference {self.relative:.1e} of the largest logit, KL {self.kl:.1e}, "
            f"same prediction at {100 * self.same_argmax:.2f} % of positions"
        )


def compare(ours: Path, stock: Path, dtype: str) -> Agreement:
    """Compare the `logits` of two safetensors files, computed in `dtype`.

    float32 passes within 1e-5 of the largest logit; 16-bit types need KL < 1e-3 and the same argmax
    at 99.9 % of positions, where two best logits nearer than the type's rounding count as one.
    """
    import torch
    from safetensors import safe_open

    with safe_open(str(ours), "pt") as one, safe_open(str(stock), "pt") as other:
        ours_TV = one.get_tensor("logits").flatten(0, 1)
        stock_TV = other.get_tensor("logits").flatten(0, 1)
    rounding = torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps
    largest = difference = kl = 0.0
    same = 0
    for left, right in zip(ours_TV.split(64), stock_TV.split(64), strict=True):
        left, right = left.float(), right.float()
        largest = max(largest, float(right.abs().max()))
        apart = (left - right).abs()
        difference = max(difference, float(apart.max()))
        p, q = left.log_softmax(-1), right.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        best = right.topk(2, dim=-1).values
        near = (best[:, 0] - best[:, 1]) <= 2 * rounding * best[:, 0].abs()
        same += int(((left.argmax(-1) == right.argmax(-1)) | near).sum())
    positions = len(ours_TV)
    relative = difference / max(largest, 1e-30)
    share = same / positions
    kl /= positions
    exact = dtype == "torch.float32"
    finite = bool(torch.isfinite(torch.tensor([relative, kl])).all())
    passed = relative <= FLOAT32_TOLERANCE if exact else kl < KL_TOLERANCE and share >= ARGMAX_SHARE
    return Agreement(
        passed=passed and finite, relative=relative, kl=kl, same_argmax=share, exact=exact
    )
