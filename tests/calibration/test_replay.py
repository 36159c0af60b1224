"""Replaying blocks with their own arguments equals a forward, or the family is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmprune.arch.miniature import SEQ_LEN
from llmprune.arch.table import row_of
from llmprune.base.errors import UnsupportedModel
from llmprune.calibration.replay import (
    Arguments,
    call,
    capture,
    check_replay,
    head,
    patched,
    same,
    split_hidden,
)

MakeModel = Callable[..., Any]


def blocks_of(model: Any) -> Any:
    return model.get_submodule(row_of(model.config.model_type).blocks)


@torch.no_grad()
def replay(model: Any, ids_BT: Tensor, choose: Callable[[list[Arguments]], list[Arguments]]) -> Any:
    blocks = blocks_of(model)
    hidden, arguments = capture(model, blocks, ids_BT)
    for block, own in zip(blocks, choose(arguments), strict=True):
        hidden = call(block, hidden, own)
    return head(model, blocks, hidden)


def distance(model: Any, ids_BT: Tensor, logits: Tensor) -> float:
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_replay_equals_a_forward(
    make_model: MakeModel, tokens: Tensor, model_type: str, attention: str
) -> None:
    model = make_model(model_type)
    model.set_attn_implementation(attention)
    ids = tokens[:2]
    assert distance(model, ids, replay(model, ids, lambda own: own)) <= 1e-6


def test_gemma3_blocks_need_their_own_arguments(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("gemma3_text")
    assert tokens.shape[1] > model.config.sliding_window
    with torch.no_grad():
        _, arguments = capture(model, blocks_of(model), tokens)
    assert not same(arguments[0].kwargs["position_embeddings"],
                    arguments[1].kwargs["position_embeddings"])  # fmt: skip
    assert not same(arguments[0], arguments[1])
    shared = replay(model, tokens, lambda own: own[:1] * len(own))
    assert distance(model, tokens, shared) > 1e-3


def test_the_window_alone_makes_block_0_s_mask_wrong(make_model: MakeModel, tokens: Tensor) -> None:
    """Within the window both masks mean the same; a check on short sequences would pass."""
    model = make_model("gemma3_text")

    def masks_of_block_0(own: list[Arguments]) -> list[Arguments]:
        mask = {"attention_mask": own[0].kwargs["attention_mask"]}
        return [Arguments(args=each.args, kwargs=each.kwargs | mask) for each in own]

    short = tokens[:, : model.config.sliding_window // 2]
    assert distance(model, short, replay(model, short, masks_of_block_0)) <= 1e-6
    assert distance(model, tokens, replay(model, tokens, masks_of_block_0)) > 1e-3


def test_capture_gives_the_hidden_states_of_block_0(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("llama")
    with torch.no_grad():
        hidden, arguments = capture(model, blocks_of(model), tokens)
        assert torch.equal(hidden, model.model.embed_tokens(tokens))
    assert len(arguments) == 2
    assert all("hidden_states" not in own.kwargs for own in arguments)


def test_every_family_passes_the_check(make_model: MakeModel, model_type: str) -> None:
    model = make_model(model_type)
    check_replay(model, blocks_of(model), SEQ_LEN)


class Shifted(nn.Module):
    """A block that adds what the model tells it about another block's output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, shift: Tensor | None = None, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner(hidden_states, **kwargs)
        return output if shift is None else output + shift


def depend_on_block_0(model: Any, *, on_output: bool) -> None:
    """Make the model pass the mean of block 0's output (or of the embeddings) on to block 1."""
    inner = model.model
    inner.layers = nn.ModuleList(Shifted(layer) for layer in inner.layers)

    def forward(
        input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        hidden = inner.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        tables = inner.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        first = inner.layers[0](hidden, position_embeddings=tables)
        shift = (first if on_output else hidden).mean()
        hidden = inner.layers[1](first, shift=shift, position_embeddings=tables)
        return BaseModelOutputWithPast(last_hidden_state=inner.norm(hidden))

    inner.forward = forward


def test_a_block_that_needs_another_block_s_output_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    depend_on_block_0(model, on_output=True)
    with pytest.raises(UnsupportedModel, match="block by block: shift differs"):
        check_replay(model, blocks_of(model), SEQ_LEN)


def test_an_argument_that_no_block_computes_is_no_reason_to_refuse(make_model: MakeModel) -> None:
    model = make_model("llama")
    depend_on_block_0(model, on_output=False)
    check_replay(model, blocks_of(model), SEQ_LEN)


def test_blocks_that_are_not_called_are_told(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("llama")
    model.model.config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModel, match="called 1 of its 2 blocks"):
        capture(model, blocks_of(model), tokens)


def test_patching_is_undone_also_after_an_error(make_model: MakeModel) -> None:
    model = make_model("llama")
    first, second = blocks_of(model)

    def own(*args: Any, **kwargs: Any) -> str:
        return "own"

    first.forward = own  # as accelerate does
    with pytest.raises(ZeroDivisionError), patched([first, second], lambda i, *a, **k: (i, a, k)):
        assert first(1, two=2) == (0, (1,), {"two": 2})
        assert second(3) == (1, (3,), {})
        raise ZeroDivisionError
    assert first.forward is own
    assert "forward" not in second.__dict__


def test_hidden_states_are_found_by_place_or_name() -> None:
    x = torch.zeros(1)
    assert split_hidden((x, 2), {"a": 3}) == (x, (2,), {"a": 3})
    kwargs = {"hidden_states": x, "a": 3}
    assert split_hidden((), kwargs) == (x, (), {"a": 3})
    assert "hidden_states" in kwargs


def test_tuple_outputs_are_opened() -> None:
    class Pair(nn.Module):
        def forward(self, hidden: Tensor, add: int) -> tuple[Tensor, None]:
            return hidden + add, None

    result = call(Pair(), torch.zeros(2), Arguments(args=(), kwargs={"add": 1}))
    assert torch.equal(result, torch.ones(2))


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), None, False),
        (None, None, True),
        (None, False, False),
        ((torch.ones(1), [2]), [torch.ones(1), (2,)], True),
        ((1, 2), (1, 2, 3), False),
        ({"a": torch.ones(1)}, {"a": torch.ones(1)}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ({"a": torch.ones(1)}, {"a": torch.zeros(1)}, False),
    ],
)
def test_same_compares_by_value(left: Any, right: Any, equal: bool) -> None:
    assert same(left, right) == equal
    assert same(right, left) == equal
    wrap = [Arguments(args=(side,), kwargs={"k": side}) for side in (left, right)]
    assert same(*wrap) == equal
