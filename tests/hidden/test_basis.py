"""Principal axes, channels of most weight, and the sizes that a config takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from llmprune.base.errors import NumericalError, RecipeError, UnsupportedModel
from llmprune.checkpoint.skeleton import empty
from llmprune.hidden.basis import kept_energy, principal_axes, top_channels
from llmprune.hidden.residual import ResidualGram
from llmprune.hidden.sizes import (
    config_changes,
    config_of_width,
    entrance_scale,
    fitting_width,
    untying_cost,
)

ROWS = torch.tensor([[2.0, 2.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


def test_the_axes_of_four_tokens() -> None:
    seen = ResidualGram(per_token=False)
    seen.update(ROWS)
    assert seen.result().tolist() == [[7.0, 5.0], [5.0, 7.0]]
    axes, energy = principal_axes(seen.result())
    assert energy.tolist() == pytest.approx([12.0, 2.0])
    assert axes[:, 0].tolist() == pytest.approx([0.70711, 0.70711], abs=1e-5)
    assert axes[:, 1].tolist() == pytest.approx([0.70711, -0.70711], abs=1e-5)
    assert kept_energy(energy, 1) == pytest.approx(12 / 14)
    kept = ROWS.double() @ axes[:, :1]
    assert float(kept.square().sum()) == pytest.approx(12)


@given(size=st.integers(1, 12), seed=st.integers(0, 999))
def test_axes_are_orthogonal_ordered_and_signed(size: int, seed: int) -> None:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(seed)).double()
    gram = x.T @ x
    axes, energy = principal_axes(gram)
    torch.testing.assert_close(axes.T @ axes, torch.eye(size).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(axes.T @ gram @ axes, energy.diag(), rtol=0, atol=1e-9 * size**2)
    assert bool((energy.diff() <= 0).all())
    assert bool((axes.gather(0, axes.abs().argmax(dim=0)[None]) > 0).all())
    flipped, _ = principal_axes(gram.T.clone())
    assert torch.equal(axes, flipped)


def test_equal_energies_give_the_same_axes_again() -> None:
    gram = torch.diag(torch.tensor([3.0, 3.0, 1.0, 3.0, 0.0]))
    axes, energy = principal_axes(gram)
    assert torch.equal(axes, principal_axes(gram.clone())[0])
    assert energy.tolist() == [3.0, 3.0, 3.0, 1.0, 0.0]
    torch.testing.assert_close(axes.T @ axes, torch.eye(5).double())
    with pytest.raises(NumericalError):
        principal_axes(torch.full((2, 2), float("inf")))


def test_channels_of_equal_score_are_taken_from_the_left() -> None:
    assert top_channels(torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0]), 3).tolist() == [1, 2, 3]
    assert top_channels(torch.ones(4), 2).tolist() == [0, 1]


def test_a_width_is_a_multiple_and_removes_what_was_asked() -> None:
    config = AutoConfig.for_model("mistral", hidden_size=256, num_attention_heads=8)
    assert fitting_width(config, 0.25) == 192
    assert fitting_width(config, 0.1) == 224  # 230.4 rounded down to a multiple of 8
    assert fitting_width(config, 0.1, multiple=64) == 192
    assert fitting_width(config, 0.0) == 256
    for share in (1.0, -0.1, 0.99):
        with pytest.raises(RecipeError, match=r"prune\.sparsity"):
            fitting_width(config, share)


def test_a_llama_s_width_is_a_multiple_of_its_heads_too() -> None:
    config = AutoConfig.for_model("llama", hidden_size=384, num_attention_heads=12)
    assert fitting_width(config, 0.25) == 288
    assert fitting_width(config, 0.3) == 264  # 268.8, and 12 divides 264 = 8 * 33
    assert fitting_width(config, 0.4) == 216  # not 224
    with pytest.raises(UnsupportedModel, match="takes no hidden size 224"):
        config_of_width(config, 224, untie=False)


def test_what_changes_in_a_config() -> None:
    config = AutoConfig.for_model(
        "mistral",
        hidden_size=256, num_attention_heads=8, head_dim=None, rms_norm_eps=1e-5,
        vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    found = config_changes(config, 192, untie=True)
    expected = {"hidden_size": 192, "rms_norm_eps": pytest.approx(1e-5 * 256 / 192)}
    assert {"head_dim": 32, **found} == {
        **{"head_dim": 32, "tie_word_embeddings": False},
        **expected,
    }
    assert "tie_word_embeddings" not in config_changes(config, 192, untie=False)
    assert config_of_width(config, 192, untie=False).head_dim == 32
    assert untying_cost(config, 192) == 192_000
    config.tie_word_embeddings = False
    assert untying_cost(config, 192) == 0


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", 1.0), ("gemma", 32**0.5), ("granite", 1.0)]
)
def test_what_embeddings_are_multiplied_with_is_read_at_the_first_block(
    make_model: Callable[..., Any], model_type: str, expected: float
) -> None:
    model = make_model(model_type)
    table = model.get_input_embeddings().weight
    assert entrance_scale(model, model.model.layers) == pytest.approx(expected)
    assert model.get_input_embeddings().weight is table
    empty(model)  # as of a checkpoint that is streamed
    assert entrance_scale(model, model.model.layers) == pytest.approx(expected)
    if model_type == "granite":
        model.model.embedding_multiplier = 12.0
        assert entrance_scale(model, model.model.layers) == pytest.approx(12.0)
