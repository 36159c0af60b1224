"""Turned parameters compute what they did; cut ones what the large model does with zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.hidden.proof import masked, narrowed_model, random_rotation
from llmprune.hidden.roles import Roles
from llmprune.hidden.turning import narrow_trunk, rotate_hidden, select_hidden
from tests.hidden.conftest import in_float64
from tests.reference import narrowing

Traced = Callable[..., Any]
Logits = Callable[[Any, Tensor], Tensor]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma", "granite", "phi3")
KEPT = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 15, 16, 18, 19, 20, 21, 22, 24, 25, 26, 28, 29,
                     30, 31])  # fmt: skip


def test_fewer_channels_divide_by_fewer() -> None:
    """x = (3, 4, 0, 0) has the RMS 2.5; (3, 4) has 3.5355, the root of 2 more."""
    x, ones = torch.tensor([3.0, 4.0, 0.0, 0.0]), torch.ones(4)
    roles = Roles(width=4, norms={"norm": 0.0}, readers={"up": (1, "norm")})
    params = {"norm": ones, "up": torch.eye(4)}
    assert (x / x.square().mean().sqrt())[:2].tolist() == pytest.approx([1.2, 1.6])
    small = x[:2] / x[:2].square().mean().sqrt()
    assert small.tolist() == pytest.approx([0.84853, 1.13137], abs=1e-5)
    chosen = select_hidden(params, roles, torch.tensor([0, 1]))
    assert (chosen["norm"] * small).tolist() == pytest.approx([1.2, 1.6])
    assert torch.equal(chosen["up"], torch.eye(4)[:, :2])
    turned = rotate_hidden(params, roles, torch.eye(4)[:, :2])
    assert turned["norm"].tolist() == [1.0, 1.0]
    assert (turned["up"] @ small).tolist() == pytest.approx([1.2, 1.6, 0, 0])


def test_an_offset_counts_as_part_of_the_weight() -> None:
    roles = Roles(width=4, norms={"norm": 1.0}, readers={"up": (1, "norm")})
    params = {"norm": torch.tensor([0.5, 0.0, 0.0, 1.0]), "up": torch.ones(1, 4)}
    chosen = select_hidden(params, roles, torch.tensor([0]))
    assert chosen["norm"].tolist() == [2.0]  # 1 + 2 is twice 1 + 0.5
    turned = rotate_hidden(params, roles, torch.eye(4)[:, [3]])
    assert turned["norm"].tolist() == [0.0] and turned["up"].tolist() == [[4.0]]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_rotation_changes_nothing(
    traced: Traced, logits: Logits, tokens: Tensor, model_type: str, tied: bool
) -> None:
    model, family, blueprint = traced(model_type, tied=tied)
    expected = logits(in_float64(copy.deepcopy(model)), tokens)
    turned = narrowed_model(model.double(), family, blueprint, random_rotation(32))
    assert turned.get_input_embeddings().weight is not turned.get_output_embeddings().weight
    found = logits(in_float64(turned), tokens)
    assert expected.std() > 1e-3
    # routing weights and Gemma's multiplier of embeddings go through float32 in any dtype
    close = 1e-6 if model_type in ("mixtral", "gemma") else 1e-9
    assert (found - expected).abs().max() <= close * max(1, expected.abs().max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_smaller_stock_model_is_the_large_one_with_zeros(
    traced: Traced, logits: Logits, tokens: Tensor, model_type: str, rotated: bool, tied: bool
) -> None:
    """The eps is large, so that it matters; norms of queries and keys would get it too."""
    eps = 1e-6 if model_type == "qwen3" else 0.05
    model, family, blueprint = traced(model_type, tied=tied, eps=eps)
    basis = random_rotation(32)[:, :24] if rotated else KEPT
    small = narrowed_model(model, family, blueprint, basis)
    assert type(small) is type(model) and small.config.hidden_size == 24
    assert small.config.rms_norm_eps == pytest.approx(eps * 32 / 24)
    assert small.config.head_dim == 8
    ties = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert ties == (tied and not rotated) == small.config.tie_word_embeddings
    expected = logits(masked(model, family, blueprint, basis), tokens)
    difference = (logits(small, tokens) - expected).abs().max()
    assert difference <= 1e-5 * max(1, expected.abs().max())


def test_neither_the_factor_nor_the_eps_may_be_missing(
    traced: Traced, logits: Logits, tokens: Tensor
) -> None:
    model, family, blueprint = traced("llama", eps=0.05)
    expected = logits(masked(model, family, blueprint, KEPT), tokens)
    small = narrowed_model(model, family, blueprint, KEPT)
    for name, module in small.named_modules():
        if name.endswith("norm"):
            module.variance_epsilon = 0.05
    assert (logits(small, tokens) - expected).abs().max() > 1e-3
    small = narrowed_model(model, family, blueprint, KEPT)
    for name, value in small.named_parameters():
        if name.endswith("norm.weight"):
            value.data /= (32 / 24) ** 0.5
    assert (logits(small, tokens) - expected).abs().max() > 1e-1


@pytest.mark.parametrize("tied", [True, False])
def test_gemma_s_embeddings_make_up_for_their_multiplier(traced: Traced, tied: bool) -> None:
    model, family, blueprint = traced("gemma", tied=tied)
    small = narrowed_model(model, family, blueprint, KEPT)
    factor = (32 / 24) ** 0.5
    table = model.model.embed_tokens.weight[:, KEPT]
    torch.testing.assert_close(small.model.embed_tokens.weight, table * factor)
    before, after = (1 + each.model.norm.weight for each in (model, small))
    torch.testing.assert_close(after, before[KEPT] * (1 if tied else factor))
    inside = [1 + each.model.layers[0].input_layernorm.weight for each in (model, small)]
    torch.testing.assert_close(inside[1], inside[0][KEPT] * factor)
    if not tied:
        assert torch.equal(small.lm_head.weight, model.lm_head.weight[:, KEPT])


def test_all_at_once_is_one_step_after_the_other(traced: Traced) -> None:
    """Folding, turning and cutting by name, where norms keep the factor that ours fold as well."""
    model, family, blueprint = traced("llama", tied=False)
    rotation = random_rotation(32)
    state = {name: value.double() for name, value in model.state_dict().items()}
    steps = narrowing.cut(narrowing.rotate(narrowing.fold_norms(state), rotation), 24)
    ours = narrowed_model(model.double(), family, blueprint, rotation[:, :24]).state_dict()
    assert ours.keys() == steps.keys()
    factor = (32 / 24) ** 0.5
    read = (*narrowing.AFTER, "lm_head")
    for name, expected in steps.items():
        if expected.dim() == 1:
            expected = expected / factor
        elif narrowing.kind(name) in read:
            expected = expected * factor
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


def test_chosen_channels_keep_their_bits_and_dtypes(traced: Traced) -> None:
    model, family, blueprint = traced("llama")
    model = model.bfloat16()
    small = dict(narrowed_model(model, family, blueprint, KEPT).named_parameters())
    block = "model.layers.1."
    for name, axis in blueprint.block(
        {n: tuple(v.shape) for n, v in model.model.layers[1].named_parameters()}, 32
    ).axes.items():
        value = model.get_parameter(block + name)
        assert small[block + name].dtype == torch.bfloat16
        if name not in blueprint.norms:
            assert torch.equal(small[block + name], value.index_select(axis, KEPT))


def test_products_are_rounded_once(traced: Traced) -> None:
    model, _, blueprint = traced("llama", tied=False)
    trunk = {
        name: model.get_parameter(name).data.bfloat16()
        for name in (blueprint.embedding, blueprint.norm, blueprint.head)
    }
    rotation = random_rotation(32)[:, :24]
    ours = narrow_trunk(trunk, blueprint, rotation)
    wide = narrow_trunk({n: v.double() for n, v in trunk.items()}, blueprint, rotation)
    for name, value in ours.items():
        assert torch.equal(value, wide[name].bfloat16())
