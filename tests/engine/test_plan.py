"""The plan: exact counts, refusals before any weight is read, and the table of --dry-run."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import api
from llmprune.base.errors import RecipeError, TooLarge, UnknownName, WontLoad
from llmprune.checkpoint.source import Source
from llmprune.engine.cost import ACTIVATIONS, DEVICE_TOKENS, Shape, micro_batch
from llmprune.engine.plan import Plan

Pico = Callable[..., Path]
MakePlan = Callable[..., Plan]


@pytest.fixture
def make(pico: Pico, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlan:
    """Plan a run on a pico model; reading a weight is an error."""

    def refuse(self: Source, names: object) -> None:
        raise AssertionError(f"the plan read {names}")

    monkeypatch.setattr(Source, "get", refuse)

    def plan(model_type: str = "llama", **wishes: Any) -> Plan:
        defaults: dict[str, Any] = {
            "num_samples": 8, "seq_len": 24, "calib": str(text_file), "device": "cpu",
        }  # fmt: skip
        if ":" not in wishes.get("pattern", "unstructured"):
            defaults["sparsity"] = 0.5
        if "ffn-channels" in wishes.get("pattern", "") or "heads" in wishes.get("pattern", ""):
            defaults["method"] = "wanda"  # whose counts need no survey
        return api.plan(str(pico(model_type)), **(defaults | wishes))

    return plan


@pytest.mark.parametrize("sparsity", [0.3, 0.29, 0.5, 0.777])
def test_every_linear_loses_its_exact_share(
    make: MakePlan, model_type: str, sparsity: float
) -> None:
    plan = make(model_type, sparsity=sparsity)
    share = Fraction(str(sparsity))
    for site in plan.sites:
        assert plan.counts[site.name] == math.floor(site.num_units * share + Fraction(1, 2))
    assert plan.counts.keys() == {site.name for site in plan.sites}
    assert abs(plan.sparsity - sparsity) < 1e-3


def test_nothing_may_be_removed(make: MakePlan) -> None:
    assert set(make(sparsity=0.0).counts.values()) == {0}


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.75)])
def test_n_of_m_fixes_the_share(make: MakePlan, pattern: str, share: float) -> None:
    plan = make(pattern=pattern)
    assert all(plan.counts[site.name] == site.num_units * share for site in plan.sites)
    assert plan.sparsity == share and plan.form == "masked"


def test_n_of_m_that_does_not_divide_says_what_to_type(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"3:5 needs widths that 5 divides.*32 columns.*--set"):
        make(pattern="3:5")


def test_skipped_linears_keep_everything(make: MakePlan) -> None:
    plan = make(settings=["prune.skip=['*down_proj', 'model.layers.1.self_attn.*']"])
    names = {site.name for site in plan.sites}
    assert len(names) == 14 - 2 - 4
    assert not any(name.endswith("down_proj") for name in names)
    assert not any(name.startswith("model.layers.1.self_attn") for name in names)
    row = next(row for row in plan.skipped if row.reason == "prune.skip")
    assert row.num_params == 2 * 32 * 64 + (2 * 32 * 32 + 2 * 16 * 32)
    assert plan.eligible == sum(site.num_weights for site in plan.sites)


def test_a_skip_may_name_a_linear_relative_to_its_block(make: MakePlan) -> None:
    plan = make(settings=["prune.skip=['mlp.up_proj']"])
    assert not any("up_proj" in site.name for site in plan.sites)


def test_skipping_everything_is_refused(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match="leaves nothing to prune"):
        make(settings=["prune.skip=['*']"])


def test_every_parameter_is_pruned_or_accounted_for(make: MakePlan, model_type: str) -> None:
    wishes: list[dict[str, Any]] = [
        {},
        {"settings": ["prune.skip=['*attn*', '*.0.mlp.*']"]},
    ]
    if model_type in ("llama", "qwen3", "gemma3_text"):
        wishes.append({"pattern": "ffn-channels", "sparsity": 0.2})
    for wish in wishes:
        plan = make(model_type, **wish)
        covered = sum(site.num_weights for site in plan.sites)
        assert covered + sum(row.num_params for row in plan.skipped) == plan.num_params
        others = sum(r.num_params for r in plan.skipped if r.reason == "not in this pattern")
        assert plan.eligible == covered + others


def test_num_params_counts_tied_weights_once(
    make: MakePlan, make_model: Callable[..., Any], model_type: str
) -> None:
    expected = sum(value.numel() for value in make_model(model_type).parameters())
    assert make(model_type).num_params == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(("sparsity", "kept"), [(0.25, 40), (0.2, 44), (0.6, 4)])
def test_channels_leave_equal_widths(
    make: MakePlan, model_type: str, sparsity: float, kept: int
) -> None:
    """9216 eligible weights in a block, 6144 of them in 64 channels; multiples of 4."""
    plan = make(model_type, pattern="ffn-channels", sparsity=sparsity)
    assert set(plan.counts.values()) == {64 - kept} and len(plan.counts) == 2
    assert plan.config_changes == {"intermediate_size": kept}
    assert plan.form == "shrunk" and plan.sparsity >= sparsity
    assert plan.removed == 2 * 96 * (64 - kept)


def test_another_multiple_may_be_asked(make: MakePlan) -> None:
    plan = make(pattern="ffn-channels", sparsity=0.25, settings=["prune.multiple=32"])
    assert plan.config_changes == {"intermediate_size": 32}
    plan = make(pattern="ffn-channels", sparsity=0.25, settings=["prune.multiple=1"])
    assert plan.config_changes == {"intermediate_size": 40}


def test_masked_channels_keep_the_config(make: MakePlan) -> None:
    plan = make(pattern="ffn-channels", sparsity=0.25, settings=["prune.form=masked"])
    assert plan.form == "masked" and plan.config_changes == {}
    assert set(plan.counts.values()) == {24}


@pytest.mark.parametrize("sparsity", [0.65, 0.67, 0.9])
def test_more_than_the_ffn_holds_is_refused(make: MakePlan, sparsity: float) -> None:
    with pytest.raises(RecipeError):
        make(pattern="ffn-channels", sparsity=sparsity)


def test_a_family_without_the_units_is_refused_with_what_it_has(make: MakePlan) -> None:
    says = "mixtral model has no ffn-channels .*: heads, .*blocks, .*expert-channels"
    with pytest.raises(RecipeError, match=says):
        make("mixtral", pattern="ffn-channels", sparsity=0.25)


def test_a_family_whose_config_counts_no_channels_is_refused(make: MakePlan) -> None:
    with pytest.raises(WontLoad, match=r"would be \[80, 32\], .* \[128, 32\]: .*form=masked"):
        make("bloom", pattern="ffn-channels", sparsity=0.25)


def test_a_part_of_a_unit_cannot_be_skipped(make: MakePlan) -> None:
    settings = ["prune.skip=['model.layers.0.mlp.*']"]
    says = r"leaves model\.layers\.0\.mlp\.gate_proj out, but it is part of the units"
    with pytest.raises(RecipeError, match=says):
        make(pattern="ffn-channels", sparsity=0.2, settings=settings)


def test_channels_may_skip_attention_and_count_the_ffn_alone(make: MakePlan) -> None:
    settings = ["prune.skip=['*self_attn*']"]
    plan = make(pattern="ffn-channels", sparsity=0.75, settings=settings)
    assert plan.eligible == 2 * 6144 and plan.config_changes == {"intermediate_size": 16}


def test_single_weights_cannot_be_cut_out(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"prune\.form"):
        make(settings=["prune.form=shrunk"])


def test_weight_only_methods_plan_no_forward(make: MakePlan) -> None:
    plan = make(method="magnitude")
    assert not plan.forward and plan.needs(0) == {}
    assert plan.estimate.hidden_bytes == 0 and plan.estimate.resume_seconds == 0
    assert "no forward, no calibration" in repr(plan)


def test_wanda_needs_the_norms_of_every_tap(make: MakePlan) -> None:
    plan = make()
    assert plan.needs(1) == dict.fromkeys(("attn_in", "attn_out", "ffn_in", "ffn_out"), ("col_sq",))
    assert make(settings=["prune.skip=['*self_attn*']"]).needs(0).keys() == {"ffn_in", "ffn_out"}


def test_an_unknown_method_is_told_before_the_model_is_opened() -> None:
    with pytest.raises(UnknownName, match="wanda"):
        api.plan("no-such-folder/x/y", sparsity=0.5, method="wonda")


@pytest.mark.parametrize("seq_len", [None, 64, 24])
def test_sequences_are_no_longer_than_the_model_takes(make: MakePlan, seq_len: int | None) -> None:
    assert make(seq_len=seq_len).seq_len == (seq_len or 64)


def test_a_longer_sequence_is_refused(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.seq_len: 65 is longer than the 64"):
        make("gpt2", seq_len=65)


def test_memory_that_does_not_suffice_is_refused_before_reading(make: MakePlan) -> None:
    with pytest.raises(TooLarge, match=r"on cpu, where 0\.10 GB may be used.*--max-memory cpu="):
        make(max_memory={"cpu": "100MB"})
    make(max_memory={"cpu": "100GB"})


def test_hidden_states_go_to_disk_when_memory_is_short(make: MakePlan) -> None:
    """64 tokens of 32 values in float32 are 8 KB a sample; 200,000 samples are 1.6 GB."""
    roomy = make(num_samples=200_000, seq_len=64)
    limit = roomy.estimate.host_peak - roomy.estimate.hidden_bytes // 2
    tight = make(num_samples=200_000, seq_len=64, max_memory={"cpu": limit})
    assert (roomy.estimate.place, tight.estimate.place) == ("host", "disk")
    assert tight.estimate.host_peak <= limit
    assert tight.estimate.disk_bytes == roomy.estimate.disk_bytes + tight.estimate.hidden_bytes


SHAPE = Shape(
    num_blocks=2, block_params=10**6, linear_params=10**6, largest_linear=10**5,
    entrance_params=10, exit_params=10, hidden_size=100, widest=400, eager_heads=0,
    vocab_size=64,
    stored_bytes=10**7, largest_shard=10**7,
)  # fmt: skip


def fitting(seq_len: int, num_samples: int, *, budget: int = 10**12, on_host: bool = True) -> int:
    return micro_batch(SHAPE, 9600, seq_len, num_samples, 4, budget, on_host)


def test_micro_batches_fit_and_are_never_empty() -> None:
    assert fitting(10, 4) == 4
    size = fitting(100, 10**6)
    assert size * 100 * 9600 <= ACTIVATIONS < (size + 1) * 100 * 9600
    assert fitting(10**6, 10**6) == 1
    assert fitting(128, 10**6, on_host=False) == DEVICE_TOKENS // 128
    small = fitting(128, 10**6, on_host=False, budget=10**8)
    assert small * 128 * 9600 <= 10**8 // 4 < (small + 1) * 128 * 9600


def test_the_table_shows_what_a_dry_run_must(make: MakePlan, pico: Pico) -> None:
    plan = make(sparsity=0.3, out="somewhere")
    text = repr(plan)
    for words in (
        str(pico("llama")), "(llama)", "2 blocks", "Wanda", "unstructured",
        f"sparsity {plan.sparsity:.5f}",
        "asked 0.3", "eligible", "somewhere", "masked", "8 x 24 tokens", "micro-batches of 8",
        "float32 on cpu", "hidden states on host", "memory", "disk", "time", "resume",
        "from_pretrained", "outside the blocks", "not a matrix",
    ):  # fmt: skip
        assert words in text, words
    shrunk = repr(make(pattern="ffn-channels", sparsity=0.25))
    assert "intermediate_size = 40" in shrunk and "not in this pattern" in shrunk
    assert "prune.skip" in repr(make(settings=["prune.skip=['*up_proj']"]))


def test_planning_writes_nothing(
    make: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make().out is not None
    make("gpt2", method="magnitude", pattern="2:4")
    assert list(tmp_path.iterdir()) == []


def test_plans_say_the_same_for_a_model_in_memory(
    make: MakePlan, make_model: Callable[..., Any], model_type: str
) -> None:
    from llmprune.engine.opening import anatomies_of
    from llmprune.engine.planning import make_plan
    from llmprune.walk.resident import in_memory

    plan, model = make(model_type), make_model(model_type)
    with in_memory(model) as blocks:
        memory = make_plan(
            plan.recipe, anatomies_of(blocks), source_name="x", out=None, config=model.config,
            device=torch.device("cpu"), dtype=torch.float32, stored_bytes=1, stored=torch.float32,
        )  # fmt: skip
    assert memory.counts == plan.counts and memory.skipped == plan.skipped
    assert memory.estimate.micro_batch == plan.estimate.micro_batch


def counts_of(plan: Plan) -> dict[str, int]:
    """Return the counts of a plan that awaits no survey."""
    assert plan.counts is not None
    return dict(plan.counts)


@pytest.mark.parametrize("pattern", ["4x4", "16x1", "1x8"])
def test_tiles_are_counted_to_the_tile(make: MakePlan, model_type: str, pattern: str) -> None:
    height, width = map(int, pattern.split("x"))
    plan = make(model_type, pattern=pattern, sparsity=0.3)
    assert all(site.unit_cost == height * width for site in plan.sites)
    total = sum(site.num_units for site in plan.sites)
    assert sum(counts_of(plan).values()) == math.floor(total * Fraction(3, 10) + Fraction(1, 2))
    for site in plan.sites:
        assert abs(counts_of(plan)[site.name] / site.num_units - 0.3) <= 0.02
    assert plan.form == "masked" and "tiles compete" in repr(plan)


def test_tiles_that_do_not_fill_say_which_do(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"12x8 tiles do not fill .*q_proj.*32 x 32.*such as 4x8"):
        make(pattern="12x8")
    with pytest.raises(RecipeError, match=r"7x5 tiles .*Choose other tiles.*--set"):
        make(pattern="7x5")
    plan = make(pattern="64x16", settings=["prune.skip=['*self_attn*', '*down_proj']"])
    assert {site.num_units for site in plan.sites} == {2}


def test_a_tile_as_large_as_a_linear_leaves_no_choice(make: MakePlan) -> None:
    with pytest.raises(RecipeError, match=r"sparsity: 0\.5 cannot be removed. At most 0 can"):
        make(pattern="32x32", settings=["prune.skip=['*mlp*', '*k_proj', '*v_proj']"])


def test_shares_of_single_linears(make: MakePlan) -> None:
    """By full name or relative to the block; the others make up the difference, to the weight."""
    settings = ["prune.sparsities={'mlp.down_proj': 0.2, 'model.layers.0.*.q_proj': 0}"]
    plan = make(settings=settings)
    counts, units = counts_of(plan), {site.name: site.num_units for site in plan.sites}
    assert plan.allocation == "manual" and "mlp.down_proj 0.2" in repr(plan)
    for index in (0, 1):
        name = f"model.layers.{index}.mlp.down_proj"
        assert counts[name] == round(0.2 * units[name])
    assert counts["model.layers.0.self_attn.q_proj"] == 0
    assert sum(counts.values()) == sum(units.values()) // 2
    others = {counts[name] / units[name] for name in units if "up_proj" in name or "k_" in name}
    assert max(others) - min(others) < 0.002 < min(others) - 0.5


REFUSED = {
    "wanda globally": (
        {"settings": ["prune.allocation=global"]}, r"prune\.allocation: global .*magnitude-global",
    ),
    "ria by lamp": (
        {"method": "ria", "settings": ["prune.allocation=lamp"]}, "lamp ranks .*--method lamp",
    ),
    "N:M globally": ({"method": "magnitude-global", "pattern": "2:4"}, "2:4 fixes .*--method mag"),
    "N:M by hand": ({"pattern": "2:4", "settings": ["prune.sparsities={'*': 0.5}"]}, "2:4 fixes"),
    "channels globally": (
        {"method": "lamp", "pattern": "ffn-channels"},
        "lamp gives single weights .* ffn-channels removes whole units.*uniform",
    ),
    "channels by hand": (
        {"pattern": "ffn-channels", "settings": ["prune.sparsities={'*': 0.5}"]},
        "manual gives single weights .* ffn-channels removes whole units",
    ),
    "channels by ria": ({"method": "ria", "pattern": "ffn-channels"}, "no rule for ffn-channels"),
    "a floor without a ranking": (
        {"settings": ["prune.min_keep=0.1"]}, "min_keep: 0.1 limits .*uniform ranks none",
    ),
    "an unknown allocation": (
        {"settings": ["prune.allocation=globall"]}, "prune.allocation: 'globall'.*'global'",
    ),
    "a glob for nothing": (
        {"settings": ["prune.sparsities={'*down': 0.5}"]}, "'\\*down' names no linear.*down_proj",
    ),
    "a glob for what is skipped": (
        {"settings": ["prune.sparsities={'*up_proj': 0.5}", "prune.skip=['*up_proj']"]},
        "names no linear that is pruned",
    ),
    "two shares for one linear": (
        {"settings": ["prune.sparsities={'*up_proj': 0.5, '*.0.mlp*': 0.4}"]}, "do not overlap",
    ),
    "a total out of reach": (
        {"settings": ["prune.sparsities={'*mlp*': 0.9}"], "sparsity": 0.5}, "0.5999 to 0.93",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_allocation_that_cannot_be_is_refused_with_its_reason(make: MakePlan, name: str) -> None:
    wishes, says = REFUSED[name]
    with pytest.raises(RecipeError, match=says):
        make(**wishes)


def test_scores_by_lot_may_follow_the_counts_of_magnitudes(make: MakePlan) -> None:
    plan = make(method="random", settings=["prune.allocation=global"])
    assert plan.counts is None and plan.allocation == "global" and not plan.forward


def test_equal_mass_that_changes_nothing_is_noted(make: MakePlan) -> None:
    assert "note" not in repr(make(method="wanda-alpha"))
    assert "same share of its scores' sum" in repr(make(method="wanda-alpha"))
    for pattern in ("2:4", "4x4"):
        plan = make(method="wanda-alpha", pattern=pattern)
        assert f"equal mass is for single weights; {pattern}" in repr(plan)
