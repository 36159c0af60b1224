"""A result whose blocks differ is a model like others: its weights and its units can be pruned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llmprune.api import prune
from llmprune.arch.layout import BlockLayout, Layout, Tier
from llmprune.base.errors import LlmpruneError, RecipeError, WontLoad
from llmprune.checkpoint.source import read_json
from llmprune.delivery.copied_code import code_in_scratch
from llmprune.delivery.heterogeneous import cut_again, heterogeneous_config, unfolded
from llmprune.delivery.manifest import MANIFEST
from llmprune.remote import modeling_decilm, modeling_llmprune
from llmprune.report.run import Report
from tests.conftest import gate_here

Pico = Callable[..., Path]
F, H, G = "intermediate_size", "num_attention_heads", "num_key_value_heads"
DIFFER = (
    BlockLayout(source=0, sizes={F: 32, H: 2, G: 2}),
    BlockLayout(source=1, sizes={F: 64}, without=("attention",)),
    BlockLayout(source=2, sizes={F: 64, H: 4, G: 4}),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> Callable[..., Report]:
    """Prune a folder on given tokens, the code beside it trusted."""

    def prune_folder(
        folder: Path, method: str, pattern: str, sparsity: float, *more: str
    ) -> Report:
        with gate_here():
            return prune(
                str(folder),
                method=method,
                pattern=pattern,
                sparsity=sparsity,
                calib=tokens,
                out=tmp_path_factory.mktemp("again") / "out",
                trust_remote_code=True,
                quiet=True,
                settings=["evaluate.perplexity=false", *more],
            )

    return prune_folder


def written(home: Path, stock: dict[str, Any], blocks: Sequence[BlockLayout], tier: Tier) -> Path:
    """Write a random Llama of a tier whose blocks differ."""
    layout = Layout(blocks=tuple(blocks))
    config, (code,) = heterogeneous_config(stock, layout, tier)
    kind: Any = modeling_llmprune.LlmpruneLlamaForCausalLM  # made when it is asked for
    kind = kind if tier == "E3" else modeling_decilm.DeciLMForCausalLM
    torch.manual_seed(0)
    model = kind(kind.config_class.from_dict(deepcopy(config)))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(5 if value.dim() > 1 else 1)
    model.save_pretrained(home)
    (home / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copyfile(code, home / code.name)
    return home


@pytest.fixture(scope="module")
def unequal(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of tier E3 whose blocks have other widths, other heads, or no attention."""
    stock = read_json(pico("llama") / "config.json") | {"num_hidden_layers": len(DIFFER)}
    return written(tmp_path_factory.mktemp("unequal"), stock, DIFFER, "E3")


def widths(folder: Path) -> list[int]:
    with code_in_scratch():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return [block.mlp.down_proj.weight.shape[1] for block in model.model.layers]


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_single_weights_of_unequal_blocks_are_pruned(
    run: Callable[..., Report], unequal: Path, method: str
) -> None:
    found = run(unequal, method, "unstructured", 0.5)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3) and found.out is not None
    assert widths(found.out) == widths(unequal) == [32, 64, 64]


@pytest.mark.parametrize("pattern", ["ffn-channels", "ffn-channels+heads"])
def test_units_go_again_and_what_differed_stays_different(
    run: Callable[..., Report], unequal: Path, pattern: str
) -> None:
    found = run(unequal, "wanda", pattern, 0.25, "prune.multiple=8")
    assert found.out is not None and found.data["tier"] == "E3"
    assert widths(found.out) == ([24, 48, 48] if "heads" in pattern else [24, 40, 40])
    assert found.data["gate"]["masked"]["passed"]  # as with zeros in the source
    assert found.data["parameters_after"] < found.data["parameters_before"]
    before, after = (read_json(at / "config.json") for at in (unequal, found.out))
    assert after["per_layer_config"]["1"]["skip"] == ["attention"]
    fewer = 1 if "heads" in pattern else 0
    assert after["per_layer_config"]["0"][G] == before["per_layer_config"]["0"][G] - fewer
    assert read_json(found.out / MANIFEST)["tier"] == "E3"


def test_heads_of_a_block_are_as_many_as_it_has_room_for(
    run: Callable[..., Report], unequal: Path
) -> None:
    found = run(unequal, "wanda", "heads", 0.15)
    sites = [row for block in found.data["blocks"] for row in block["sites"]]
    assert [row["units"] for row in sites] == [2, 4]


def test_blocks_that_become_alike_are_a_stock_model_without_code(
    run: Callable[..., Report], unequal: Path, stock: Callable[[Path], Any]
) -> None:
    found = run(unequal, "sleb", "blocks", 0.5)
    assert found.out is not None and found.data["tier"] == "E0"
    assert not list(found.out.glob("*.py")) and len(stock(found.out).model.layers) == 1


