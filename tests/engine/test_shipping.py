"""What a result is stored as is decided, or refused with a way out, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from llmprune import api
from llmprune.arch.couplings import heads_of
from llmprune.arch.miniature import miniature_model
from llmprune.arch.table import row_of
from llmprune.base.errors import RecipeError, WontLoad
from llmprune.delivery import gate
from llmprune.engine import opening, rehearsal
from llmprune.engine.opening import Opened, open_plan, with_shipment
from tests.reference.shrinking import random_model, strengthen

Make = Callable[..., Opened]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Plan for a family's random miniature, or a model of other sizes."""
    monkeypatch.setattr(opening, "check_walk", lambda *args, **options: None)  # tested elsewhere

    def make(model: Any = "llama", counts: Any = None, **wishes: Any) -> Opened:
        folder = tmp_path / "model"
        if not folder.exists():
            (random_model(model) if isinstance(model, str) else model).save_pretrained(folder)
        wishes = {
            "method": "magnitude-struct", "sparsity": 0.1, "out": tmp_path / "out",
            "device": "cpu", **wishes,
        }  # fmt: skip
        found = open_plan(api.make_recipe(str(folder), **wishes))
        if counts is None:
            return found
        chosen = {site.name: counts(site) for site in found.plan.sites}
        return replace(found, plan=with_shipment(found, replace(found.plan, counts=chosen)))

    return make


def wide(model_type: str = "llama", **sizes: Any) -> Any:
    """Return a model of eight heads in eight groups; its hidden size is 64."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    widths = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    config = AutoConfig.for_model(model_type, **heads, **widths, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    return strengthen(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


# Numbers of heads.


def test_heads_that_do_not_divide_the_hidden_size_make_a_mistral(opened: Make) -> None:
    """A Llama of 64 hidden has no 7 heads, as one of 4096 has no 28: a Mistral is the same."""
    found = opened(wide(), lambda site: 1, pattern="heads").plan
    assert found.shipment is not None
    config = found.shipment.config
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (7, 7)
    assert config["head_dim"] == 8 and config["sliding_window"] is None
    assert "model_type = mistral" in repr(found)


def test_heads_that_divide_it_stay_a_llama(opened: Make) -> None:
    found = opened(wide(), lambda site: 4, pattern="heads").plan
    assert found.shipment is not None and found.shipment.config["model_type"] == "llama"


def test_a_llama_with_biases_has_no_twin(opened: Make) -> None:
    says = "llama model of these sizes does not exist: .*multiple of the number of attention heads"
    with pytest.raises(WontLoad, match=says):
        opened(wide(attention_bias=True), lambda site: 1, pattern="heads")


def test_query_heads_go_from_every_group_alike(opened: Make) -> None:
    """Of four heads in two groups two or four stay; five on two would not be divisible."""
    found = opened(pattern="query-heads", sparsity=0.1).plan
    assert found.counts is not None and set(found.counts.values()) == {2}
    assert found.shipment is not None
    sizes = {key: found.shipment.config[key] for key in ("num_attention_heads", "head_dim")}
    assert sizes == {"num_attention_heads": 2, "head_dim": 8}
    assert found.shipment.config["num_key_value_heads"] == 2


# What cannot be asked for.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "all heads": ({"pattern": "heads", "sparsity": 0.3}, r"at most 0\.166"),
    "all channels": ({"pattern": "ffn-channels", "sparsity": 0.9}, r"at most 0\.6"),
    "all of both": ({"pattern": "ffn-channels+heads", "sparsity": 0.99}, r"at most 0\.\d+"),
    "multiples of more than there is": (
        {"pattern": "ffn-channels", "settings": ["prune.multiple=128"]},
        "128 is more than the 64 ffn-channels .*prune.multiple=4",
    ),
    "multiples that leave no choice": (
        {"pattern": "ffn-channels", "settings": ["prune.multiple=64"]},
        "64 leaves no width below the 64 .*At most 32",
    ),
    "an unknown tier": (
        {"pattern": "heads", "settings": ["prune.tier=E4"]}, r"prune\.tier.*E0.*E1.*E2.*E3",
    ),
    "a unit that weights have": (
        {"method": "sparsegpt", "pattern": "heads"}, "no rule for heads|judges|weights",
    ),
    "a depth by equal shares": (
        {"method": "finercut", "pattern": "blocks", "settings": ["prune.allocation=uniform"]},
        "equal shares mean nothing for blocks",
    ),
    "kinds that lie across each other": (
        {"pattern": "heads+query-heads"}, "heads and query-heads at once",
    ),
    "experts without a mixture": (
        {"method": "reap", "pattern": "experts"}, "llama model has no experts .*It has: ffn-ch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_with_what_can(opened: Make, name: str) -> None:
    wishes, says = REFUSED[name]
    with pytest.raises(RecipeError, match=says):
        opened(**wishes)


def test_a_plan_that_leaves_no_block_is_refused(opened: Make) -> None:
    with pytest.raises(WontLoad, match=r"leaves no block at all\. Ask for a lower --sparsity"):
        opened(counts=lambda site: 1, method="shortgpt", pattern="blocks")


def test_unequal_widths_that_are_to_be_stock_are_refused(opened: Make) -> None:
    settings = ["prune.tier=E0", "prune.multiple=1"]
    with pytest.raises(WontLoad, match=r"prune\.tier: E0 cannot hold .*--set prune\.tier=E"):
        opened(counts=lambda site: site.block, pattern="ffn-channels", settings=settings)


def test_unequal_widths_are_filled_up_where_that_is_asked(opened: Make) -> None:
    settings = ["prune.tier=E1"]
    found = opened(counts=lambda s: 8 * s.block, pattern="ffn-channels", settings=settings).plan
    assert found.shipment is not None and found.shipment.tier == "E1"
    assert found.shipment.widths == {"ffn-channels": 64}
    assert found.shipment.config["intermediate_size"] == 64


def test_a_folder_with_something_else_in_it_stays_as_it_is(opened: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    opened(pattern="ffn-channels")
    with pytest.raises(RecipeError, match=r"out: .*--out"):
        api.prune(
            str(tmp_path / "model"), out=out, method="magnitude-struct", pattern="ffn-channels",
            sparsity=0.2, quiet=True,
        )  # fmt: skip
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


# The miniature that is tried before anything is pruned.


def test_blocks_that_scale_by_their_number_cannot_move(opened: Make) -> None:
    """GPT-2 can divide scores by the number of the block."""
    config = AutoConfig.for_model("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    model = strengthen(miniature_model(config))
    with pytest.raises(WontLoad, match=r"become block 0 with attn\.scaling .*form=masked"):
        opened(model, lambda s: int(s.block == 0), method="shortgpt", pattern="blocks")


def test_blocks_that_compute_with_their_number_cannot_move(
    opened: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a forward does with the number shows in no shape and in no attribute."""
    forward = LlamaAttention.forward

    def numbered(self: Any, *args: Any, **options: Any) -> Any:
        output, weights = forward(self, *args, **options)
        return output / (1 + self.layer_idx), weights

    monkeypatch.setattr(LlamaAttention, "forward", numbered)
    with pytest.raises(WontLoad, match=r"llama model with fewer blocks .*block numbers.*=masked"):
        opened(counts=lambda s: int(s.block == 0), method="shortgpt", pattern="blocks")


