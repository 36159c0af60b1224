"""The survey: counts of one ranking over the whole model, known before the first cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmprune import api
from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.evidence import share_of_lowest
from llmprune.allocation.threshold import BYTES_PER_BIN, TYPICAL_BINS, histogram
from llmprune.allocation.types import Allocation, Profile, Request
from llmprune.base.errors import CheckpointError, NumericalError, RecipeError
from llmprune.checkpoint.source import SINGLE, Source
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import survey as surveying
from llmprune.engine.cost import Survey
from llmprune.engine.solving import Cutter
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from llmprune.stats.types import Stats
from llmprune.walk.streamed import Streamed
from tests.reference import formulas
from tests.reference.selection import counts_of_lowest

Pico = Callable[..., Path]
Prune = Callable[..., Report]
Open = Callable[..., Streamed]

pytestmark = pytest.mark.usefixtures("no_gate")


@pytest.fixture
def prune(tmp_path: Path) -> Prune:
    """Prune a folder into `tmp_path / out` by magnitudes of the whole model."""

    def run(folder: Path, out: str = "out", **wishes: Any) -> Report:
        defaults: dict[str, Any] = {
            "out": tmp_path / out, "method": "magnitude-global", "sparsity": 0.5,
            "device": "cpu", "quiet": True,
        }  # fmt: skip
        return api.prune(str(folder), **(defaults | wishes))

    return run


def weights_of(blocks: Streamed) -> dict[str, Tensor]:
    found = {}
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            for tap in block.anatomy.taps:
                for name in tap.readers:
                    found[block.prefix + name] = block.weight(name).clone()
    return found


def removed(report: Report) -> dict[str, int]:
    return {
        row["site"]: row["removed"] for block in report.data["blocks"] for row in block["sites"]
    }


def masks_of(folder: Path | None) -> dict[str, Tensor]:
    assert folder is not None
    return MaskFiles(folder).of_block("")


def halved(folder: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Copy a checkpoint in another dtype."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name != SINGLE:
            (target / path.name).write_bytes(path.read_bytes())
    tensors = {name: value.to(dtype) for name, value in load_file(folder / SINGLE).items()}
    save_file(tensors, target / SINGLE, metadata={"format": "pt"})
    return target


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the walks of every survey."""
    seen: list[str] = []
    visit = surveying._visit

    def watched(*args: Any) -> Iterator[Any]:
        seen.append(args[3])
        return visit(*args)

    monkeypatch.setattr(surveying, "_visit", watched)
    return seen


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_the_smallest_weights_of_the_whole_model_go(
    pico: Pico, prune: Prune, streamed: Open, model_type: str, sparsity: float
) -> None:
    report = prune(pico(model_type), sparsity=sparsity, settings=["prune.min_keep=0"])
    weights, masks = weights_of(streamed(pico(model_type))), masks_of(report.out)
    assert masks.keys() == weights.keys()
    total = sum(weight.numel() for weight in weights.values())
    assert sum(int((~keep).sum()) for keep in masks.values()) == round(sparsity * total)
    kept = min(float(weights[name].abs()[keep].min()) for name, keep in masks.items())
    gone = max(float(weights[name].abs()[~keep].max()) for name, keep in masks.items())
    assert gone <= kept


