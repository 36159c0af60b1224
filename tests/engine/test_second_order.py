"""Whole runs of methods that update or exchange weights: what is stored is what the report says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmprune import api
from llmprune.checkpoint.source import SINGLE
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import cutting, planning, solving
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from llmprune.solver.factor import Factor
from llmprune.walk.streamed import Streamed

Pico = Callable[..., Path]
Prune = Callable[..., Report]
Open = Callable[..., Streamed]
Weights = Callable[[Path], dict[str, Tensor]]

pytestmark = pytest.mark.usefixtures("no_gate")

RUNS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "wanda-ls": {"method": "wanda-ls"},
    "dsnot": {"method": "dsnot"},
    "swaps": {"method": "wanda", "settings": ["prune.refine=swaps"]},
}
UPDATING = ("sparsegpt", "alps", "wanda-ls")


@pytest.fixture
def prune(tmp_path: Path, tokens: Tensor) -> Prune:
    """Prune a folder, or a model in memory, on token ids; a folder into `tmp_path / out`."""

    def run(model: Any, out: str = "out", **wishes: Any) -> Report:
        defaults: dict[str, Any] = {"calib": tokens, "quiet": True}
        if ":" not in wishes.get("pattern", "unstructured"):
            defaults["sparsity"] = 0.5
        if isinstance(model, Path):
            defaults |= {"out": tmp_path / out, "device": "cpu", "dtype": "float32"}
            model = str(model)
        return api.prune(model, **(defaults | wishes))

    return run


@pytest.fixture(scope="session")
def halved(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """Return the folder of a pico model stored in bfloat16; never write into it."""
    home = tmp_path_factory.mktemp("halved")

    def folder_of(model_type: str) -> Path:
        folder, source = home / model_type, pico(model_type)
        if not folder.exists():
            folder.mkdir()
            for path in source.iterdir():
                if path.name != SINGLE:
                    (folder / path.name).write_bytes(path.read_bytes())
            tensors = {name: value.bfloat16() for name, value in load_file(source / SINGLE).items()}
            save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return folder

    return folder_of


@pytest.fixture(scope="session")
def weights_of(streamed: Open) -> Weights:
    """Return what reads every linear's weight_OI of a folder, by full name, in float32."""

    def read(folder: Path) -> dict[str, Tensor]:
        found, blocks = {}, streamed(folder)
        for index in range(len(blocks)):
            with blocks.open(index) as block:
                for name in block.anatomy.linears:
                    found[block.prefix + name] = block.weight(name).clone()
        return found

    return read


def out_of(report: Report) -> Path:
    assert report.out is not None
    return report.out


def masks_of(folder: Path) -> dict[str, Tensor]:
    return MaskFiles(folder).of_block("")