def test_sizes_that_scale_something_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = miniature_model(AutoConfig.for_model("llama")).config
    family = replace(row_of("llama"), heads=heads_of(config))
    rehearsal.check_meaning(config, family, ["heads", "ffn-channels", "block"], "llama")
    forward = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: forward(self, x) * self.config.intermediate_size**-0.5
    )
    with pytest.raises(WontLoad, match="llama model with fewer ffn-channels computes something"):
        rehearsal.check_meaning(config, family, ["ffn-channels"], "llama")
    rehearsal.check_meaning(config, family, ["heads"], "llama")


# Biases that a config has no place for.


def test_a_bias_that_would_be_dropped_is_refused_by_the_plan(opened: Make) -> None:
    says = r"bias-shift puts a bias into mlp\.down_proj, for which a qwen2 model has no place"
    with pytest.raises(WontLoad, match=says):
        opened(
            "qwen2", lambda site: 8, method="flap", pattern="ffn-channels",
            settings=["prune.allocation=uniform"],
        )  # fmt: skip


def test_a_llama_gets_the_entries_for_its_biases(opened: Make) -> None:
    settings = ["prune.allocation=uniform"]
    kinds = {"ffn-channels": "mlp_bias", "heads": "attention_bias"}
    for pattern, entry in kinds.items():
        found = opened(
            counts=lambda s: s.num_units // 2, method="flap", pattern=pattern, settings=settings
        ).plan
        assert found.shipment is not None and found.shipment.config[entry] is True
        other = next(name for name in kinds.values() if name != entry)
        assert not found.shipment.config.get(other)


def test_the_gate_finds_a_bias_that_loading_drops(
    opened: Make, tmp_path: Path, quick_gate: None
) -> None:
    opened()
    folder = tmp_path / "model"
    passed = {"device": torch.device("cpu"), "dtype": torch.float32}
    gate.pass_gate(folder, **passed)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.bias"] = torch.ones(32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["mlp_bias"] is False
    with pytest.raises(WontLoad, match=r"unexpected keys: model\.layers\.0\.mlp\.down_proj\.bias"):
        gate.pass_gate(folder, **passed)
