"""Linears of low rank, from the command's words to a folder that loads with the code beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmprune
from llmprune.api import make_recipe, plan, prune
from llmprune.arch.types import Linear, Site
from llmprune.base.errors import RecipeError
from llmprune.delivery.copied_code import code_in_scratch
from llmprune.engine.factors import lower_ranks
from llmprune.engine.ranks import most_ranks, rank_counts, rank_site
from llmprune.report.run import Report
from llmprune.solver.low_rank import low_rank_dense

Pico = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("quick_gate")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Report]:
    """Prune a folder on little text, into a folder of its own."""

    def prune_folder(folder: Path, method: str = "svd-llm", **wish: Any) -> Report:
        usual: dict[str, Any] = {"sparsity": 0.4, "num_samples": 4, "seq_len": 16, "quiet": True}
        out = tmp_path_factory.mktemp("low-rank") / "out"
        data = {"calib": str(text_file)} if method == "svd-llm" else {}
        said = ["evaluate.perplexity=false", *wish.pop("settings", ())]
        return prune(
            str(folder), method=method, settings=said, **{"out": out} | usual | data | wish
        )

    return prune_folder


@pytest.fixture(scope="module")
def made(run: Callable[..., Report], pico: Pico) -> Report:
    """A pico Llama whose linears lost four tenths, but one that is skipped."""
    from tests.conftest import gate_here

    with gate_here():
        return run(pico("llama"), settings=["prune.skip=['*layers.0.mlp.up_proj']"])


def trusted(folder: Path) -> Any:
    with code_in_scratch():
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def with_products(dense: Any, folder: Path) -> Any:
    """Put the product of every pair of factors on the disk into the dense model."""
    stored: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    lefts = [name for name in stored if name.endswith(".left.weight")]
    assert lefts
    for name in lefts:
        left, right = stored[name], stored[name.replace(".left.", ".right.")]
        linear = dense.get_submodule(name.removesuffix(".left.weight"))
        linear.weight.data = (left.double() @ right.double()).float()
    return dense


def test_a_result_has_two_linears_and_computes_their_product(
    made: Report, pico: Pico, stock: Callable[[Path], Any], tokens: Tensor
) -> None:
    assert made.out is not None
    model = trusted(made.out)
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "LowRank"
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    number = sum(value.numel() for value in model.parameters())
    assert number == made.data["parameters_after"] < made.data["parameters_before"]
    expected = logits(with_products(stock(pico("llama")), made.out), tokens)
    found = logits(model, tokens)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert made.data["gate"]["masked"]["passed"] and made.data["gate"]["beside"].startswith("prod")


def test_a_site_says_what_its_output_lost_and_what_it_weighs(made: Report) -> None:
    rows = {row["site"]: row for block in made.data["blocks"] for row in block["sites"]}
    assert UP not in rows  # skipped
    down = rows[DOWN]
    assert 0 < down["lost_energy"] < 1 and down["error"] == pytest.approx(
        down["lost_energy"] ** 0.5
    )
    left = down["rank"] * (32 + 64)
    assert down["weights"] - down["removed_weights"] == left <= 0.6 * 32 * 64 < left + 96
    removed = sum(row["removed_weights"] for row in rows.values())
    assert made.data["parameters_before"] - made.data["parameters_after"] == removed
    assert "of an output's energy lost" in repr(made)


def test_it_is_not_run_unasked_and_loads_by_name(made: Report, tokens: Tensor) -> None:
    assert made.out is not None
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(made.out, trust_remote_code=False)
    model = llmprune.load(str(made.out))
    assert torch.equal(logits(model.float(), tokens), logits(trusted(made.out), tokens))


def test_saved_again_it_loads_again(made: Report, tokens: Tensor, tmp_path: Path) -> None:
    assert made.out is not None
    model = trusted(made.out)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(trusted(tmp_path / "again"), tokens), logits(model, tokens))


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    run: Callable[..., Report],
    made: Report,
    pico: Pico,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skipped = ["prune.skip=['*layers.0.mlp.up_proj']"]

    def stopped(cutter: Any, group: Any, block: Any, *rest: Any) -> None:
        if block.index:
            raise RuntimeError("stopped")
        lower_ranks(cutter, group, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("llmprune.engine.solving.lower_ranks", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            run(pico("llama"), out=tmp_path / "out", settings=skipped)
    found = run(pico("llama"), out=tmp_path / "out", settings=skipped)
    assert found.data["resumed_after"] == 0 and made.out is not None
    for path in made.out.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_generation_with_a_cache_is_that_without(made: Report, tokens: Tensor) -> None:
    assert made.out is not None
    model = trusted(made.out)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    cached, plain = (model.generate(tokens[:, :8], use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached, plain)


def test_tier_e0_is_the_product_in_stock_tensors_and_says_that_it_saves_nothing(
    run: Callable[..., Report],
    made: Report,
    pico: Pico,
    stock: Callable[[Path], Any],
    tokens: Tensor,
) -> None:
    wish = {"settings": ["prune.skip=['*layers.0.mlp.up_proj']", "prune.tier=E0"]}
    found = run(pico("llama"), **wish)
    assert found.out is not None and made.out is not None
    assert not list(found.out.glob("*.py")) and found.data["form"] == "dense"
    assert found.data["parameters_after"] == found.data["parameters_before"]
    assert "saves nothing" in repr(found)
    ours, theirs = logits(stock(found.out), tokens), logits(trusted(made.out), tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    weight = stock(found.out).get_submodule(DOWN).weight.double()
    rank = next(r["rank"] for b in found.data["blocks"] for r in b["sites"] if r["site"] == DOWN)
    assert int((torch.linalg.svdvals(weight) > 1e-5).sum()) == rank


def test_the_gram_matrix_decides_and_not_the_weight_alone(
    run: Callable[..., Report], pico: Pico, stock: Callable[[Path], Any]
) -> None:
    """Without text the kept directions are those of the plain SVD; with it they are others."""
    name = "model.layers.0.self_attn.o_proj"
    weights = {}
    for method in ("svd", "svd-llm"):
        out = run(pico("llama"), method, settings=["prune.tier=E0"]).out
        assert out is not None
        weights[method] = stock(out).get_submodule(name).weight.data
    before = stock(pico("llama")).get_submodule(name).weight.data
    rank = int((torch.linalg.svdvals(weights["svd"]) > 1e-5).sum())
    u, values, v = torch.linalg.svd(before)
    plain = u[:, :rank] * values[:rank] @ v[:rank]
    torch.testing.assert_close(weights["svd"], plain, rtol=0, atol=1e-4)
    assert (weights["svd-llm"] - plain).norm() > 0.05 * plain.norm()


def test_transposed_linears_with_biases_become_two(
    run: Callable[..., Report], pico: Pico, tokens: Tensor
) -> None:
    found = run(pico("gpt2"))
    assert found.out is not None and found.data["gate"]["masked"]["passed"]
    half = trusted(found.out).transformer.h[0].mlp.c_fc
    assert type(half).__name__ == "LowRank" and half.bias.shape == (half.out_features,)
    sites = {row["site"] for block in found.data["blocks"] for row in block["sites"]}
    assert not any("c_attn" in name for name in sites)  # three linears in one parameter


def test_named_shares_and_linears_that_lose_nothing(pico: Pico) -> None:
    wish = ["prune.sparsities={'*down_proj': 0, '*up_proj': 0.5}", "prune.skip=['*_proj.*']"]
    recipe = make_recipe(
        str(pico("llama")), method="svd-llm", sparsity=0.3, settings=wish[:1], calib="demo"
    )
    found = plan(recipe)
    assert found.counts is not None
    assert all(not count for name, count in found.counts.items() if name.endswith("down_proj"))
    site = next(site for site in found.sites if site.name == UP)
    assert site.num_units - found.counts[UP] == (32 * 64 // 2) // 96
    text = repr(found)
    assert "left dense" in text and "mlp.down_proj" in text and "up_proj 10 of 64 x 32" in text


def test_a_result_of_single_weights_is_refused(
    run: Callable[..., Report], pico: Pico, text_file: Path, tmp_path: Path
) -> None:
    run(pico("llama"), "magnitude", out=tmp_path / "masked")
    with pytest.raises(RecipeError, match=r"zeros low-rank does not keep.*regrow"):
        run(tmp_path / "masked", "svd", out=tmp_path / "no")
    assert run(tmp_path / "masked", "svd", out=tmp_path / "yes", settings=["prune.regrow=true"])


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"method": "wanda", "pattern": "low-rank"}, "--method svd-llm"),
        ({"method": "svd-llm", "pattern": "2:4"}, "--pattern low-rank"),
        ({"method": "svd-llm", "settings": ["prune.tier=E2"]}, "prune.tier=E3"),
        ({"method": "svd-llm", "settings": ["prune.form=masked"]}, "prune.tier=E0"),
        ({"method": "svd-llm", "settings": ["prune.solver=columnwise"]}, "Leave it out"),
        ({"method": "svd-llm", "settings": ["prune.allocation=owl"]}, "prune.sparsities"),
        ({"method": "svd-llm", "target": {"params": "0.8x"}}, "--sparsity"),
    ],
)
def test_what_does_not_go_together_is_refused(pico: Pico, wish: dict[str, Any], says: str) -> None:
    sparsity: dict[str, Any] = (
        {} if "target" in wish or wish.get("pattern") == "2:4" else {"sparsity": 0.3}
    )
    with pytest.raises(RecipeError, match=says):
        plan(make_recipe(str(pico("llama")), **sparsity, **wish))


def test_the_pattern_alone_means_the_method_that_looks_at_text(pico: Pico) -> None:
    found = plan(make_recipe(str(pico("llama")), pattern="low-rank", sparsity=0.3, calib="demo"))
    assert found.method.name == "svd-llm" and found.parts.cut == ("gram",)


def test_a_model_in_memory_takes_the_product_alone(
    make_model: Callable[..., Any], tokens: Tensor
) -> None:
    model = make_model("llama")
    with pytest.raises(llmprune.LlmpruneError, match="tier E0"):
        prune(model, method="svd-llm", sparsity=0.4, calib=tokens, quiet=True)
    before = model.get_submodule(UP).weight.clone()
    prune(
        model, method="svd-llm", sparsity=0.4, calib=tokens, quiet=True, settings=["prune.tier=E0"]
    )
    after = model.get_submodule(UP).weight
    assert int((torch.linalg.svdvals(after.double()) > 1e-5).sum()) == int(0.6 * 64 * 32 / 96)
    assert not torch.equal(before, after)


@settings(max_examples=20)
@given(rows=st.integers(3, 40), columns=st.integers(3, 40), share=st.fractions(0, 0.95))
def test_ranks_free_at_least_their_share_and_no_rank_more(
    rows: int, columns: int, share: Any
) -> None:
    linear = Linear(name="mlp.up_proj", param="mlp.up_proj.weight", shape=(rows, columns))
    site: Site = rank_site("b.0.mlp.up_proj", linear, 0)
    count = rank_counts([site], {site.name: share})[site.name]
    kept = site.num_units - count
    assert 1 <= kept <= most_ranks((rows, columns)) and site.num_weights == rows * columns
    if not count:
        assert site.freed(count) == 0
    else:
        assert site.freed(count) == rows * columns - kept * (rows + columns)
        enough = site.freed(count) >= share * rows * columns - 1e-6
        assert enough or kept == 1
        assert (kept + 1) * (rows + columns) > (1 - share) * rows * columns - 1e-6


def test_the_product_is_what_the_solver_says(
    run: Callable[..., Report], pico: Pico, stock: Callable[[Path], Any]
) -> None:
    """The first block reads what the dense model reads, so its Gram matrix can be made here."""
    model = stock(pico("llama"))
    seen: list[Tensor] = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].flatten(0, 1))
    )
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    logits(model, tokens)
    hook.remove()
    x_NI = torch.cat(seen).double()
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    found = run(pico("llama"), calib=tokens, settings=["prune.tier=E0"])
    assert found.out is not None
    rank = found.data["blocks"][0]["sites"][0]["rank"]
    expected = low_rank_dense(weight.double(), x_NI.T @ x_NI, rank, damping=0.01)
    ours = stock(found.out).model.layers[0].self_attn.q_proj.weight.double()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
