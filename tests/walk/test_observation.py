"""Statistics of taps against plain hooks on the stock model and a loop over experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.base.errors import NumericalError, UnsupportedModel
from llmprune.stats.types import Stats
from llmprune.walk.forward import Stream, advance, embed
from llmprune.walk.observation import Seen, observe
from llmprune.walk.resident import Resident, in_memory

MakeModel = Callable[..., Any]


def needs_of(blocks: Resident, index: int) -> dict[str, tuple[str, ...]]:
    return {tap.name: ("col_sq",) for tap in blocks.anatomy(index).taps}


def survey(
    blocks: Resident, tokens_NT: Tensor, *, micro_batch: int = 2
) -> list[Mapping[str, Stats]]:
    """Return the statistics of every block, nothing being pruned."""
    flow = embed(blocks, tokens_NT, micro_batch)
    found = []
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            found.append(observe(block, flow, needs_of(blocks, index), dense=False).stats)
            advance(block, flow)
    return found


@torch.no_grad()
def inputs_of(model: Any, names: list[str], tokens_NT: Tensor) -> dict[str, tuple[Any, ...]]:
    """Return what modules are given in one stock forward of all samples."""
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args})
        )
        for name in names
    ]
    model(input_ids=tokens_NT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def col_sq(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[-1], dtype=torch.float64)
    for row in x.reshape(-1, x.shape[-1]):
        total += row.double() ** 2
    return total


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_plain_linears_agree_with_hooks(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    model = make_model(model_type)
    with in_memory(model) as blocks:
        found = survey(blocks, tokens)
        modules = {
            (index, tap.name): f"{blocks.family.blocks}.{index}."
            + blocks.anatomy(index).linears[reader].param.removesuffix(".weight")
            for index in range(len(blocks))
            for tap in blocks.anatomy(index).taps
            if "experts" not in tap.name
            for reader in tap.readers
        }
        inputs = inputs_of(model, sorted(set(modules.values())), tokens)
    assert len(modules) == (4 if model_type == "mixtral" else 8)
    for (index, tap), name in modules.items():
        assert found[index][tap].num_tokens == tokens.numel()
        assert_near(found[index][tap]["col_sq"], col_sq(inputs[name][0]))


def test_experts_agree_with_a_loop_over_routed_tokens(
    make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model("mixtral")
    top_k = model.config.num_experts_per_tok
    with in_memory(model) as blocks:
        found = survey(blocks, tokens)
        names = [f"model.layers.{index}.mlp.experts" for index in range(2)]
        inputs = inputs_of(model, names, tokens)
    for index, name in enumerate(names):
        experts = model.get_submodule(name)
        hidden_TD, routed_TK = (value.detach() for value in inputs[name][:2])
        assert routed_TK.shape == (tokens.numel(), top_k)
        counts = []
        for e in range(4):
            x = hidden_TD[(routed_TK == e).any(-1)]
            gate, up = experts.gate_up_proj[e].detach().chunk(2)
            middle = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            into, out = found[index][f"experts.{e}.in"], found[index][f"experts.{e}.out"]
            assert into.num_tokens == out.num_tokens == len(x) > 0
            assert_near(into["col_sq"], col_sq(x))
            assert_near(out["col_sq"], col_sq(middle))
            counts.append(into.num_tokens)
        assert sum(counts) == tokens.numel() * top_k


def observe_first(
    model: Any, tokens_NT: Tensor, *, dense: bool, micro_batch: int = 2
) -> tuple[Seen, Stream]:
    with in_memory(model) as blocks, blocks.open(0) as block:
        flow = embed(blocks, tokens_NT, micro_batch)
        return observe(block, flow, needs_of(blocks, 0), dense=dense), flow


def test_leaving_early_changes_no_statistic(
    make_model: MakeModel, tokens: Tensor, model_type: str
) -> None:
    model = make_model(model_type)
    before = embed_alone(model, tokens)
    short, flow = observe_first(model, tokens, dense=False)
    assert all(torch.equal(flow.hidden.get(i, torch.device("cpu")), h)
               for i, h in enumerate(before))  # fmt: skip
    full, advanced = observe_first(model, tokens, dense=True)
    assert short.stats.keys() == full.stats.keys()
    for tap, each in full.stats.items():
        assert short.stats[tap].num_tokens == each.num_tokens
        assert torch.equal(short.stats[tap]["col_sq"], each["col_sq"])
    assert torch.equal(short.dense_output, full.dense_output)
    assert torch.equal(advanced.hidden.get(0, torch.device("cpu")), full.dense_output)
    with in_memory(model) as blocks, blocks.open(0) as block:
        expected = embed(blocks, tokens, 2)
        advance(block, expected)
    for index in range(3):
        one, two = (f.hidden.get(index, torch.device("cpu")) for f in (advanced, expected))
        assert torch.equal(one, two)


def embed_alone(model: Any, tokens_NT: Tensor) -> list[Tensor]:
    with in_memory(model) as blocks:
        flow = embed(blocks, tokens_NT, 2)
    return [flow.hidden.get(index, torch.device("cpu")).clone() for index in range(len(flow))]


@pytest.mark.parametrize("sample", range(6))
def test_every_sample_counts(make_model: MakeModel, tokens: Tensor, sample: int) -> None:
    model = make_model("llama")
    changed = tokens.clone()
    changed[sample, 5] = (changed[sample, 5] + 1) % 64
    one, two = (observe_first(model, t, dense=False, micro_batch=4)[0] for t in (tokens, changed))
    for tap in one.stats:
        assert not torch.equal(one.stats[tap]["col_sq"], two.stats[tap]["col_sq"]), tap


def test_micro_batches_do_not_matter(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("gemma3_text")
    one, other = (
        observe_first(model, tokens, dense=False, micro_batch=size)[0].stats for size in (1, 6)
    )
    for tap, each in one.items():
        assert each.num_tokens == other[tap].num_tokens
        assert_near(each["col_sq"], other[tap]["col_sq"])


@pytest.mark.parametrize(
    ("param", "tap"),
    [("input_layernorm", "attn_in"), ("self_attn.v_proj", "attn_out"),
     ("post_attention_layernorm", "ffn_in"), ("mlp.up_proj", "ffn_out")],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_tap_and_block(
    make_model: MakeModel, tokens: Tensor, param: str, tap: str, value: float
) -> None:
    model = make_model("llama")
    weight = model.model.layers[1].get_submodule(param).weight
    with torch.no_grad():
        weight[3] = value
    words = rf"activation '{tap}' of block 1 .*col_sq"
    with pytest.raises(NumericalError, match=words), in_memory(model) as blocks:
        survey(blocks, tokens)


def test_an_output_that_is_not_finite_names_its_block(
    make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="output of block 0"), in_memory(model) as blocks:
        survey(blocks, tokens)


def test_a_matrix_that_is_used_piece_by_piece_counts_every_piece(
    make_model: MakeModel, tokens: Tensor
) -> None:
    """As FFNs do that work on a few tokens at a time to save memory."""
    whole, pieces = make_model("llama"), make_model("llama")
    for block in pieces.model.layers:
        own = block.mlp.forward
        block.mlp.forward = lambda x, own=own: torch.cat([own(part) for part in x.split(5, 1)], 1)
    found = []
    for model in (whole, pieces):
        with in_memory(model) as blocks:
            found.append(survey(blocks, tokens))
    for one, other in zip(*found, strict=True):
        for tap in one:
            assert one[tap].num_tokens == other[tap].num_tokens == tokens.numel()
            assert_near(other[tap]["col_sq"], one[tap]["col_sq"])


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
def test_experts_without_tokens_are_no_fault_where_others_have_some(
    model_type: str, make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model(model_type)
    with in_memory(model) as blocks, blocks.open(0) as block:
        flow = embed(blocks, tokens[:1, :1], 1)
        taps = [tap for tap in needs_of(blocks, 0) if re.search(r"\d", tap)]
        alone = {tap: observe(block, flow, {tap: ("col_sq",)}, dense=False) for tap in taps}
    used = {tap for tap, seen in alone.items() if seen.stats[tap].num_tokens}
    assert len(used) == 2 * model.config.num_experts_per_tok < len(taps)


def test_a_tap_that_is_never_read_is_told(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.forward = lambda x: x
    with in_memory(model) as blocks, pytest.raises(UnsupportedModel, match=r"'ffn_in'.*never read"):
        survey(blocks, tokens)