def sites_of(report: Report) -> dict[str, dict[str, Any]]:
    return {row["site"]: row for block in report.data["blocks"] for row in block["sites"]}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: v for f in sorted(folder.glob("*.safetensors")) for n, v in load_file(f).items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def blocks_of(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def inputs_of(model: Any, index: int, tokens_NT: Tensor) -> dict[str, Tensor]:
    """Return what the linears of one block read, (tokens, I), by the name in the block.

    Plain modules are hooked. Experts are called by hand: their products are no modules.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            if name.endswith("experts"):
                experts(module, *args, prefix=name)
            else:
                found[name] = args[0].flatten(0, -2)

        return note

    def experts(module: Any, hidden_TD: Tensor, chosen: Tensor, *rest: Any, prefix: str) -> None:
        for expert in range(module.num_experts):
            x = hidden_TD[(chosen == expert).any(dim=1)]
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            found[f"{prefix}.{expert}.gate_proj"] = found[f"{prefix}.{expert}.up_proj"] = x
            found[f"{prefix}.{expert}.down_proj"] = module.act_fn(gate) * up

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in blocks_of(model)[index].named_modules()
        if name.endswith("experts") or type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad():
        model(input_ids=tokens_NT, use_cache=False)
    for each in hooks:
        each.remove()
    return found


def moved(weight_OI: Tensor, change_OI: Tensor, x_TI: Tensor) -> float:
    """Return the norm of the change of a linear's output over the norm of its output."""
    x = x_TI.double()
    whole = torch.linalg.norm(x @ weight_OI.double().T)
    return float(torch.linalg.norm(x @ change_OI.double().T) / whole) if whole else 0.0


def recomputed(
    source: Path, out: Path, tokens: Tensor, weights_of: Weights, stock: Callable[[Path], Any],
    *, dense: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return the relative output error of every linear of a result, from its files."""
    before, after, found = weights_of(source), weights_of(out), {}
    home = (
        "transformer.h"
        if any(name.startswith("transformer.h") for name in before)
        else ("model.layers")
    )
    for index in range(len(blocks_of(stock(source)))):
        model = stock(source)
        if not dense:
            for earlier in range(index):
                blocks_of(model)[earlier] = blocks_of(stock(out))[earlier]
        for linear, x in inputs_of(model, index, tokens).items():
            full = f"{home}.{index}.{linear}"
            for site in (name for name in before if name == full or name[:-2] == full):
                found[site] = moved(before[site], before[site] - after[site], x)
    return found


FAST = {("llama", "sparsegpt"), ("gpt2", "swaps"), ("gpt2", "wanda-ls"), ("mixtral", "sparsegpt")}


@pytest.mark.parametrize(
    ("model_type", "run"),
    [
        pytest.param(family, run, marks=[] if (family, run) in FAST else pytest.mark.slow)
        for family in ("llama", "gpt2", "mixtral", "qwen3", "gemma3_text")
        for run in RUNS
    ],
)
def test_a_bfloat16_result_is_what_its_report_says(
    halved: Pico, prune: Prune, weights_of: Weights, stock: Callable[[Path], Any], tokens: Tensor,
    model_type: str, run: str,
) -> None:  # fmt: skip
    source = halved(model_type)
    report = prune(source, **RUNS[run])
    out, rows = out_of(report), sites_of(report)
    assert report.sparsity == 0.5
    assert all(v.dtype == torch.bfloat16 for v in tensors_of(out).values())
    before, after, masks = weights_of(source), weights_of(out), masks_of(out)
    assert rows.keys() == masks.keys() == before.keys()
    errors = recomputed(source, out, tokens, weights_of, stock)
    assert errors.keys() == rows.keys()
    for name, row in rows.items():
        keep = masks[name]
        assert row["removed_weights"] == keep.numel() // 2 == int((after[name] == 0).sum()), name
        assert not bool(after[name][~keep].any()), name
        updated = run in UPDATING and "fallback" not in row
        assert torch.equal(after[name][keep], before[name][keep]) != updated, name
        if run != "dsnot":
            assert row["error"] == pytest.approx(errors[name], rel=2e-3, abs=1e-6), name
        stages = list(row.get("stages", {}).values())
        assert stages == sorted(stages, reverse=True) or run == "dsnot", name
        if updated:
            assert list(row["stages"]) == ["masked", "updated"]
            assert row["stages"]["updated"] == row["error"] < row["stages"]["masked"]
            assert 0.5 < row["accepted"] <= 1
            zeroed = moved(before[name], before[name] * ~keep, torch.eye(keep.shape[1]))
            assert zeroed > 0
        elif "fallback" not in row:
            assert "accepted" not in row
            assert list(row.get("stages", ())) == ["zeroed", report.data["refine"]]
            assert row["stages"][report.data["refine"]] == row["error"]


def test_with_dense_propagation_errors_are_those_on_dense_inputs(
    pico: Pico, prune: Prune, weights_of: Weights, stock: Callable[[Path], Any], tokens: Tensor
) -> None:
    source = pico("llama")
    report = prune(source, method="wanda-ls", settings=["prune.propagate=dense"])
    errors = recomputed(source, out_of(report), tokens, weights_of, stock, dense=True)
    others = recomputed(source, out_of(report), tokens, weights_of, stock)
    for name, row in sites_of(report).items():
        assert row["error"] == pytest.approx(errors[name], rel=1e-3)
        assert ".1." not in name or others[name] != pytest.approx(errors[name], rel=1e-3)


def grams(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the Gram matrices that updates are judged by, in the order of the linears."""
    found: list[Tensor] = []
    accept = solving.accept

    def noted(*args: Any) -> Any:
        found.append(args[2])
        return accept(*args)

    monkeypatch.setattr(solving, "accept", noted)
    return found


def test_updates_are_judged_by_what_is_written_where_less_precise_numbers_are_computed_with(
    pico: Pico, prune: Prune, weights_of: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 checkpoint that is computed with in bfloat16 holds bfloat16 values afterwards."""
    seen = grams(monkeypatch)
    report = prune(pico("llama"), method="sparsegpt", dtype="bfloat16")
    before, after = weights_of(pico("llama")), weights_of(out_of(report))
    for gram, (name, row) in zip(seen, sites_of(report).items(), strict=True):
        dense = before[name].bfloat16().double()
        change = dense - after[name].double()
        error = math.sqrt(float(((change @ gram.double()) * change).sum()))
        whole = math.sqrt(float(((dense @ gram.double()) * dense).sum()))
        assert row["error"] == pytest.approx(error / whole, rel=1e-5), name
        zeroed = dense * (after[name] == 0)
        worse = ((change @ gram.double()) * change).sum(1)
        plain = ((zeroed @ gram.double()) * zeroed).sum(1)
        assert bool((worse <= plain * (1 + 1e-5)).all()), name


@pytest.mark.parametrize("run", RUNS)
def test_2_of_4_keeps_two_of_every_four(
    make_model: Callable[..., Any], prune: Prune, run: str
) -> None:
    model = make_model("llama")
    report = prune(model, pattern="2:4", **RUNS[run])
    assert report.sparsity == 0.5
    for name in report.masks:
        weight = model.get_submodule(name).weight
        assert (weight.view(len(weight), -1, 4) == 0).sum(-1).unique().tolist() == [2], name
    rows = sites_of(report)
    better = [row["stages"]["updated"] < row["stages"]["masked"]
              for row in rows.values() if run in UPDATING]  # fmt: skip
    assert all(better) and len(better) == (14 if run in UPDATING else 0)


@pytest.mark.parametrize(
    ("model_type", "wishes"),
    [
        ("llama", {"method": "sparsegpt", "pattern": "2:4", "settings": ["prune.permute=true"]}),
        ("gpt2", {"method": "wanda-ls", "settings": ["prune.refine=swaps"]}),
        ("mixtral", {"method": "sparsegpt"}),
        pytest.param("mixtral", RUNS["alps"], marks=pytest.mark.slow),
        pytest.param("gemma3_text", RUNS["dsnot"], marks=pytest.mark.slow),
        pytest.param("qwen3", {"method": "alps", "pattern": "2:4"}, marks=pytest.mark.slow),
    ],
)
def test_streamed_and_resident_give_identical_bits(
    pico: Pico, prune: Prune, stock: Callable[[Path], Any], model_type: str, wishes: dict[str, Any]
) -> None:
    source = pico(model_type)
    streamed = prune(source, **wishes)
    model = stock(source)
    resident = prune(model, **wishes)
    expected = stock(out_of(streamed)).state_dict()
    for name, value in model.state_dict().items():
        assert same_bits(value, expected[name]), name
    for name, keep in masks_of(out_of(streamed)).items():
        assert torch.equal(unpack(resident.masks[name], keep.shape), keep)
    both = [
        {name: {**row, "error": None} for name, row in sites_of(report).items()}
        for report in (streamed, resident)
    ]
    assert both[0] == both[1]


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_block_observed_in_rounds_gives_the_same_bits(
    make_model: Callable[..., Any], prune: Prune, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    whole, parts = make_model(model_type), make_model(model_type)
    prune(whole, method="sparsegpt")
    seen: list[int] = []
    observe, estimate = cutting.observe, planning.estimate

    def count(block: Any, stream: Any, needs: Any, *, dense: bool) -> Any:
        seen.append(len(needs))
        return observe(block, stream, needs, dense=dense)

    monkeypatch.setattr(cutting, "observe", count)
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(estimate(*a, **k), statistics_bytes=600)
    )
    prune(parts, method="sparsegpt")
    assert set(seen) == {1} and len(seen) >= 8
    for name, value in whole.state_dict().items():
        assert same_bits(value, parts.state_dict()[name]), name


@pytest.mark.parametrize("method", ["sparsegpt", "wanda-ls"])
def test_tiles_go_whole_and_what_stays_is_updated(
    make_model: Callable[..., Any], prune: Prune, method: str
) -> None:
    model, dense = make_model("llama"), make_model("llama")
    report = prune(model, method=method, pattern="4x8")
    for name, row in sites_of(report).items():
        weight, before = model.get_submodule(name).weight, dense.get_submodule(name).weight
        kept = weight.view(len(weight) // 4, 4, -1, 8) != 0
        tiles = kept.any(3).any(1)
        assert torch.equal(tiles, kept.all(3).all(1))
        assert row["removed"] == int((~tiles).sum()) == tiles.numel() // 2
        assert not torch.equal(weight[weight != 0], before[weight != 0])
        assert row["stages"]["updated"] < row["stages"]["masked"]


@pytest.mark.parametrize("run", UPDATING)
@pytest.mark.parametrize("sparsity", [0.02, 0.5])
def test_inputs_that_are_always_zero_go_first_and_stay_as_they_were(
    make_model: Callable[..., Any], prune: Prune, run: str, sparsity: float
) -> None:
    model, dense = make_model("llama"), make_model("llama")
    for each in (model, dense):
        with torch.no_grad():
            each.model.layers[0].input_layernorm.weight[5] = 0
    report = prune(model, sparsity=sparsity, **RUNS[run])
    for name in ("q_proj", "k_proj", "v_proj"):
        site = f"model.layers.0.self_attn.{name}"
        weight, before = model.get_submodule(site).weight, dense.get_submodule(site).weight
        row = sites_of(report)[site]
        kept = weight[:, 5] != 0
        assert math.isfinite(row["error"]) and row["accepted"] > 0.5
        if sparsity == 0.5:
            assert not bool(kept.any())
        elif run != "wanda-ls":  # Wanda asks that every row loses as many
            assert row["removed_weights"] == round(0.02 * weight.numel()) == int((~kept).sum())
            assert row["error"] == 0
        assert torch.equal(weight[kept, 5], before[kept, 5])


@pytest.mark.parametrize(
    "method", ["sparsegpt", "dsnot", pytest.param("alps", marks=pytest.mark.slow)]
)
def test_what_an_earlier_pruning_removed_stays_removed(
    pico: Pico, prune: Prune, weights_of: Weights, method: str
) -> None:
    first = out_of(prune(pico("llama"), "first", method="magnitude", sparsity=0.4))
    second = prune(first, "second", method=method, sparsity=0.6)
    before, after = masks_of(first), masks_of(out_of(second))
    weights = weights_of(out_of(second))
    for name, row in sites_of(second).items():
        assert not bool((after[name] & ~before[name]).any()), name
        assert not bool(weights[name][~after[name]].any())
        if method == "sparsegpt":
            assert row["removed_weights"] == round(0.6 * after[name].numel())


@pytest.mark.parametrize(
    "run",
    [
        *("sparsegpt", "dsnot"),
        *(pytest.param(run, marks=pytest.mark.slow) for run in ("alps", "wanda-ls", "swaps")),
    ],
)
def test_the_same_pruning_again_changes_nothing(pico: Pico, prune: Prune, run: str) -> None:
    first = out_of(prune(pico("gpt2"), "first", **RUNS[run]))
    second = out_of(prune(first, "second", **RUNS[run]))
    one, two = tensors_of(first), tensors_of(second)
    assert all(same_bits(one[name], two[name]) for name in one)
    assert all(torch.equal(masks_of(first)[n], keep) for n, keep in masks_of(second).items())


def test_columns_that_are_gone_already_count_before_the_sweep_reaches_them(
    prune: Prune, tmp_path: Path
) -> None:
    """The last columns were removed; the first ones lose what is still missing, and no more."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=384, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(5 if value.dim() > 1 else 1)
        model.model.layers[0].mlp.down_proj.weight[:, :256] *= 1e6
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 64, (24, 24), generator=torch.Generator().manual_seed(0))
    first = prune(tmp_path / "model", "first", method="magnitude", sparsity=0.3)
    second = prune(out_of(first), "second", method="sparsegpt", sparsity=0.4, calib=tokens)
    site = "model.layers.0.mlp.down_proj"
    gone = (~masks_of(out_of(first))[site]).sum(0)
    assert gone[:256].sum() == 0 and gone[256:].sum() == round(0.3 * 32 * 384)
    assert "fallback" not in sites_of(second)[site]
    assert sites_of(second)[site]["removed_weights"] == round(0.4 * 32 * 384)


# Channels in order for N:M.


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Return the scores that columns are put in order by, and the orders."""
    found: list[tuple[Tensor, Tensor]] = []
    permute = solving.permute_columns

    def noted(score_OI: Tensor, n: int, m: int) -> Tensor:
        order_I = permute(score_OI, n, m)
        found.append((score_OI.clone(), order_I))
        return order_I

    monkeypatch.setattr(solving, "permute_columns", noted)
    return found


PERMUTED: dict[str, tuple[str, ...]] = {
    "llama": ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
    "gpt2": ("mlp.c_proj", "mlp.c_fc"),
}


@pytest.mark.parametrize("model_type", PERMUTED)
def test_a_permuted_block_computes_the_same(
    pico: Pico, streamed: Open, tokens: Tensor, model_type: str
) -> None:
    blocks = streamed(pico(model_type))
    with blocks.open(0) as block, torch.no_grad():
        coupling = block.anatomy.coupling("ffn-channels")
        hidden = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
        ffn = block.module.mlp
        expected = ffn(hidden)
        reader, *writers = PERMUTED[model_type]
        width = block.weight(reader).shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
        assert block.coupling_read_by(reader) is coupling
        assert block.coupling_read_by(writers[0]) is None
        changed = block.permute(coupling, order)
        assert any(name.endswith("bias") for name in changed) == (model_type == "gpt2")
        assert torch.allclose(ffn(hidden), expected, atol=1e-5)
        block.replace(reader, block.weight(reader)[:, order].clone())
        block.permute(coupling, order, written_only=True)
        assert torch.allclose(ffn(hidden), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "wishes"),
    [
        ("llama", {"method": "wanda"}),
        ("gpt2", {"method": "wanda"}),
        ("llama", {"method": "gblm"}),
        pytest.param("llama", {"method": "ria", "dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
)
def test_channels_in_order_keep_more_and_masks_follow_them(
    pico: Pico, prune: Prune, weights_of: Weights, stock: Callable[[Path], Any], tokens: Tensor,
    orders: list[tuple[Tensor, Tensor]], model_type: str, wishes: dict[str, Any],
) -> None:  # fmt: skip
    source = pico(model_type)
    settings = ["prune.permute=true"]
    out = out_of(prune(source, pattern="2:4", settings=settings, **wishes))
    before, after, masks = weights_of(source), weights_of(out), masks_of(out)
    reader, *writers = PERMUTED[model_type]
    home = "transformer.h" if model_type == "gpt2" else "model.layers"
    assert len(orders) == 2
    back = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    plain = {name: before[name] * masks[name] for name in before}
    for index, (score, order) in enumerate(orders):
        assert sorted(order.tolist()) == list(range(score.shape[1]))
        assert not torch.equal(order, torch.arange(score.shape[1]))
        ordered = score[:, order].view(len(score), -1, 4)
        kept = masks[f"{home}.{index}.{reader}"]
        assert kept.view(len(score), -1, 4).sum(-1).unique().tolist() == [2]
        best = ordered.topk(2).values.sum()
        assert float(score[:, order][kept].sum()) == pytest.approx(float(best), rel=1e-6)
        assert best > score.view(len(score), -1, 4).topk(2).values.sum()
        plain[f"{home}.{index}.{reader}"] = before[f"{home}.{index}.{reader}"] * (
            torch.empty_like(kept).index_copy_(1, order, kept)
        )
        assert torch.equal(
            after[f"{home}.{index}.{reader}"],
            (before[f"{home}.{index}.{reader}"][:, order]) * kept,
        )
        for writer in writers:
            name = f"{home}.{index}.{writer}"
            assert torch.equal(after[name], before[name][order] * masks[name])
            plain[name] = torch.empty_like(after[name]).index_copy_(0, order, after[name])
    for name, weight in plain.items():  # the same masks on the model in its own order
        module = back.get_submodule(name) if not name.endswith((".q", ".k", ".v")) else None
        if module is not None:
            transposed = type(module).__name__ == "Conv1D"
            module.weight.data = weight.T.contiguous() if transposed else weight
        else:
            part = "qkv".index(name[-1])
            back.get_submodule(name[:-2]).weight.data[:, 32 * part : 32 * part + 32] = weight.T
    with torch.no_grad():
        one, two = stock(out)(input_ids=tokens).logits, back(input_ids=tokens).logits
    assert (one - two).abs().max() < 1e-4 * two.abs().max()


def test_channels_in_order_leave_a_smaller_error(make_model: Callable[..., Any],
                                                 prune: Prune) -> None:  # fmt: skip
    wishes = {"method": "sparsegpt", "pattern": "2:4"}
    plain = sites_of(prune(make_model("llama"), **wishes))
    ordered = sites_of(prune(make_model("llama"), settings=["prune.permute=true"], **wishes))
    site = "model.layers.0.mlp.down_proj"
    assert ordered[site]["error"] < plain[site]["error"]
    others = [name for name in plain if ".0." in name and name != site]
    assert all(ordered[name]["error"] == plain[name]["error"] for name in others)


@pytest.mark.parametrize(
    "wishes",
    [
        {"method": "wanda"},
        {"method": "wanda", "settings": ["prune.permute=true", "prune.skip=['*up_proj']"]},
        {"method": "wanda++", "settings": ["prune.permute=true", "prune.options.rounds=2"]},
    ],
    ids=["plain", "a writer skipped", "repaired"],
)
def test_earlier_masks_follow_channels_that_are_put_in_order(
    pico: Pico, prune: Prune, weights_of: Weights, orders: list[tuple[Tensor, Tensor]],
    wishes: dict[str, Any],
) -> None:  # fmt: skip
    settings = ["prune.permute=true"]
    first = out_of(prune(pico("llama"), "first", method="wanda", sparsity=0.3))
    orders.clear()
    second = out_of(prune(first, "second", pattern="2:4", **({"settings": settings} | wishes)))
    one, two = masks_of(first), masks_of(second)
    weights, dense = weights_of(second), weights_of(first)
    per_block = len(orders) // 2
    for index in range(2):
        order = torch.arange(64)
        for _, step in orders[index * per_block : (index + 1) * per_block]:
            order = order[step]
        ffn = f"model.layers.{index}.mlp"
        down = one[f"{ffn}.down_proj"][:, order]
        assert not bool((two[f"{ffn}.down_proj"] & ~down).any())
        for name in (f"{ffn}.gate_proj", f"{ffn}.up_proj"):
            assert not bool((two[name] & ~one[name][order]).any()), name
            assert not bool(weights[name][~two[name]].any())
            if "repaired" not in str(wishes) and wishes["method"] == "wanda":
                assert torch.equal(weights[name], dense[name][order] * two[name])


# Where no damping makes a Gram matrix invertible.


@pytest.mark.parametrize("run", UPDATING)
def test_without_a_factor_masks_are_wandas_and_the_report_says_so(
    make_model: Callable[..., Any], prune: Prune, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    def none(gram_II: Tensor, *args: Any) -> Factor:
        dead_I = gram_II.diagonal() == 0
        return Factor(upper_II=None, damping=1.0, added_I=torch.ones(len(gram_II)), dead_I=dead_I)

    for module in ("columnwise", "least_squares", "admm"):
        monkeypatch.setattr(f"llmprune.solver.{module}.factorise", none)
    model, plain, dense = (make_model("llama") for _ in range(3))
    report = prune(model, **RUNS[run])
    group = "row" if run == "wanda-ls" else "matrix"
    prune(plain, method="wanda", settings=[f"prune.group={group}"])
    rows = sites_of(report)
    assert all(row["degraded"] is True and row["accepted"] == 1 for row in rows.values())
    warnings = report.data["warnings"]
    assert len(warnings) == 2 and all("no damping makes invertible" in each for each in warnings)
    for name, row in rows.items():
        weight = model.get_submodule(name).weight
        keep = unpack(report.masks[name], tuple(weight.shape))
        assert torch.equal(weight, dense.get_submodule(name).weight * keep)
        assert row["stages"]["masked"] == row["stages"]["updated"] == row["error"]
        if ".0." in name:
            assert torch.equal(weight, plain.get_submodule(name).weight), name


def test_the_report_on_disk_keeps_the_stages(pico: Pico, prune: Prune) -> None:
    wishes = {"method": "wanda-ls", "settings": ["prune.refine=swaps", "prune.damp=diag"]}
    out = out_of(prune(pico("llama"), **wishes))
    data = json.loads((out / "llmprune" / "report.json").read_text())
    assert (data["solver"], data["refine"], data["repair"]) == ("least-squares", "swaps", None)
    rows: list[Mapping[str, Any]] = [row for block in data["blocks"] for row in block["sites"]]
    for row in rows:
        assert list(row["stages"]) == ["zeroed", "swaps", "masked", "updated"]
        values = list(row["stages"].values())
        assert values == sorted(values, reverse=True) and values[1] == values[2]


@pytest.mark.parametrize("run", ["sparsegpt", "swaps"])
def test_experts_that_see_too_few_tokens_are_cut_more_simply_and_named(
    make_model: Callable[..., Any], prune: Prune, tokens: Tensor, run: str
) -> None:
    """A Gram matrix of fewer tokens than columns is singular; of none it is nothing."""
    model, dense = make_model("mixtral"), make_model("mixtral")
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0  # so this column is positive for every token
        gate[:, 0] = 0
        gate[3, 0] = -100.0  # the router of block 0 never chooses expert 3
    report = prune(model, calib=tokens[:2], **RUNS[run])
    said = set()
    for name, row in sites_of(report).items():
        columns = 64 if name.endswith("down_proj") else 32
        why = f"wanda ({row['tokens']} tokens for {columns} columns)"
        if row["tokens"] == 0:
            why = solving.NO_TOKENS
        assert row.get("fallback") == (why if row["tokens"] < columns else None), name
        assert ("stages" in row) == (row["tokens"] >= columns)
        if row["tokens"] < columns:
            said.add(why)
            path, expert, kind = name.rsplit(".", 2)
            one, two = (
                each.get_submodule(path).get_parameter(
                    kind if kind == "down_proj" else "gate_up_proj"
                )[int(expert)]
                for each in (model, dense)
            )
            assert bool(((one == two) | (one == 0)).all()), name
        assert row["removed_weights"] == row["weights"] // 2
    assert solving.NO_TOKENS in said and len(said) > 2
    warned = " ".join(report.data["warnings"])
    assert "more --num-samples would reach them" in warned and len(report.data["warnings"]) >= 2
