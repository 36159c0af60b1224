"""Targets of size, cache and speed, and what parallel devices can share: decided before the cut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import llmprune.steps
from llmprune import api, cli
from llmprune.allocation.units import legal_counts, shareable
from llmprune.arch.types import Site, Span
from llmprune.base.errors import RecipeError
from llmprune.checkpoint.source import Source
from llmprune.engine.pace import crossing, falling
from llmprune.engine.plan import Plan
from llmprune.recipe import build
from llmprune.report.run import Report
from tests.conftest import Clock

Pico = Callable[..., Path]
MakePlan = Callable[..., Plan]
Stock = Callable[[Path], Any]


@pytest.fixture
def make(pico: Pico, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Plan a run on a pico model; reading a weight is an error."""

    def refuse(self: Source, names: object) -> None:
        raise AssertionError(f"the plan read {names}")

    monkeypatch.setattr(Source, "get", refuse)

    def plan(model_type: str = "llama", **wishes: Any) -> Plan:
        units = {"ffn-channels", "heads"} & {*wishes.get("pattern", "").split("+")}
        method = {"method": "wanda"} if units else {}  # whose counts need no survey
        return api.plan(str(pico(model_type)), **(common(text_file) | method | wishes))

    return plan


def common(text_file: Path) -> dict[str, Any]:
    return {"calib": str(text_file), "num_samples": 4, "seq_len": 24, "device": "cpu"}


def kept(plan: Plan) -> dict[str, int]:
    """Return what is left of the first block's units, by kind."""
    counts = plan.counts or {}
    return {s.kind: s.num_units - counts[s.name] for s in plan.sites if s.block == 0}


@pytest.mark.parametrize("share", [0.9, 0.8, 0.65])
@pytest.mark.parametrize("key", ["params", "size"])
def test_a_size_is_met_with_no_channel_more_than_needed(
    make: MakePlan, key: str, share: float
) -> None:
    plan = make(pattern="ffn-channels", target={key: f"{share}x"}, settings=["prune.multiple=1"])
    assert plan.shipment is not None
    most = share * plan.num_params
    one_more = 2 * 3 * 32  # a channel of both blocks: rows of gate and up, a column of down
    assert most - one_more < plan.shipment.num_params <= most
    assert f"{key} {share}x: at most {math.floor(most) * (4 if key == 'size' else 1):,}" in repr(
        plan
    )


def test_a_size_with_a_unit_is_that_many_bytes(make: MakePlan) -> None:
    plan = make(pattern="ffn-channels", target={"size": "60KB"})
    assert plan.shipment is not None
    assert 0.9 * 60_000 < 4 * plan.shipment.num_params <= 60_000


@pytest.mark.usefixtures("quick_gate")
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_half_a_cache_is_half_of_what_a_loaded_model_caches(
    pico: Pico, text_file: Path, tmp_path: Path, stock: Stock, model_type: str
) -> None:
    report = api.prune(
        str(pico(model_type)), pattern="heads", target={"kv": "0.5x"}, out=tmp_path / "out",
        quiet=True, settings=["evaluate.perplexity=false"], **common(text_file),
    )  # fmt: skip
    before, after = (cached(stock(folder)) for folder in (pico(model_type), tmp_path / "out"))
    assert report.data["sizes"]["kv"] == {"before": before, "after": after}
    assert 2 * after == before
    assert report.data["reached"]["most"] == report.data["reached"]["reached"] == after
    assert f"{before:,} values of key and value per token before, {after:,} after" in str(report)
    assert "kv 0.5x: at most" in str(Report.read(tmp_path / "out"))


