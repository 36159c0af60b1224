"""What is left of a family's units, in the config that the plan makes, computes what it did."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import api
from llmprune.base.errors import RecipeError, WontLoad
from llmprune.checkpoint.shrink import take
from llmprune.checkpoint.skeleton import read_config, use_eager_experts
from llmprune.engine import opening
from llmprune.engine.opening import Opened, open_plan, with_shipment
from llmprune.engine.shipment import axes_of_block
from tests.reference.shrinking import (
    FAMILIES,
    cached_tokens,
    load,
    logits,
    random_model,
    renamed,
    silence,
    skip,
)

Plans = Callable[..., Opened]
NO_HEADS = {
    "olmo2": (RecipeError, r"self_attn\.q_norm\.weight spans all heads"),
    "stablelm": (WontLoad, r"self_attn\.head_dim 16 instead of 8"),
    "gptj": (WontLoad, r"attn\.head_dim 16 instead of 8"),
    "gpt2": (WontLoad, r"attn\.head_dim 16 instead of 8"),
    "opt": (WontLoad, r"self_attn\.head_dim 16 instead of 8"),
    "gpt_neox": (WontLoad, r"head_(dim|size) 16 instead of 8"),
    "falcon newer": (WontLoad, r"self_attention\.\w+ .* instead of"),
    "falcon with biases": (WontLoad, r"self_attention\.\w+ .* instead of"),
    "bloom": (WontLoad, r"self_attention\.head_dim 16 instead of 8"),
    "mpt": (WontLoad, r"attn\.head_dim 16 instead of 8"),
}
NO_CHANNELS = {
    "bloom": (WontLoad, r"would be \[\d+, 32\], where the config makes it \[128, 32\]"),
    "mpt": (WontLoad, r"would be \[\d+, 32\], where the config makes it \[128, 32\]"),
    "mixtral": (RecipeError, "has no ffn-channels"),
}
WHOLE_HEADS = {*NO_HEADS, "falcon multi-query"}  # the latter has one group for all heads
GROUPED = [
    name for name, (_, sizes) in FAMILIES.items()
    if sizes.get("num_key_value_heads") in (4, 8) and name not in ("olmo2", "stablelm", "cohere2")
]  # fmt: skip
CASES = [
    *((name, ("ffn-channels",)) for name in FAMILIES if name in WHOLE_HEADS - NO_CHANNELS.keys()),
    *(
        (name, ("heads",) if name in NO_CHANNELS else ("ffn-channels", "heads"))
        for name in FAMILIES
        if name not in WHOLE_HEADS
    ),
    *((name, ("query-heads",)) for name in GROUPED),
]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's random model, written once."""
    home = tmp_path_factory.mktemp("families")

    def folder_of(name: str) -> Path:
        if not (home / name).exists():
            random_model(name).save_pretrained(home / name)
        return home / name

    return folder_of


@pytest.fixture
def plan(family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Plans:
    """Plan for half of each kind of unit of every block, as counts that follow from no budget."""
    monkeypatch.setattr(opening, "check_walk", lambda *args, **options: None)  # tested elsewhere

    def make(name: str, kinds: tuple[str, ...], counts: Mapping[int, int] | None = None) -> Opened:
        method = "finercut" if "blocks" in kinds else "compact"
        opened = open_plan(
            api.make_recipe(
                str(family(name)), method=method, pattern="+".join(kinds), out="unwritten",
                sparsity=0.01, device="cpu",
            )
        )  # fmt: skip
        chosen = {
            site.name: (counts or {}).get(site.block, 0) if counts else site.num_units // 2
            for site in opened.plan.sites
        }
        return replace(opened, plan=with_shipment(opened, replace(opened.plan, counts=chosen)))

    return make


def tolerance(name: str) -> float:
    """Return how far apart logits in float64 may be; some attention is computed in float32."""
    return 1e-6 if name == "gptj" else 1e-9


def some_units(num_units: int, num_groups: int, block: int) -> Tensor:
    """Return half of the units of every group, drawn; other units in every block."""
    generator = torch.Generator().manual_seed(block)
    each = num_units // num_groups
    drawn = [torch.randperm(each, generator=generator)[: each // 2] for _ in range(num_groups)]
    return torch.cat([index * each + units.sort().values for index, units in enumerate(drawn)])


def result_of(opened: Opened, state: Mapping[str, Tensor], tmp_path: Path) -> Any:
    """Return the model that the plan's config makes, with weights, and nothing missing."""
    shipment = opened.plan.shipment
    assert shipment is not None and shipment.tier == "E0"
    (tmp_path / "config.json").write_text(json.dumps(dict(shipment.config)))
    model = AutoModelForCausalLM.from_config(read_config(tmp_path), dtype=torch.float64)
    use_eager_experts(model)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_fewer_units_compute_what_silent_ones_do(
    plan: Plans, tokens: Tensor, tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    opened = plan(name, kinds)
    dense = load(opened.source.folder)
    before, home = logits(dense, tokens[:2]), opened.blocks.family.blocks
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    for index, block in enumerate(dense.get_submodule(home)):
        groups, anatomy = opened.plan.groups[index], opened.blocks.anatomy(index)
        assert {site.kind for group in groups for site in group.sites} == set(kinds)
        kept = {}
        for site in (site for group in groups for site in group.sites):
            stays = kept[site.name] = some_units(site.num_units, site.num_groups, index)
            gone = sorted(set(range(site.num_units)) - set(stays.tolist()))
            silence(block, anatomy, site.kind, gone)
        shapes = {key: tuple(value.shape) for key, value in block.named_parameters()}
        for (param, axis), index_N in axes_of_block(groups, kept, anatomy, shapes, {}).items():
            key = f"{home}.{index}.{param}"
            state[key] = take(state[key], axis, index_N)
    expected = logits(dense, tokens[:2])
    apart = (logits(result_of(opened, state, tmp_path), tokens[:2]) - expected).abs().max()
    assert apart < tolerance(name)
    assert (expected - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", NO_HEADS)
def test_heads_that_a_config_cannot_count_are_refused(plan: Plans, name: str) -> None:
    error, says = NO_HEADS[name]
    with pytest.raises(error, match=says):
        plan(name, ("heads",))


@pytest.mark.parametrize("name", NO_CHANNELS)
def test_channels_that_a_config_cannot_count_are_refused(plan: Plans, name: str) -> None:
    error, says = NO_CHANNELS[name]
    with pytest.raises(error, match=says):
        plan(name, ("ffn-channels",))


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_go_and_the_others_are_as_they_were(
    plan: Plans, tokens: Tensor, tmp_path: Path, name: str
) -> None:
    """The caches of blocks are numbered anew: with one, the model goes on as without."""
    opened = plan(name, ("blocks",), {0: 1})
    dense = load(opened.source.folder)
    home, shipment = opened.blocks.family.blocks, opened.plan.shipment
    assert shipment is not None and 0 not in shipment.places
    state = renamed(dense.state_dict(), home + ".", shipment.places)
    skip(dense.get_submodule(home)[0], opened.blocks.family.returns)
    small = result_of(opened, state, tmp_path)
    apart = (logits(small, tokens[:2]) - logits(dense, tokens[:2])).abs().max()
    assert apart < tolerance(name)
    with_cache, without = (cached_tokens(small, tokens[:2], 6, cached=c) for c in (True, False))
    assert torch.equal(with_cache, without)
