"""What the stream holds is what the stock model's norms are given, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.hidden.residual import ChannelActivity, ResidualGram, survey_residual
from llmprune.walk.forward import embed
from llmprune.walk.resident import in_memory


def test_the_activity_of_two_sequences() -> None:
    """Means over tokens of (3, 0) and (4, 1): the root of 9 + 16, and of 0 + 1."""
    seen = ChannelActivity()
    seen.update(torch.tensor([[[2.0, 0.0], [-4.0, 0.0]]]))
    seen.update(torch.tensor([[[4.0, -1.0], [4.0, 1.0]]]))
    assert seen.result().tolist() == [5.0, 1.0]


def test_parts_add_up(tokens: Tensor) -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    for make in (ResidualGram, ChannelActivity):
        whole, first, second = make(), make(), make()
        whole.update(x)
        first.update(x[:1])
        second.update(x[1:])
        first.merge(make())
        second.merge(first)
        torch.testing.assert_close(second.result(), whole.result())


def test_tokens_weigh_alike_however_large(tokens: Tensor) -> None:
    x = torch.tensor([[3.0, 4.0], [300.0, -400.0], [0.0, 0.0]])
    seen = ResidualGram()
    seen.update(x)
    unit = torch.tensor([[3.0, 4.0], [3.0, -4.0]]).double() / 12.5**0.5
    torch.testing.assert_close(seen.result(), unit.T @ unit)
    plain = ResidualGram(per_token=False)
    plain.update(x)
    torch.testing.assert_close(plain.result(), x.double().T @ x.double())


@pytest.mark.parametrize(
    ("model_type", "norms"),
    [
        ("llama", ("input_layernorm", "post_attention_layernorm")),
        ("mixtral", ("input_layernorm", "post_attention_layernorm")),
        ("mamba", ("norm",)),
    ],
)
@pytest.mark.parametrize("per_token", [True, False])
def test_a_survey_sees_every_norm_that_stands_on_the_stream(
    traced: Callable[..., Any], tokens: Tensor, model_type: str, norms: tuple[str, ...],
    per_token: bool,
) -> None:  # fmt: skip
    model, family, blueprint = traced(model_type)
    points = [b.get_submodule(n) for b in model.get_submodule(family.blocks) for n in norms]
    points.append(model.get_submodule(blueprint.norm.removesuffix(".weight")))
    rows: list[Tensor] = []
    outputs: list[list[Tensor]] = [[] for _ in points]

    def keep(place: int, given: Tensor, out: Tensor) -> None:
        rows.append(given.double().flatten(0, 1))
        outputs[place].append(out.double())

    hooks = [
        point.register_forward_hook(lambda m, args, out, i=i: keep(i, args[0], out))
        for i, point in enumerate(points)
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    all_rows = torch.cat(rows)
    if per_token:
        all_rows = all_rows / all_rows.square().mean(dim=1, keepdim=True).sqrt()
    scores = [torch.cat(out).abs().mean(dim=1).square().sum(dim=0).sqrt() for out in outputs]
    with in_memory(model) as blocks:
        found = survey_residual(blocks, embed(blocks, tokens, 2), blueprint, per_token=per_token)
    assert found.num_tokens == len(points) * tokens.numel()
    torch.testing.assert_close(found.gram_DD, all_rows.T @ all_rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.activity_D, torch.stack(scores).sum(dim=0), rtol=1e-4, atol=0)