def cached(model: Any) -> int:
    """Return the numbers that one token leaves in the cache of a model."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([[3]]), use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_of_other_units_a_cache_takes_nothing(make: MakePlan) -> None:
    plan = make(pattern="ffn-channels+heads", target={"kv": "0.5x"})
    assert kept(plan) == {"ffn-channels": 64, "heads": 1}
    assert "without keys and values, and so left as it is: ffn-channels" in repr(plan)


@pytest.mark.usefixtures("quick_gate")
def test_whole_halves_free_their_cache(pico: Pico, text_file: Path, tmp_path: Path) -> None:
    report = api.prune(
        str(pico("llama")), pattern="sublayers", method="finercut", target={"kv": "0.5x"},
        out=tmp_path / "out", quiet=True, settings=["evaluate.perplexity=false"],
        **common(text_file),
    )  # fmt: skip
    assert report.data["layout"]["without"].count(["attention"]) == 1
    assert ["ffn"] not in report.data["layout"]["without"]
    assert report.data["sizes"]["kv"] == {"before": 64, "after": 32}


REFUSED = [
    ("ffn-channels", {"kv": "0.5x"}, "ffn-channels frees nothing of it.*Type --pattern heads"),
    ("query-heads", {"kv": "0.5x"}, "query heads share those of their group"),
    ("ffn-channels", {"params": "1"}, r"params=1 is 1 parameters, but [\d,]+ stay.*can be asked"),
    ("blocks", {"params": "1"}, r"stay, which are outside of blocks or the last of them"),
    ("ffn-channels", {"params": "1B"}, r"1,000,000,000 parameters, and the model has [\d,]+ alr"),
]


@pytest.mark.parametrize(("pattern", "target", "words"), REFUSED)
def test_what_cannot_be_reached_is_refused_with_what_can(
    make: MakePlan, pattern: str, target: dict[str, str], words: str
) -> None:
    method = {"method": "finercut"} if pattern == "blocks" else {}
    with pytest.raises(RecipeError, match=words):
        make(pattern=pattern, target=target, **method)


def test_the_range_that_is_named_can_be_asked_for(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"Between ([\d,]+) and") as caught:
        make(pattern="ffn-channels", target={"params": "1"})
    least = str(caught.value).split("Between ")[1].split(" and")[0].replace(",", "")
    plan = make(pattern="ffn-channels", target={"params": least})
    assert plan.shipment is not None and plan.shipment.num_params == int(least)
    with pytest.raises(RecipeError, match="can be asked for"):
        make(pattern="ffn-channels", target={"params": str(int(least) - 1)})


def test_zeros_keep_the_size_and_sparsity_is_the_most(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match="masked keeps every tensor's shape"):
        make(pattern="heads", target={"kv": "0.5x"}, settings=["prune.form=masked"])
    with pytest.raises(RecipeError, match=r"sparsity 0\.1 is the most that may go"):
        make(pattern="ffn-channels", target={"params": "0.7x"}, sparsity=0.1)


# Latency, on a clock that follows from sizes


def ratio(clock: Clock, plan: Plan) -> float:
    """Return what a token of the result takes, as a share of the dense model's time."""
    assert plan.shipment is not None
    config = plan.shipment.skeleton.config
    sizes = {key: getattr(config, key) for key in ("intermediate_size", "num_attention_heads")}
    heads = sizes["num_attention_heads"] / 4
    after = clock.fixed + clock.ffn * sizes["intermediate_size"] / 64 + clock.heads * heads
    before = clock.fixed + clock.ffn + clock.heads
    num_blocks = config.num_hidden_layers
    return (clock.trunk + num_blocks * after) / (clock.trunk + 2 * before)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6])
def test_a_latency_is_met_with_no_channel_more_than_needed(
    make: MakePlan, clock: Clock, share: float
) -> None:
    wish = {"target": {"latency": f"{share}x"}, "settings": ["prune.multiple=1"]}
    plan = make(pattern="ffn-channels", **wish)
    # 22 for a dense token, of which 12 are not the channels'
    assert kept(plan)["ffn-channels"] == math.floor(64 * (22 * share - 12) / 10)
    assert ratio(clock, plan) <= share
    assert clock.measured[-1] == plan.config_changes
    assert "measured on cpu in float32, 1 sequence, 63 tokens before it" in repr(plan)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6])
def test_a_latency_is_met_by_several_kinds(make: MakePlan, clock: Clock, share: float) -> None:
    wish = {"target": {"latency": f"{share}x"}, "settings": ["prune.multiple=1"]}
    plan = make(pattern="ffn-channels+heads", **wish)
    assert share - 0.12 < ratio(clock, plan) <= share
    assert plan.budget.facts["expected"] == pytest.approx(22 * ratio(clock, plan))


def test_what_is_slower_than_expected_loses_more(make: MakePlan, clock: Clock) -> None:
    def steps(config: Any, sizes: Any) -> float:  # a width is as slow as the next multiple of 16
        wide = sizes.get("intermediate_size", 64)
        return 1.0 + 9.0 * math.ceil(wide / 16) / 4

    clock.block = steps  # type: ignore[method-assign]
    plan = make(pattern="ffn-channels", target={"latency": "0.7x"}, settings=["prune.multiple=1"])
    wide = kept(plan)["ffn-channels"]
    assert (2 + 2 * steps(None, {"intermediate_size": wide})) / 22 <= 0.7
    assert 16 < wide <= 32
    assert plan.budget.facts["expected"] <= 0.7 * plan.budget.facts["dense"]


def test_a_number_of_blocks_follows_from_a_latency(source_plan: MakePlan, clock: Clock) -> None:
    plan = source_plan(target={"latency": "0.7x"}, pattern="blocks", method="finercut")
    block = next(site.unit_cost for site in plan.sites)
    assert plan.asked == 2 * block  # (2 + 20) of (2 + 40): one less would be 0.76
    assert plan.budget.facts["expected"] == 22
    with pytest.raises(
        RecipeError, match=r"29% are left with one block left. Ask for --target lat"
    ):
        source_plan(target={"latency": "0.2x"}, pattern="blocks", method="finercut")


