"""Models whose norms and biases matter, and models that compute in float64 from end to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.hidden.roles import Blueprint
from llmprune.hidden.tracing import trace_roles

Traced = tuple[Any, Family, Blueprint]


@pytest.fixture(scope="session")
def shaken(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """Return what builds a pico model whose vectors are away from ones and zeros."""

    def build(model_type: str, *, tied: bool = True, eps: float | None = None) -> Any:
        model = make_model(model_type, tied=tied)
        if eps is not None:
            config = model.config
            config.rms_norm_eps = eps
            model = _again(model, config)
        generator = torch.Generator().manual_seed(5)
        for value in model.parameters():
            if value.dim() == 1:
                value.data += 0.3 * torch.randn(value.shape, generator=generator)
        return model

    def _again(model: Any, config: Any) -> Any:
        fresh = type(model)(config).eval()
        fresh.load_state_dict(model.state_dict())
        return fresh

    return build


@pytest.fixture(scope="session")
def traced(shaken: Callable[..., Any]) -> Callable[..., Traced]:
    """Return a shaken model, its family and who reads and writes its stream."""

    def build(model_type: str, **options: Any) -> Traced:
        model = shaken(model_type, **options)
        family = find_family(model.config)
        return model, family, trace_roles(model, family)

    return build


def in_float64(model: Any) -> Any:
    """Return a model in float64 whose norms do not go through float32, as they do for use."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return model


def _norm(module: nn.Module) -> Callable[[Tensor], Tensor]:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0

    def forward(x: Tensor) -> Tensor:
        mean = x.square().mean(dim=-1, keepdim=True)
        return (offset + module.weight) * x / (mean + eps).sqrt()

    return forward


@pytest.fixture(scope="session")
def logits() -> Callable[[Any, Tensor], Tensor]:
    @torch.no_grad()
    def of(model: Any, tokens_NT: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
        return found

    return of