def test_a_result_in_the_portable_form_goes_on_in_the_free_one(
    run: Callable[..., Report], pico: Pico, tmp_path: Path
) -> None:
    stock = read_json(pico("llama") / "config.json") | {"num_hidden_layers": 3, F: 512}
    blocks = [
        BlockLayout(source=0, sizes={F: 256}),
        BlockLayout(source=1, without=("attention",)),
        BlockLayout(source=2),
    ]
    source = written(tmp_path / "portable", stock, blocks, "E2")
    found = run(source, "wanda", "ffn-channels", 0.3, "prune.multiple=64")
    assert found.out is not None and found.data["tier"] == "E3"
    assert [path.name for path in found.out.glob("*.py")] == ["modeling_llmprune.py"]
    assert widths(found.out) == [192, 320, 320] and found.data["gate"]["masked"]["passed"]
    skips = read_json(found.out / "config.json")["per_layer_config"]
    assert skips["1"]["skip"] == ["attention"]


def test_what_was_told_of_blocks_is_read_back() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=3, intermediate_size=64).to_diff_dict()
    written, _ = heterogeneous_config(config, Layout(blocks=DIFFER), "E3")
    found = unfolded(written)
    assert found is not None
    stock, blocks = found
    assert tuple(blocks) == DIFFER
    assert stock["model_type"] == "llama" and "auto_map" not in stock
    again, _ = heterogeneous_config(stock, Layout(blocks=tuple(blocks)), "E3")
    assert again == written


def test_the_portable_form_is_read_back_as_the_family_that_it_was() -> None:
    wide = {"num_hidden_layers": 2, F: 512, H: 4, G: 4, "hidden_size": 64}
    blocks = (BlockLayout(source=0, sizes={F: 256}), BlockLayout(source=1, without=("attention",)))
    for kind in ("llama", "qwen2"):
        config = AutoConfig.for_model(kind, **wide).to_diff_dict()
        written, _ = heterogeneous_config(config, Layout(blocks=blocks), "E2")
        found = unfolded(written)
        assert found is not None and found[0]["model_type"] == kind
        assert [block.sizes[F] for block in found[1]] == [256, 512]
        assert found[1][1].without == ("attention",)


def test_what_went_before_and_what_goes_now_add_up() -> None:
    now = Layout(blocks=(BlockLayout(source=1, sizes={F: 32}, without=("ffn",)),))
    (block,) = cut_again(now, DIFFER).blocks
    assert block.without == ("attention", "ffn") and not block.sizes and block.source == 1


def test_what_is_no_result_of_ours_stays_what_it_is() -> None:
    assert unfolded({"model_type": "llama"}) is None
    assert unfolded({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}) is None


def test_filling_up_blocks_that_differed_is_refused(
    run: Callable[..., Report], unequal: Path
) -> None:
    with pytest.raises(WontLoad, match=r"prune\.tier=E3"):
        run(unequal, "wanda", "ffn-channels", 0.2, "prune.tier=E1", "prune.multiple=8")


def test_units_of_a_model_of_low_rank_are_refused_and_its_blocks_and_weights_are_not(
    run: Callable[..., Report], pico: Pico
) -> None:
    made = run(pico("llama"), "svd", "low-rank", 0.3).out
    assert made is not None
    with pytest.raises(RecipeError, match="remove units first, then lower ranks"):
        run(made, "wanda", "ffn-channels", 0.3)
    assert run(made, "wanda", "unstructured", 0.3).sparsity == pytest.approx(0.3, abs=1e-3)
    fewer = run(made, "finercut", "blocks", 0.3)
    assert fewer.out is not None
    assert len(read_json(fewer.out / "config.json")["ranks"]) == 1
    twice = run(made, "svd", "low-rank", 0.3)
    assert twice.data["parameters_after"] < twice.data["parameters_before"]
    assert twice.data["gate"]["masked"]["passed"]


def test_a_model_with_code_is_not_pruned_unasked(
    unequal: Path, tokens: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(LlmpruneError, match="--trust-remote-code"):
        prune(str(unequal), method="wanda", sparsity=0.5, calib=tokens, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["cfsp", "compact"])
def test_shares_that_are_measured_again_go_with_scores_of_activations(
    run: Callable[..., Report], unequal: Path, method: str
) -> None:
    """Between two measurements units go by the method's own scores, which read statistics."""
    wish = ("prune.allocation=adapt-pruner", "prune.multiple=8", "prune.tier=E3")
    found = run(unequal, method, "ffn-channels", 0.2, *wish)
    assert found.data["allocation"] == "adapt-pruner" and found.out is not None
    assert sum(widths(found.out)) < sum(widths(unequal))
