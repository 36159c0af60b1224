"""The table of units: which rows and columns move together, and why some families have none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.couplings import couplings_of, heads_of
from llmprune.arch.miniature import miniature_model
from llmprune.arch.table import row_of
from llmprune.arch.types import Coupling
from llmprune.checkpoint.shrink import axes_of, take
from tests.reference.shrinking import logits, random_model

G, PER_GROUP, D = 2, 2, 8  # of a miniature: key/value groups, query heads of each, values of a head


def anatomy(model: Any, index: int = 0) -> Anatomy:
    row = row_of(model.config.model_type)
    assert row is not None
    blocks = model.get_submodule(row.blocks)
    shapes = {name: tuple(value.shape) for name, value in blocks[index].named_parameters()}
    return anatomy_of(replace(row, heads=heads_of(model.config)), shapes)


def spans_of(coupling: Coupling | None) -> list[tuple[str, str, int, int]]:
    assert coupling is not None
    return [(span.linear, span.axis, span.width, span.offset) for span in coupling.spans]


def cut(model: Any, coupling: Coupling, kept: list[int], **sizes: int) -> Any:
    """Return the model with only some units of every block, and another config."""
    found = anatomy(model)
    home = row_of(model.config.model_type).blocks
    state = dict(model.state_dict())
    for index, block in enumerate(model.get_submodule(home)):
        shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
        axes = axes_of([(coupling, torch.tensor(kept))], found.linears, shapes)
        for (param, axis), index_N in axes.items():
            name = f"{home}.{index}.{param}"
            state[name] = take(state[name], axis, index_N)
    config = type(model.config).from_dict(model.config.to_dict() | sizes)
    config._attn_implementation = model.config._attn_implementation
    small = type(model)(config).double()
    small.load_state_dict(state)
    return small.eval()


@pytest.mark.parametrize("gone", range(G))
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_a_group_goes_with_the_columns_of_its_own_query_heads(
    tokens: Tensor, name: str, gone: int
) -> None:
    """Query head h reads key/value head h // g: group-major, not (g, G, d)."""
    model = random_model(name).double()
    coupling = anatomy(model).coupling("heads")
    assert coupling is not None and coupling.num_units == G
    kept = [group for group in range(G) if group != gone]
    small = cut(model, coupling, kept, num_attention_heads=2, num_key_value_heads=1, head_dim=D)
    with torch.no_grad():
        for block in model.model.layers:
            for head in range(G * PER_GROUP):
                if head // PER_GROUP == gone:
                    block.self_attn.o_proj.weight[:, head * D : (head + 1) * D] = 0
    assert (logits(small, tokens) - logits(model, tokens)).abs().max() < 1e-9


@pytest.mark.parametrize("kept", [[0, 2], [0, 3], [1, 2], [1, 3]])
def test_query_heads_leave_as_many_in_every_group(tokens: Tensor, kept: list[int]) -> None:
    model = random_model("llama").double()
    coupling = anatomy(model).coupling("query-heads")
    assert coupling is not None
    assert (coupling.num_units, coupling.num_groups) == (G * PER_GROUP, G)
    small = cut(model, coupling, kept, num_attention_heads=2, head_dim=D)
    assert small.model.layers[0].self_attn.k_proj.weight.shape == (G * D, 32)
    with torch.no_grad():
        for block in model.model.layers:
            for head in {0, 1, 2, 3} - set(kept):
                block.self_attn.o_proj.weight[:, head * D : (head + 1) * D] = 0
    assert (logits(small, tokens) - logits(model, tokens)).abs().max() < 1e-9