@pytest.fixture
def source_plan(tmp_path: Path, tokenizer: Any, text_file: Path) -> MakePlan:
    """Plan a run on a llama of four blocks."""
    from tests.story.conftest import small_llama

    folder = small_llama(tmp_path / "four", tokenizer, dtype=torch.float32)
    return lambda **wishes: api.plan(str(folder), **(common(text_file) | wishes))


def test_what_latency_cannot_tell_is_refused(make: MakePlan, clock: Clock) -> None:
    wish = {"target": {"latency": "0.7x"}}
    with pytest.raises(RecipeError, match=r"which parts of sublayers go.*--pattern blocks"):
        make(pattern="sublayers", method="finercut", **wish)
    with pytest.raises(RecipeError, match="allocation standardised gives blocks sizes"):
        make(pattern="ffn-channels", method="flap", **wish)
    with pytest.raises(RecipeError, match=r"latency=0.2x cannot be reached.*Ask for --target lat"):
        make(pattern="ffn-channels", target={"latency": "0.2x"})
    with pytest.raises(RecipeError, match="latency_batch: 0 is no whole number above 0"):
        make(pattern="ffn-channels", settings=["prune.options.latency_batch=0"], **wish)
    with pytest.raises(RecipeError, match="no part of this run takes 'latency_batch'"):
        make(pattern="ffn-channels", sparsity=0.2, settings=["prune.options.latency_batch=2"])


