"""Whole runs on pico models: exact zeros, untouched bits, equal results by every way there is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import api
from llmprune.base.errors import NumericalError, RecipeError
from llmprune.checkpoint.source import SINGLE
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import cutting, planning
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from llmprune.walk.streamed import Streamed

Pico = Callable[..., Path]
Prune = Callable[..., Report]
Open = Callable[..., Streamed]

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def prune(tmp_path: Path, text_file: Path) -> Prune:
    """Prune a folder into `tmp_path / out` on text, in float32 on the CPU."""

    def run(folder: Path, out: str = "out", **wishes: Any) -> Report:
        defaults: dict[str, Any] = {
            "out": tmp_path / out, "calib": str(text_file), "num_samples": 8, "seq_len": 24,
            "device": "cpu", "dtype": "float32", "quiet": True,
        }  # fmt: skip
        if ":" not in wishes.get("pattern", "unstructured"):
            defaults["sparsity"] = 0.5
        return api.prune(str(folder), **(defaults | wishes))

    return run


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: v for f in sorted(folder.glob("*.safetensors")) for n, v in load_file(f).items()}


def weights_of(blocks: Streamed) -> dict[str, Tensor]:
    found = {}
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            for name in block.anatomy.linears:
                found[block.prefix + name] = block.weight(name).clone()
    return found


def masks_of(folder: Path) -> dict[str, Tensor]:
    return MaskFiles(folder).of_block("")


def logits_of(folder: Path, tokens_NT: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return found


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("method", ["wanda", pytest.param("magnitude", marks=pytest.mark.slow)])
def test_a_result_has_exact_zeros_and_is_else_untouched(
    pico: Pico, prune: Prune, streamed: Open, stock: Callable[[Path], Any], model_type: str,
    method: str,
) -> None:  # fmt: skip
    source = pico(model_type, sharded=True)
    report = prune(source, method=method)
    out = report.out
    assert out is not None and report.sparsity == 0.5
    stock(out)  # loads with no missing, unexpected or mismatched key
    before, after = weights_of(streamed(source)), weights_of(streamed(out))
    masks = masks_of(out)
    assert masks.keys() == before.keys()
    for name, keep in masks.items():
        assert torch.equal(after[name], before[name] * keep), name
        removed = (after[name] == 0).sum(1)
        if method == "wanda":
            assert set(removed.tolist()) == {keep.shape[1] // 2}, name
        assert int(removed.sum()) == keep.numel() // 2
    one, two = tensors_of(source), tensors_of(out)
    assert one.keys() == two.keys()
    touched = set(json.loads((out / "llmprune" / "masks.json").read_text())["touched"])
    assert {name for name in one if not same_bits(one[name], two[name])} == touched
    assert all(name.endswith("weight") for name in touched)
    assert (out / "tokenizer.json").exists() and not list(out.parent.glob("out.partial"))


def test_magnitude_ranks_each_matrix(pico: Pico, prune: Prune, streamed: Open) -> None:
    source = pico("gpt2")
    out = prune(source, method="magnitude", sparsity=0.3).out
    assert out is not None
    for name, keep in masks_of(out).items():
        weight = weights_of(streamed(source))[name].abs()
        assert int((~keep).sum()) == round(0.3 * keep.numel())
        assert weight[~keep].max() <= weight[keep].min()


def test_wanda_scores_what_the_pruned_model_computes(
    pico: Pico, prune: Prune, stock: Callable[[Path], Any], tokens: Tensor
) -> None:
    """The masks of block 1 by hand: |W| times the norm of its inputs, block 0 being pruned."""
    source = pico("llama")
    out = prune(source, calib=tokens, num_samples=None, seq_len=None).out
    assert out is not None
    half, dense = stock(out), stock(source)
    half.model.layers[1] = dense.model.layers[1]
    seen: dict[str, Tensor] = {}
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        half.model.layers[1].get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        half(input_ids=tokens)
    for name, x in seen.items():
        weight = dense.model.layers[1].get_submodule(name).weight.detach()
        score = weight.abs() * x.norm(dim=0)
        kept = score.argsort(dim=1).argsort(dim=1) >= weight.shape[1] // 2
        assert torch.equal(masks_of(out)[f"model.layers.1.{name}"], kept), name


def test_2_of_4_keeps_two_of_every_four(pico: Pico, prune: Prune, streamed: Open) -> None:
    out = prune(pico("llama"), pattern="2:4").out
    assert out is not None
    for name, weight in weights_of(streamed(out)).items():
        assert set((weight == 0).view(len(weight), -1, 4).sum(-1).unique().tolist()) == {2}, name


NEIGHBOURS = {
    "random": "magnitude", "wanda-alpha": "wanda", "ria": "wanda", "wanda": "magnitude",
}  # fmt: skip


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize("method", NEIGHBOURS)
@pytest.mark.parametrize("pattern", ["unstructured", "4x8"])
def test_methods_remove_as_much_as_their_neighbours_but_not_the_same(
    pico: Pico, prune: Prune, tokens: Tensor, method: str, pattern: str
) -> None:
    wishes = {"calib": tokens, "num_samples": None, "seq_len": None, "pattern": pattern}
    own = prune(pico("llama"), "own", method=method, **wishes)
    other = prune(pico("llama"), "other", method=NEIGHBOURS[method], **wishes)
    one, two = masks_of(own.out or Path()), masks_of(other.out or Path())
    assert own.sparsity == other.sparsity == 0.5
    assert all(int(one[name].sum()) == int(two[name].sum()) for name in one)
    same = all(torch.equal(one[name], two[name]) for name in one)
    assert same == (method == "wanda-alpha" and pattern == "4x8")


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize("method", ["random", "wanda-alpha", "ria", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "4x8"])
def test_more_sparsity_removes_more_of_the_same(
    pico: Pico, prune: Prune, tokens: Tensor, method: str, pattern: str
) -> None:
    """In the first block; in the second, scores that see activations see other ones."""
    wishes = {"calib": tokens, "num_samples": None, "seq_len": None, "pattern": pattern}
    few, many = (
        masks_of(prune(pico("gpt2"), str(s), method=method, sparsity=s, **wishes).out or Path())
        for s in (0.3, 0.6)
    )
    first = [name for name in few if ".0." in name]
    assert first and not any(bool((many[name] & ~few[name]).any()) for name in first)


@pytest.mark.usefixtures("no_gate")
def test_random_masks_follow_from_the_seed_alone(
    pico: Pico, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pico("mixtral")
    one = masks_of(prune(source, "one", method="random", seed=1).out or Path())
    torch.manual_seed(5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    wishes = {"method": "random", "settings": ["prune.skip=['*q_proj']"]}
    two = masks_of(prune(source, "two", seed=1, **wishes).out or Path())
    other = masks_of(prune(source, "other", method="random", seed=2).out or Path())
    assert two.keys() < one.keys()
    assert all(torch.equal(one[name], keep) for name, keep in two.items())
    assert not any(torch.equal(one[name], keep) for name, keep in other.items())


def test_another_seed_is_another_run_where_masks_are_drawn(pico: Pico, prune: Prune) -> None:
    prune(pico("llama"), method="random", seed=1)
    with pytest.raises(RecipeError, match="seed: 1 then, 2 now"):
        prune(pico("llama"), method="random", seed=2)


@pytest.mark.parametrize("regrow", [False, True])
def test_tiles_after_single_weights_count_what_was_removed_as_nothing(
    pico: Pico, prune: Prune, regrow: bool
) -> None:
    first = prune(pico("llama"), "first", method="magnitude", sparsity=0.4).out
    assert first is not None
    settings = [f"prune.regrow={str(regrow).lower()}"]
    wishes = {"method": "magnitude", "pattern": "4x4", "settings": settings}
    second = prune(first, "second", **wishes)
    assert second.out is not None
    one, two = masks_of(first), masks_of(second.out)
    rows = [row for block in second.data["blocks"] for row in block["sites"]]
    for row in rows:
        keep = two[row["site"]]
        tiles = keep.view(keep.shape[0] // 4, 4, keep.shape[1] // 4, 4).any(3).any(1)
        assert row["removed"] == int((~tiles).sum()) == row["units"] // 2
        assert row["removed_weights"] == int((~keep).sum())
        assert regrow or not bool((keep & ~one[row["site"]]).any())
    assert (second.sparsity == 0.5) == regrow and second.sparsity >= 0.5


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_masked_and_shrunk_channels_compute_the_same(
    pico: Pico, prune: Prune, tokens: Tensor, model_type: str
) -> None:
    source = pico(model_type)
    wishes: dict[str, Any] = {"pattern": "ffn-channels", "sparsity": 0.25}
    shrunk = prune(source, "shrunk", **wishes).out
    masked = prune(source, "masked", settings=["prune.form=masked"], **wishes).out
    assert shrunk is not None and masked is not None
    assert json.loads((shrunk / "config.json").read_text())["intermediate_size"] == 40
    assert tensors_of(shrunk)["model.layers.0.mlp.up_proj.weight"].shape == (40, 32)
    assert tensors_of(masked)["model.layers.0.mlp.up_proj.weight"].shape == (64, 32)
    one, two = logits_of(shrunk, tokens), logits_of(masked, tokens)
    assert (one - two).abs().max() <= 1e-5 * two.abs().max()
    assert (two - logits_of(source, tokens)).abs().max() > 1e-3 * two.abs().max()


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "8x4", "ffn-channels"])
def test_streamed_and_resident_give_identical_bits(
    pico: Pico, prune: Prune, stock: Callable[[Path], Any], tokens: Tensor, model_type: str,
    pattern: str,
) -> None:  # fmt: skip
    if pattern == "ffn-channels" and model_type == "mixtral":
        pytest.skip("no coupling")
    source = pico(model_type)
    sparsity = {"ffn-channels": 0.25, "unstructured": 0.5, "8x4": 0.5}.get(pattern)
    wishes = {"pattern": pattern, "sparsity": sparsity, "calib": tokens}
    out = prune(source, num_samples=None, seq_len=None, **wishes).out
    assert out is not None
    model = stock(source)
    report = api.prune(model, quiet=True, **wishes)
    assert report.out is None
    expected = stock(out)
    assert model.config.to_dict() | {"_name_or_path": 0} == (
        expected.config.to_dict() | {"_name_or_path": 0}
    )
    theirs = expected.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    for name, value in model.state_dict().items():
        assert same_bits(value, theirs[name]), name
    for name, keep in masks_of(out).items():
        assert torch.equal(unpack(report.masks[name], keep.shape), keep)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_a_model_in_memory_keeps_its_switches(
    make_model: Callable[..., Any], tokens: Tensor
) -> None:
    model = make_model("llama").train()
    api.prune(model, sparsity=0.25, pattern="ffn-channels", calib=tokens, quiet=True)
    assert model.training
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.usefixtures("no_gate")
def test_dense_and_pruned_propagation_part_after_block_0(
    pico: Pico, prune: Prune, model_type: str
) -> None:
    pruned = prune(pico(model_type), "pruned").out
    dense = prune(pico(model_type), "dense", settings=["prune.propagate=dense"]).out
    assert pruned is not None and dense is not None
    one, two = masks_of(pruned), masks_of(dense)
    same = {name: torch.equal(one[name], two[name]) for name in one}
    first = {name: equal for name, equal in same.items() if ".0." in name.split("experts")[0]}
    later = {name: equal for name, equal in same.items() if name not in first}
    assert all(first.values()) and first
    assert not all(later.values())


@pytest.mark.usefixtures("no_gate")
def test_micro_batches_do_not_change_the_masks(
    pico: Pico, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(pico("gemma3_text"), "whole").out
    monkeypatch.setattr("llmprune.engine.cost.micro_batch", lambda *args: 3)
    parts = prune(pico("gemma3_text"), "parts").out
    assert whole is not None and parts is not None
    assert json.loads((parts / "llmprune" / "run.json").read_text())["micro_batch"] == 3
    one, two = masks_of(whole), masks_of(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_hidden_states_on_disk_change_nothing_and_leave_nothing(
    pico: Pico, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = prune(pico("llama"), "host").out
    from llmprune.engine import planning

    estimate = planning.estimate

    def on_disk(*args: Any, **kwargs: Any) -> Any:
        from dataclasses import replace

        return replace(estimate(*args, **kwargs), place="disk")

    monkeypatch.setattr(planning, "estimate", on_disk)
    disk = prune(pico("llama"), "disk").out
    assert host is not None and disk is not None
    one, two = tensors_of(host), tensors_of(disk)
    assert all(same_bits(one[name], two[name]) for name in one)
    files = [sorted(p.name for p in (o / "llmprune").rglob("*")) for o in (host, disk)]
    assert files[0] == files[1]


@pytest.fixture
def starved(pico: Pico, tmp_path: Path) -> Path:
    """A mixtral whose router never chooses expert 3 of block 0."""
    folder = tmp_path / "starved"
    shutil.copytree(pico("mixtral"), folder)
    tensors = load_file(folder / SINGLE)
    tensors["model.embed_tokens.weight"][:, 0] = 3.0  # so this column is positive for every token
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    router[:, 0] = 0
    router[3, 0] = -100.0
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_an_expert_without_tokens_falls_back_to_magnitude(
    starved: Path, prune: Prune, streamed: Open
) -> None:
    report = prune(starved)
    rows = {row["site"]: row for block in report.data["blocks"] for row in block["sites"]}
    idle = {f"model.layers.0.mlp.experts.3.{p}_proj" for p in ("gate", "up", "down")}
    first = {name: row for name, row in rows.items() if name.startswith("model.layers.0.")}
    assert {name for name, row in first.items() if row.get("fallback")} == idle
    assert all("magnitude" in rows[name]["fallback"] for name in idle)
    assert all((row["tokens"] == 0) == ("fallback" in row) for row in rows.values())
    assert any("no token reached it" in warning for warning in report.data["warnings"])
    assert report.out is not None
    weights, masks = weights_of(streamed(starved)), masks_of(report.out)
    for name in idle:
        ranks = weights[name].abs().argsort(dim=1).argsort(dim=1)
        assert torch.equal(masks[name], ranks >= weights[name].shape[1] // 2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_pruning_a_result_again(pico: Pico, prune: Prune, model_type: str) -> None:
    first = prune(pico(model_type), "first").out
    assert first is not None
    again = prune(first, "again").out
    more = prune(first, "more", sparsity=0.7).out
    assert again is not None and more is not None
    one, two, three = tensors_of(first), tensors_of(again), tensors_of(more)
    assert all(same_bits(one[name], two[name]) for name in one)
    assert all(torch.equal(masks_of(first)[n], keep) for n, keep in masks_of(again).items())
    for name in one:
        assert bool((three[name][one[name] == 0] == 0).all()), name
    for name, keep in masks_of(more).items():
        assert not bool((keep & ~masks_of(first)[name]).any()), name


@pytest.mark.parametrize("regrow", [False, True])
def test_a_removed_weight_that_training_brought_back_goes_again(
    pico: Pico, prune: Prune, regrow: bool
) -> None:
    """The mask of the first pruning decides, not the value, unless `regrow` is asked for."""
    first = prune(pico("llama"), "first").out
    assert first is not None
    linear = "model.layers.1.mlp.up_proj"
    row, column = (~masks_of(first)[linear]).nonzero()[0].tolist()
    index = json.loads((first / "model.safetensors.index.json").read_text())["weight_map"]
    shard = first / index[f"{linear}.weight"]
    tensors = load_file(shard)
    tensors[f"{linear}.weight"][row, column] = 100.0
    save_file(tensors, shard, metadata={"format": "pt"})
    wishes = {"settings": [f"prune.regrow={str(regrow).lower()}"]}
    again = prune(first, "again", **wishes).out
    assert again is not None
    assert bool(masks_of(again)[linear][row, column]) == regrow
    assert float(tensors_of(again)[f"{linear}.weight"][row, column]) == 100.0 * regrow


def test_what_was_removed_stays_removed_at_a_lower_sparsity(pico: Pico, prune: Prune) -> None:
    """The masks of the second result may not call a weight kept that the first removed."""
    first = prune(pico("llama"), "first").out
    assert first is not None
    less = prune(first, "less", sparsity=0.3).out
    assert less is not None
    for name, keep in masks_of(less).items():
        assert not bool((keep & ~masks_of(first)[name]).any()), name


def test_masks_of_linears_that_are_skipped_later_are_kept(pico: Pico, prune: Prune) -> None:
    first = prune(pico("llama"), "first").out
    assert first is not None
    second = prune(first, "second", sparsity=0.6, settings=["prune.skip=['*self_attn*']"]).out
    assert second is not None
    name = "model.layers.0.self_attn.q_proj"
    assert name in masks_of(second)
    assert torch.equal(masks_of(second)[name], masks_of(first)[name])


@pytest.mark.parametrize("index", [0, 1])
def test_a_whole_block_may_be_skipped(pico: Pico, prune: Prune, index: int) -> None:
    """Leaving the first or the last block dense is common practice."""
    report = prune(pico("llama"), settings=[f"prune.skip=['model.layers.{index}.*']"])
    assert report.out is not None
    one, two = tensors_of(pico("llama")), tensors_of(report.out)
    changed = {name for name in one if not same_bits(one[name], two[name])}
    assert len(changed) == 7 and all(f"layers.{1 - index}." in name for name in changed)


def test_some_experts_may_be_skipped(pico: Pico, prune: Prune) -> None:
    settings = ["prune.skip=['*experts.2.*', '*up_proj']"]
    report = prune(pico("mixtral"), settings=settings)
    assert report.out is not None
    one, two = tensors_of(pico("mixtral")), tensors_of(report.out)
    assert one.keys() == two.keys()
    for name in one:
        skipped = "experts.2." in name or ".w3." in name or name.endswith("gate.weight")
        pruned = not skipped and ("experts" in name or "self_attn" in name)
        assert same_bits(one[name], two[name]) != pruned, name


def test_bfloat16_stays_bfloat16(make_model: Callable[..., Any], prune: Prune, pico: Pico,
                                 tmp_path: Path) -> None:  # fmt: skip
    folder = tmp_path / "half"
    shutil.copytree(pico("mixtral"), folder)
    tensors = {name: value.bfloat16() for name, value in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    out = prune(folder).out
    assert out is not None
    for name, value in tensors_of(out).items():
        keep = value != 0
        assert value.dtype == torch.bfloat16
        assert torch.equal(value[keep], tensors[name][keep]), name


def test_the_same_run_again_has_nothing_to_do_and_another_is_refused(
    pico: Pico, prune: Prune
) -> None:
    out = prune(pico("llama")).out
    assert out is not None
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    prune(pico("llama"))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    with pytest.raises(RecipeError, match=r"sparsity: 0\.5 then, 0\.6 now"):
        prune(pico("llama"), sparsity=0.6)
    prune(pico("llama"), sparsity=0.6, overwrite=True)
    assert Report.read(out).sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_finished_run_is_not_taken_for_one_on_other_tokens(
    pico: Pico, prune: Prune, tokens: Tensor
) -> None:
    out = prune(pico("llama"), calib=tokens, num_samples=None, seq_len=None).out
    assert out is not None
    with pytest.raises(RecipeError):
        prune(pico("llama"), calib=(tokens + 1) % 64, num_samples=None, seq_len=None)


def test_a_finished_run_is_not_taken_for_one_of_another_source(
    pico: Pico, prune: Prune, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    assert prune(folder).out is not None
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(RecipeError):
        prune(folder)


def test_a_weight_that_is_not_finite_leaves_nothing(
    pico: Pico, prune: Prune, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pico("llama"), folder)
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for method in ("magnitude", "wanda"):
        with pytest.raises(NumericalError):
            prune(folder, method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_source_is_never_written(pico: Pico, prune: Prune) -> None:
    folder = pico("llama")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    prune(folder)
    for out in (folder, folder / "inside", folder.parent):
        with pytest.raises(RecipeError, match="never changed"):
            prune(folder, out=out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_row_for_every_site(pico: Pico, prune: Prune) -> None:
    report = prune(pico("llama"), sparsity=0.3)
    rows = [row for block in report.data["blocks"] for row in block["sites"]]
    assert len(rows) == 14
    assert all(row["tokens"] == 8 * 24 for row in rows)
    removed = sum(row["removed_weights"] for row in rows)
    assert report.sparsity == removed / sum(row["weights"] for row in rows)
    assert all(0 < block["error"] < 2 for block in report.data["blocks"])
    assert all(name in report.table() for name in (row["site"] for row in rows))


def test_a_result_of_a_result_names_the_first_model(
    pico: Pico, text_file: Path, tmp_path: Path
) -> None:
    source = pico("llama")
    for number, model in enumerate((source, tmp_path / "out-0")):
        api.prune(
            str(model),
            method="magnitude",
            sparsity=0.2 + 0.2 * number,
            out=tmp_path / f"out-{number}",
            quiet=True,
        )
    run = json.loads((tmp_path / "out-1" / "llmprune" / "run.json").read_text())
    assert run["source"]["name"] == str(tmp_path / "out-0")
    assert run["origin"]["name"] == str(source)


@pytest.mark.parametrize("pattern", ["unstructured", "ffn-channels"])
@pytest.mark.parametrize("stored, computed", [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_kept_weight_keeps_its_bits_in_whatever_dtype_is_computed(
    stored: str, computed: str, pattern: str, make_model: Any, text_file: Path, tmp_path: Path
) -> None:
    model = make_model("llama").to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    api.prune(
        str(tmp_path / "model"),
        method="wanda",
        sparsity=0.3,
        pattern=pattern,
        calib=tokens,
        out=tmp_path / "out",
        quiet=True,
        dtype=computed,
        settings=["evaluate.perplexity=false"],
    )
    before = load_file(tmp_path / "model" / SINGLE)
    after = {
        name: value
        for shard in (tmp_path / "out").glob("*.safetensors")
        for name, value in load_file(shard).items()
    }
    name = "model.layers.1.mlp.down_proj.weight"
    assert after[name].dtype == getattr(torch, stored)
    if pattern == "unstructured":
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])
        assert 0.69 < float(kept.float().mean()) < 0.71
    else:
        columns = {tuple(column.tolist()) for column in before[name].T}
        assert {tuple(column.tolist()) for column in after[name].T} < columns


def test_a_block_observed_in_rounds_gives_the_same_bytes(
    pico: Pico, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prune(pico("mixtral"), "whole").out
    seen: list[set[str]] = []
    observe = cutting.observe

    def count(block: Any, stream: Any, needs: Any, *, dense: bool) -> Any:
        seen.append(set(needs))
        return observe(block, stream, needs, dense=dense)

    estimate = planning.estimate
    monkeypatch.setattr(cutting, "observe", count)
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(estimate(*a, **k), statistics_bytes=600)
    )
    parts = prune(pico("mixtral"), "rounds").out
    assert whole is not None and parts is not None
    assert len(seen) > 2 * 2 and not set.intersection(*seen[: len(seen) // 2])
    assert tensors_of(whole).keys() == tensors_of(parts).keys()
    for name, value in tensors_of(whole).items():
        assert same_bits(value, tensors_of(parts)[name]), name


def test_the_report_vouches_for_every_weight_and_mask_file(pico: Pico, prune: Prune) -> None:
    report = prune(pico("llama"))
    assert report.out is not None
    found = {
        str(path.relative_to(report.out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in report.out.rglob("*.safetensors")
    }
    assert report.data["files"] == found