def test_spans_of_linears_of_their_own() -> None:
    found = anatomy(random_model("llama"))
    channels = found.coupling("ffn-channels")
    assert spans_of(channels) == [
        ("mlp.gate_proj", "out", 1, 0), ("mlp.up_proj", "out", 1, 0), ("mlp.down_proj", "in", 1, 0),
    ]  # fmt: skip
    assert channels.config_keys == (("intermediate_size", 1),)
    heads = found.coupling("heads")
    assert spans_of(heads) == [
        ("self_attn.q_proj", "out", PER_GROUP * D, 0),
        ("self_attn.k_proj", "out", D, 0),
        ("self_attn.v_proj", "out", D, 0),
        ("self_attn.o_proj", "in", PER_GROUP * D, 0),
    ]
    assert dict(heads.config_keys) == {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert heads.pinned == (("head_dim", D),)


def test_spans_of_stacked_and_of_grouped_rows() -> None:
    phi = anatomy(random_model("phi3"))
    assert spans_of(phi.coupling("heads"))[:3] == [
        ("self_attn.qkv_proj", "out", PER_GROUP * D, 0),
        ("self_attn.qkv_proj", "out", D, G * PER_GROUP * D),
        ("self_attn.qkv_proj", "out", D, G * PER_GROUP * D + G * D),
    ]
    assert spans_of(phi.coupling("ffn-channels"))[:2] == [
        ("mlp.gate_up_proj", "out", 1, 0), ("mlp.gate_up_proj", "out", 1, 64),
    ]  # fmt: skip
    neox = anatomy(random_model("gpt_neox"))
    assert spans_of(neox.coupling("heads"))[0] == ("attention.query_key_value", "out", 3 * D, 0)
    assert neox.coupling("query-heads") is None


def test_halves_and_blocks_are_single_units_of_whole_linears() -> None:
    found = anatomy(random_model("gpt2"))
    halves = {kind: found.coupling(kind) for kind in ("attention", "ffn", "block")}
    assert {row.num_units for row in halves.values()} == {1}
    assert {row.reader for row in halves.values()} == {None}
    names = {kind: [span.linear for span in row.spans] for kind, row in halves.items()}
    assert names["attention"] == ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj"]
    assert names["ffn"] == ["mlp.c_fc", "mlp.c_proj"]
    assert sorted(names["block"]) == sorted(names["attention"] + names["ffn"])


def test_a_block_without_attention_has_no_halves() -> None:
    found = anatomy(miniature_model(AutoConfig.for_model("mamba")))
    assert [row.name for row in found.couplings] == ["block"]


def test_sinks_go_with_their_heads() -> None:
    model = random_model("gpt_oss")
    found, coupling = anatomy(model), anatomy(model).coupling("heads")
    assert coupling is not None and dict(coupling.vectors) == {"self_attn.sinks": PER_GROUP}
    shapes = {name: tuple(v.shape) for name, v in model.model.layers[0].named_parameters()}
    axes = axes_of([(coupling, torch.tensor([1]))], found.linears, shapes)
    assert axes["self_attn.sinks", 0].tolist() == [2, 3]
    assert axes["self_attn.q_proj.bias", 0].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_heads": 3, "num_groups": 3}, "is not 3 heads of 8 values"),
        ({"head_dim": 4}, "is not 4 heads of 4 values"),
        (None, "counts no heads"),
    ],
)
def test_heads_that_the_shapes_do_not_bear_out_are_none(
    changes: dict[str, int] | None, says: str
) -> None:
    model = random_model("llama")
    row = row_of("llama")
    assert row is not None
    found, own = anatomy(model), heads_of(model.config)
    shapes = {name: tuple(v.shape) for name, v in model.model.layers[0].named_parameters()}
    heads = None if changes is None or own is None else replace(own, **changes)
    rows, why = couplings_of(replace(row, heads=heads), found.linears, shapes)
    assert {"heads", "query-heads"}.isdisjoint(each.name for each in rows)
    assert says in why["heads"] and says in why["query-heads"]


HEADS_OF: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "llama": ({"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096},
              (32, 8, 128)),
    "qwen3": ({"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024},
              (16, 8, 128)),
    "gpt2": ({}, (12, 12, 64)),
    "mpt": ({"d_model": 64, "n_heads": 4}, (4, 4, 16)),
    "falcon": ({"hidden_size": 64, "num_attention_heads": 4}, (4, 1, 16)),
}  # fmt: skip


@pytest.mark.parametrize("model_type", HEADS_OF)
def test_the_heads_that_a_config_speaks_of(model_type: str) -> None:
    sizes, expected = HEADS_OF[model_type]
    heads = heads_of(AutoConfig.for_model(model_type, **sizes))
    assert heads is not None
    assert (heads.num_heads, heads.num_groups, heads.head_dim) == expected


def test_groups_that_do_not_divide_the_heads_are_no_heads() -> None:
    config = AutoConfig.for_model("mistral", num_attention_heads=8, num_key_value_heads=3)
    assert heads_of(config) is None


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "starcoder2"])
def test_the_order_of_channels_and_heads_is_free(tokens: Tensor, name: str) -> None:
    model = random_model(name).double()
    before = logits(model, tokens)
    home = row_of(model.config.model_type).blocks
    for index, block in enumerate(model.get_submodule(home)):
        found = anatomy(model, index)
        shapes = {key: tuple(value.shape) for key, value in block.named_parameters()}
        orders = [
            (row, torch.arange(row.num_units).flip(0))
            for row in (found.coupling("ffn-channels"), found.coupling("heads"))
            if row is not None
        ]
        assert len(orders) == 2
        for (param, axis), index_N in axes_of(orders, found.linears, shapes).items():
            value = block.get_parameter(param)
            moved = take(value.data, axis, index_N)
            assert not torch.equal(moved, value.data)
            value.data = moved
    assert (logits(model, tokens) - before).abs().max() < 1e-9


def test_configs_of_the_table_name_entries_that_they_have() -> None:
    """What a coupling counts must be an entry of the family's config, or its alias."""
    for name in ("llama", "phi3", "opt", "gpt2", "gptj", "gpt_neox", "falcon newer", "starcoder2"):
        model = random_model(name)
        known = json.loads(model.config.to_json_string(use_diff=False))
        known |= dict.fromkeys(getattr(model.config, "attribute_map", {}))
        for row in anatomy(model).couplings:
            assert {key for key, _ in row.config_keys} <= known.keys(), (name, row.name)