def test_a_latency_is_measured_as_the_recipe_says(
    make: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmprune.engine import pace

    asked: list[dict[str, Any]] = []

    def table(config: Any, sizes: Any, **how: Any) -> list[float]:
        asked.append(how)
        return [each.get("intermediate_size", 64) / 64 for each in sizes]

    monkeypatch.setattr(pace, "latency_table", table)
    monkeypatch.setattr(pace, "trunk_latency", lambda config, **how: asked.append(how) or 0.1)
    settings = ["prune.options.latency_batch=4", "prune.options.latency_prompt=20"]
    make(pattern="ffn-channels", target={"latency": "0.7x"}, settings=settings)
    assert asked and all((how["batch"], how["prompt"]) == (4, 20) for how in asked)


def test_real_blocks_are_measured(make: MakePlan) -> None:
    plan = make(pattern="blocks", method="finercut", target={"latency": "0.99x"})
    facts = plan.budget.facts
    assert 0 < facts["trunk"] < facts["expected"] < facts["dense"]
    assert plan.asked == next(site.unit_cost for site in plan.sites)  # one of two blocks


@pytest.mark.usefixtures("quick_gate")
def test_a_resumed_run_obeys_what_was_measured_first(
    pico: Pico, text_file: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = common(text_file) | {
        "pattern": "ffn-channels", "target": {"latency": "0.7x"}, "out": tmp_path / "out",
        "settings": ["evaluate.perplexity=false", "prune.multiple=1"],
    }  # fmt: skip
    first = api.plan(str(pico("llama")), **wish)

    def stop(*args: Any, **rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llmprune.steps, "complete", stop)
        api.run(first, quiet=True)
    clock.ffn = 20.0  # now fewer channels would do
    assert kept(api.plan(str(pico("llama")), **wish)) != kept(first)
    api.prune(str(pico("llama")), quiet=True, **wish)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["intermediate_size"] == kept(first)["ffn-channels"]
    again = api.prune(str(pico("llama")), quiet=True, **wish)
    assert again.data["reached"]["dense"] == first.budget.facts["dense"]


@pytest.mark.usefixtures("quick_gate")
def test_a_plan_is_run_with_what_it_has_measured(
    pico: Pico, text_file: Path, tmp_path: Path, clock: Clock
) -> None:
    plan = api.plan(
        str(pico("llama")), pattern="ffn-channels", target={"latency": "0.7x"},
        out=tmp_path / "out", settings=["evaluate.perplexity=false"], **common(text_file),
    )  # fmt: skip
    clock.ffn = 20.0
    report = api.run(plan, quiet=True)
    shard = load_file(tmp_path / "out" / "model-00001-of-00003.safetensors")
    down = shard["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (32, kept(plan)["ffn-channels"])
    facts = plan.budget.facts
    share = facts["expected"] / facts["dense"]
    assert f"{1000 * facts['expected']:.3g} ms expected ({share:.3f}x)" in str(report)


@given(st.dictionaries(st.integers(0, 99), st.floats(0.1, 2), min_size=1, max_size=8))
def test_times_are_made_to_fall(ratios: dict[int, float]) -> None:
    found = falling(ratios)
    values = list(found.values())
    assert list(found) == sorted(ratios)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    assert sum(values) == pytest.approx(sum(ratios.values()))
    for share in (0.5, 1.0):
        if values[-1] <= share:
            assert (
                min(found)
                <= crossing(found, share)
                <= min(k for k, v in found.items() if v <= share)
            )


# Parallel devices and multiples


def heads(num_groups: int, per_group: int) -> Site:
    spans = (
        Span(linear="q", axis="out", width=8 * per_group),
        Span(linear="k", axis="out", width=8),
        Span(linear="v", axis="out", width=8),
        Span(linear="o", axis="in", width=8 * per_group),
    )
    return Site(name="h", block=0, spans=spans, num_units=num_groups, unit_cost=1, kind="heads")


@given(st.integers(1, 16), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 4, 8]))
def test_legal_heads_are_those_that_devices_can_share(groups: int, each: int, devices: int) -> None:
    counts = legal_counts(heads(groups, each), None, devices)
    expected = [
        gone for gone in range(groups)
        if (groups - gone) * each % devices == 0
        and ((groups - gone) % devices == 0 or devices % (groups - gone) == 0)
    ]  # fmt: skip
    assert counts == expected


def test_channels_of_a_device_are_a_multiple(make: MakePlan) -> None:
    wish = {"pattern": "ffn-channels", "sparsity": 0.3}
    plan = make(settings=["prune.parallel=4", "prune.multiple=6"], **wish)
    assert kept(plan) == {"ffn-channels": 24}  # of 24 and 48 the one with at least 0.3 gone
    assert shareable(4, 2, 4)


def test_heads_and_channels_that_are_kept_are_shared(make: MakePlan) -> None:
    wish = {"pattern": "ffn-channels+heads", "sparsity": 0.4}
    plan = make(settings=["prune.parallel=2", "prune.multiple=1"], **wish)
    assert kept(plan)["ffn-channels"] % 2 == 0 and kept(plan)["heads"] in (1, 2)


WRONG_WIDTHS = [
    (["prune.multiple=128"], "multiple: 128 is more than the 64 ffn-channels.*prune.multiple=4"),
    (["prune.multiple=64"], "multiple: 64 leaves no width below the 64 ffn-channels.*At most 32"),
    (["prune.parallel=3"], "parallel: 3 devices cannot share the 4 query heads and 2 key/value"),
    (["prune.parallel=2", "prune.multiple=48"], "48 on each of 2 devices is more than the 64"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_WIDTHS)
def test_widths_that_do_not_fit_are_refused(
    make: MakePlan, settings: list[str], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        make(pattern="ffn-channels", sparsity=0.25, settings=settings)


def test_heads_that_cannot_be_shared_are_refused(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match="no number of heads below 2 can be shared by 8 devices"):
        make(pattern="heads", sparsity=0.25, settings=["prune.parallel=8"])


def test_a_multiple_without_channels_is_told(make: MakePlan) -> None:
    plan = make(pattern="heads", sparsity=0.1, settings=["prune.multiple=8"])
    assert "multiple 8 changes nothing: it is for channels" in repr(plan)


# The command line


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("latency=2x", "'2x' is not below what the model has"),
        ("kv=0", "'0' leaves nothing"),
        ("size=4", "'4' has no unit that is known here: x, KB, MB, GB"),
        ("params=much", "'much' is no number with a unit"),
        ("latency=20ms", "'20ms' is no share of what the model has"),
        ("speed=2x", "is no target. Give one: ppl"),
    ],
)
def test_a_wrong_target_says_what_to_type(
    capsys: pytest.CaptureFixture[str], target: str, words: str
) -> None:
    wish = ["--model", "demo", "--pattern", "heads", "--target", target]
    with pytest.raises(SystemExit) as left:
        cli.main(wish)
    told = capsys.readouterr().err
    assert left.value.code == 2 and words in told and "Type" in told


@pytest.mark.usefixtures("quick_gate")
def test_the_first_line_of_a_run_says_what_is_asked_and_reached(
    pico: Pico, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wish = ["--model", pico("llama"), "--pattern", "ffn-channels", "--target", "params=0.8x"]
    wish += ["--calib", text_file, "--num-samples", 4, "--seq-len", 24, "--no-eval"]
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in (*wish, "--device", "cpu", "--out", tmp_path / "out")])
    out, err = capsys.readouterr()
    assert left.value.code == 0
    assert "params 0.8x: at most" in next(
        line for line in (out + err).splitlines() if "writing" in line
    )


def test_a_pattern_of_zeros_has_no_target_of_size() -> None:
    step = {"pattern": "unstructured", "target": {"params": "0.8x"}}
    with pytest.raises(RecipeError, match="changes only where tensors get smaller"):
        build({"model": "org/name", "steps": [{"prune": step}]})
