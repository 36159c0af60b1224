"""The perplexity of windows by the package's two losses: streamed, and of a model in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmprune.evaluation.perplexity import loss_of_blocks, loss_of_model, of_loss


def of_blocks(*windows: Any, micro_batch: int = 1) -> tuple[float, int]:
    """Return (perplexity, predicted tokens) of blocks, inputs and perhaps targets."""
    total, count = loss_of_blocks(*windows, micro_batch=micro_batch)
    return of_loss(total, count), count


def of_model(model: Any, *windows: Tensor, micro_batch: int = 1) -> tuple[float, int]:
    """Return (perplexity, predicted tokens) of a model in memory; as `of_blocks`."""
    total, count = loss_of_model(model, *windows, micro_batch=micro_batch)
    return of_loss(total, count), count