@pytest.mark.parametrize("method", ["magnitude-global", "lamp"])
def test_counts_are_those_of_one_long_list(
    pico: Pico, prune: Prune, streamed: Open, method: str
) -> None:
    report = prune(pico("llama"), method=method, settings=["prune.min_keep=0.4"])
    scores: dict[str, list[float]] = {}
    for name, weight in weights_of(streamed(pico("llama"))).items():
        plain = weight.abs().flatten().tolist()
        relative = formulas.layer_adaptive(plain) if method == "lamp" else plain
        scores[name] = torch.tensor(relative, dtype=torch.float32).tolist()
    safe = {name: -(-len(values) * 2 // 5) for name, values in scores.items()}
    total = sum(map(len, scores.values()))
    assert removed(report) == counts_of_lowest(scores, total // 2, safe)


def test_the_allocations_differ(pico: Pico, prune: Prune) -> None:
    found = [
        removed(prune(pico("llama"), name, method=name))
        for name in ("magnitude", "magnitude-global", "lamp")
    ]
    assert len({tuple(counts.values()) for counts in found}) == 3
    assert len({sum(counts.values()) for counts in found}) == 1


def test_a_floor_keeps_a_linear_of_small_weights(pico: Pico, prune: Prune, tmp_path: Path) -> None:
    folder = halved(pico("llama"), tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.weight"] *= 1e-3
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    size = tensors[f"{name}.weight"].numel()
    assert removed(prune(folder, "a"))[name] == size - -(-size // 20)
    assert removed(prune(folder, "b", settings=["prune.min_keep=0"]))[name] == size - 1
    assert removed(prune(folder, "c", method="lamp"))[name] < 0.7 * size


def test_masks_are_nested_when_more_is_asked(pico: Pico, prune: Prune) -> None:
    few, many = (masks_of(prune(pico("llama"), str(s), sparsity=s).out) for s in (0.4, 0.6))
    assert not any(bool((many[name] & ~few[name]).any()) for name in few)


@pytest.mark.parametrize(
    ("stored", "wishes", "num_looks"),
    [
        (torch.bfloat16, {}, 1),
        (torch.bfloat16, {"method": "lamp"}, 2),
        (torch.bfloat16, {"pattern": "4x4"}, 2),
        (torch.float16, {}, 2),
        (torch.float32, {}, 2),
    ],
)
def test_all_weights_are_read_as_often_as_the_plan_says(
    stored: torch.dtype, wishes: dict[str, Any], num_looks: int,
    pico: Pico, prune: Prune, tmp_path: Path, names: list[str],
) -> None:  # fmt: skip
    """Once where magnitudes fill the bins of the first look, which bfloat16 does."""
    folder = halved(pico("llama"), tmp_path / "model", stored)
    wishes = {"method": "magnitude-global", "sparsity": 0.5} | wishes
    assert api.plan(str(folder), **wishes).estimate.num_reads == 1 + num_looks
    prune(folder, **wishes)
    assert names == ["survey", "second look"][:num_looks]


@pytest.mark.parametrize("method", ["magnitude-global", "lamp", "random"])
def test_a_model_in_memory_gets_the_same_masks(
    pico: Pico, prune: Prune, stock: Callable[[Path], Any], model_type: str, method: str
) -> None:
    out = prune(pico(model_type), method=method).out
    report = api.prune(stock(pico(model_type)), method=method, sparsity=0.5, quiet=True)
    for name, keep in masks_of(out).items():
        assert torch.equal(unpack(report.masks[name], keep.shape), keep), name


@pytest.mark.parametrize("pattern", ["4x4", "2x8"])
def test_tiles_of_the_whole_model_are_ranked_by_their_norm(
    pico: Pico, prune: Prune, streamed: Open, pattern: str
) -> None:
    settings = ["prune.min_keep=0"]
    report = prune(pico("llama"), pattern=pattern, settings=settings)
    height, width = map(int, pattern.split("x"))
    gone, kept = 0.0, float("inf")
    for name, weight in weights_of(streamed(pico("llama"))).items():
        keep = masks_of(report.out)[name]
        for row in range(0, weight.shape[0], height):
            for column in range(0, weight.shape[1], width):
                place = slice(row, row + height), slice(column, column + width)
                norm = float(weight[place].double().norm())
                assert keep[place].all() or not keep[place].any()
                gone = max(gone, 0 if keep[place].all() else norm)
                kept = min(kept, norm if keep[place].all() else kept)
    assert gone <= kept * (1 + 1e-6)
    total = sum(keep.numel() for keep in masks_of(report.out).values())
    assert report.sparsity * total == pytest.approx(total / 2, abs=height * width)


def test_what_an_earlier_pruning_removed_counts_as_removed_first(pico: Pico, prune: Prune) -> None:
    first = prune(pico("llama"), "first", method="magnitude", sparsity=0.4).out
    second = prune(first or Path(), "second", sparsity=0.5)
    one, two = masks_of(first), masks_of(second.out)
    assert not any(bool((two[name] & ~one[name]).any()) for name in one)
    total = sum(keep.numel() for keep in two.values())
    assert sum(int((~keep).sum()) for keep in two.values()) == total // 2
    again = prune(first or Path(), "again", sparsity=0.2)
    assert all(torch.equal(keep, one[name]) for name, keep in masks_of(again.out).items())


class Stop(RuntimeError):
    """A fault in the middle of a run."""


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int) -> None:
    original, calls = getattr(owner, name), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def test_a_resumed_run_takes_the_counts_of_its_first_survey(
    pico: Pico, prune: Prune, tmp_path: Path, names: list[str]
) -> None:
    whole = prune(pico("llama"), "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Cutter, "cut", 6)
        with pytest.raises(Stop):
            prune(pico("llama"))
    content = json.loads((tmp_path / "out.partial/llmprune/allocation.json").read_text())
    assert content["allocation"] == "global" and content["removed"] == removed(whole)
    names.clear()
    resumed = prune(pico("llama"))
    assert names == [] and resumed.data["resumed_after"] == 0
    for path in sorted(tmp_path.glob("whole/**/*.safetensors")):
        other = tmp_path / "out" / path.relative_to(tmp_path / "whole")
        assert other.read_bytes() == path.read_bytes()


def test_a_survey_that_was_cut_short_runs_again(
    pico: Pico, prune: Prune, tmp_path: Path, names: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, surveying, "histogram", 9)
        with pytest.raises(Stop):
            prune(pico("llama"))
    assert not (tmp_path / "out.partial/llmprune/allocation.json").exists()
    names.clear()
    assert removed(prune(pico("llama"))) == removed(prune(pico("llama"), "whole"))
    assert names.count("survey") == 2


def test_a_record_of_other_linears_is_refused(pico: Pico, prune: Prune, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, Cutter, "cut", 1)
        with pytest.raises(Stop):
            prune(pico("llama"))
    path = tmp_path / "out.partial/llmprune/allocation.json"
    path.write_text('{"removed": {"model.layers.0.mlp.up_proj": 3}}')
    with pytest.raises(CheckpointError, match="--overwrite"):
        prune(pico("llama"))
    assert prune(pico("llama"), overwrite=True).sparsity == 0.5


def test_a_weight_that_is_not_finite_is_named_and_leaves_nothing(
    pico: Pico, prune: Prune, tmp_path: Path
) -> None:
    folder = halved(pico("llama"), tmp_path / "model")
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj"):
        prune(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_that_awaits_a_survey_says_so_and_reads_nothing(
    pico: Pico, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Source, names: object) -> None:
        raise AssertionError(f"the plan read {names}")

    monkeypatch.setattr(Source, "get", refuse)
    folder = str(pico("llama"))
    plan = api.plan(folder, method="lamp", sparsity=0.5, out="x")
    assert plan.counts is None and not plan.forward and plan.sparsity == 0.5
    text = repr(plan)
    for words in ("counts follow from a survey of all weights", "2 to survey", "at most 3 times"):
        assert words in text
    plain = api.plan(folder, method="magnitude", sparsity=0.5, out="x").estimate
    assert plan.estimate.read_bytes == 3 * plain.read_bytes
    assert plan.estimate.survey_seconds > plain.survey_seconds == 0


def test_a_histogram_is_as_small_as_the_estimate_says() -> None:
    weight = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    found = histogram(weight.abs())
    assert 0.7 * TYPICAL_BINS < len(found.bins_B) < TYPICAL_BINS
    held = found.bins_B.nbytes + found.counts_B.nbytes
    assert held == len(found.bins_B) * BYTES_PER_BIN
    thousands = Survey(num_reads=1, num_linears=10_000, forward=False)
    assert thousands.held_bytes < 250e6


def test_the_floor_bounds_what_can_be_asked(pico: Pico) -> None:
    folder = str(pico("llama"))
    with pytest.raises(RecipeError, match=r"0\.97 cannot be removed\. At most 0\.949.*min_keep"):
        api.plan(folder, method="magnitude-global", sparsity=0.97)
    settings = ["prune.min_keep=0.01"]
    plan = api.plan(folder, method="magnitude-global", sparsity=0.97, settings=settings)
    assert plan.counts is None


# Profiles that need tokens.


def energy(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return the mean squared input of a linear."""
    return stats["col_sq"].mean()[None] / stats.num_tokens


def busier_keep_more(request: Request) -> dict[str, Fraction]:
    """Remove 0.6 of the half of the sites that read least, 0.4 of the others."""
    order = sorted(request.sites, key=lambda site: float(request.profiles[site.name]))
    low = {site.name for site in order[: len(order) // 2]}
    return {
        site.name: request.target + Fraction(1, 10) * (1 if site.name in low else -1)
        for site in request.sites
    }


def loaded(weight_OI: Tensor, stats: Stats, keep_OI: Tensor | None) -> Tensor:
    """Return the magnitudes times the norm of all inputs of the linear."""
    return weight_OI.abs().float() * float(stats["col_sq"].sum().sqrt())


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add two allocations whose profiles need activations, a summary and a ranking."""
    for name, allocation in {
        "summary": Allocation(
            fn=busier_keep_more,
            needs=("profile",),
            profile=Profile(fn=energy, needs=("col_sq",)),
            paper="none",
        ),
        "ranking": Allocation(
            fn=share_of_lowest,
            needs=("profile",),
            profile=Profile(fn=loaded, needs=("col_sq",), ranked=True),
            paper="none",
        ),
    }.items():
        monkeypatch.setitem(ALLOCATIONS, name, allocation)


def dense_inputs(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the sum of squares of what each linear reads in the dense model."""
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0].double().pow(2).sum()})
            )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("allocation", "method"),
    [("summary", "magnitude"), ("summary", "wanda"), ("ranking", "magnitude")],
)
def test_a_profile_may_need_the_activations_of_the_dense_model(
    pico: Pico, prune: Prune, stock: Callable[[Path], Any], tokens: Tensor, allocation: str,
    method: str,
) -> None:  # fmt: skip
    """Without tokens in the cut, or with: each walk begins with fresh hidden states."""
    wishes = {"calib": tokens, "settings": [f"prune.allocation={allocation}"], "method": method}
    report = prune(pico("llama"), dtype="float32", **wishes)
    counts, model = removed(report), stock(pico("llama"))
    power = dense_inputs(model, tokens)
    sizes = {name: model.get_submodule(name).weight.numel() for name in counts}
    if allocation == "summary":
        width = {name: model.get_submodule(name).in_features for name in counts}
        order = sorted(counts, key=lambda name: float(power[name]) / width[name])
        shares = [counts[name] / sizes[name] for name in order]
        assert shares[:7] == pytest.approx([0.6] * 7, abs=0.1)
        assert max(shares[7:]) < min(shares[:7])
    else:
        scores = {
            name: (model.get_submodule(name).weight.abs() * power[name].sqrt().float()).flatten()
            for name in counts
        }
        threshold = torch.cat(list(scores.values())).sort().values[sum(sizes.values()) // 2]
        for name, score in scores.items():
            assert abs(int((score < threshold).sum()) - counts[name]) <= 2
    assert abs(report.sparsity - 0.5) < 1e-3
    resident = api.prune(stock(pico("llama")), sparsity=0.5, quiet=True, **wishes)
    for name, keep in masks_of(report.out).items():
        assert torch.equal(unpack(resident.masks[name], keep.shape), keep), name
