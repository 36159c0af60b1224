"""LoRAPrune through a whole recovery: counts, groups of heads, the merge, resuming, cutting out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api
from llmprune.base.errors import LlmpruneError, RecipeError
from llmprune.base.progress import Progress
from llmprune.delivery.masks import MaskFiles
from llmprune.engine.opening import anatomies_of
from llmprune.engine.shapes import Anatomies
from llmprune.recipe import Recipe, RecoverStep
from llmprune.recovery.adapter_gradients import importance_by_unit
from llmprune.recovery.adapter_units import AdapterUnits, importance_of
from llmprune.recovery.saved import Saved
from llmprune.recovery.unit_counts import counts_of, final_counts, spared_blocks
from llmprune.report.run import Report
from llmprune.runs import run_recipe
from llmprune.walk.resident import in_memory

pytestmark = pytest.mark.usefixtures("quick_gate")
STILL = ["evaluate.perplexity=false"]
UNITS = "ffn-channels+heads"
ALL = {"first": 0.0, "last": 0.0}  # no block is spared


@pytest.fixture
def text() -> Tensor:
    """Sixty windows of sixteen tokens that follow one another in few ways."""
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (60, 1), generator=draw)
    return (starts + 3 * torch.arange(16)) % 64


@pytest.fixture(scope="module")
def anatomies(make_model: Any) -> Callable[[str], Anatomies]:
    @cache
    def of(model_type: str) -> Anatomies:
        with in_memory(make_model(model_type)) as blocks:
            return anatomies_of(blocks)

    return of


def wish_of(sparsity: float = 0.3, **rest: Any) -> RecoverStep:
    prune = {"pattern": UNITS, "sparsity": sparsity}
    given = {"method": "loraprune", "prune": prune, "steps": 12, "batch": 4, "every": 2, "rank": 4}
    return RecoverStep(**{**given, "options": ALL, "learning_rate": 0.01, "seq_len": 16, **rest})


def train(folder: Path, out: Path, text: Tensor, **rest: Any) -> Report:
    recipe = Recipe(
        model=str(folder), out=str(out), device="cpu",
        steps=[{"recover": wish_of(**rest)}, {"evaluate": {"perplexity": False}}],
    )  # fmt: skip
    report = run_recipe(recipe, Progress("quiet"), tokens=text)
    assert report is not None
    return report


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def kept_units(folder: Path, anatomies: Anatomies) -> dict[str, Tensor]:
    """Return keep_U by name, after a look whether masks take units whole and nothing else."""
    masks, found = MaskFiles(folder).of_block(""), {}
    for prefix, anatomy in zip(anatomies.prefixes, anatomies.blocks, strict=True):
        whole = {
            name: torch.ones(linear.shape, dtype=torch.bool)
            for name, linear in anatomy.linears.items()
        }
        for coupling in anatomy.couplings:
            if coupling.kind not in UNITS.split("+"):
                continue
            span = next(span for span in coupling.spans if span.axis == "in")
            keep_OI = masks.get(prefix + span.linear, whole[span.linear])
            keep_U = keep_OI[0].reshape(coupling.num_units, -1)[:, 0]
            for span in coupling.spans:
                wide = keep_U.repeat_interleave(span.width)
                part = slice(span.offset, span.offset + len(wide))
                if span.axis == "out":
                    whole[span.linear][part] &= wide[:, None]
                else:
                    whole[span.linear][:, part] &= wide
            found[prefix + coupling.name] = keep_U
        for name, keep_OI in whole.items():
            if prefix + name in masks:
                assert torch.equal(masks[prefix + name], keep_OI)
            else:
                assert keep_OI.all()
    return found


def test_counts_by_hand(anatomies: Any) -> None:
    # A block of 9216 weights: 2 groups of heads of 1536, 64 channels of 96 that go by fours. Of two
    # blocks 0.3 is 5530 weights: 2 x (1536 + 16 x 96), or 1536 + 44 x 96 where one is spared.
    llama = anatomies("llama")
    even = final_counts(wish_of(), llama)
    assert {name: going.units for name, going in even.items()} == {
        f"model.layers.{index}.{kind}": units
        for index in (0, 1)
        for kind, units in (("ffn-channels", 16), ("heads", 1))
    }
    spared = final_counts(wish_of(options={}), llama)
    assert {name: going.units for name, going in spared.items()} == {
        "model.layers.0.ffn-channels": 44, "model.layers.0.heads": 1,
    }  # fmt: skip


@given(
    schedule=st.sampled_from(["linear", "cubic", "one-shot", "iterative"]),
    sparsity=st.sampled_from([0.1, 0.3, 0.45]),
    steps=st.integers(3, 60),
    every=st.integers(1, 7),
)
def test_counts_rise_to_what_is_asked(
    schedule: str, sparsity: float, steps: int, every: int, anatomies: Any
) -> None:
    wish = wish_of(sparsity, schedule=schedule, steps=steps, every=every)
    llama = anatomies("llama")
    gone = 0
    for going in final_counts(wish, llama).values():
        counts = counts_of(going, wish)
        assert [*counts] == sorted(counts) and [*counts.values()] == sorted({*counts.values()})
        assert counts[max(counts)] == going.units and max(counts) < steps
        gone += going.units * (96 if going.coupling.kind == "ffn-channels" else 1536)
    assert gone >= sparsity * 2 * 9216


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_units_go_by_step_and_the_merge_is_what_was_trained(
    model_type: str,
    pico: Any,
    anatomies: Any,
    tmp_path: Path,
    text: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see, seen = AdapterUnits.see_gradients, []
    means: dict[str, Tensor] = {}

    def watched(self: AdapterUnits, step: int) -> None:
        if step == 5:
            check_importances(self)
        for name, place in self.places.items():
            now_U = importance_by_unit(place.coupling, place.importances())
            means[name] = 0.9 * means.get(name, torch.zeros_like(now_U)) + 0.1 * now_U
        left = {name: place.keep_U for name, place in self.places.items()}
        see(self, step)
        for name, place in self.places.items():
            torch.testing.assert_close(place.score_U, means[name])
            if (went_U := left[name] & ~place.keep_U).any():  # the least important of what was left
                assert means[name][went_U].max() <= means[name][place.keep_U].min()
        seen.append((step, {name: place.keep_U.clone() for name, place in self.places.items()}))

    monkeypatch.setattr(AdapterUnits, "see_gradients", watched)
    report = train(pico(model_type), tmp_path / "out", text)
    assert report.data["recovery"][-1]["merge"]["exact"] < 1e-5
    assert report.data["gate"]["masked_linears"] and report.data["method"] == "loraprune"
    history = report.data["recovery"][-1]["history"]["held"]
    assert history[-1][1] < history[0][1]
    shapes = anatomies(model_type)
    final = final_counts(wish_of(), shapes)
    kept = kept_units(tmp_path / "out", shapes)
    assert kept.keys() == final.keys()
    for name, going in final.items():
        counts, gone = counts_of(going, wish_of()), 0
        before = torch.ones(going.coupling.num_units, dtype=torch.bool)
        for step, keeps in seen:
            gone = counts.get(step, gone)
            assert not (keeps[name] & ~before).any()  # what went stays away
            before = keeps[name]
            assert int((~before).sum()) == gone
        assert gone == going.units and torch.equal(kept[name], before)
    removed = sum(int((~keep).sum()) for keep in MaskFiles(tmp_path / "out").of_block("").values())
    total = sum(
        linear.shape[0] * linear.shape[1]
        for block in shapes.blocks
        for linear in block.linears.values()
    )
    assert report.sparsity == pytest.approx(removed / total) and report.sparsity >= 0.3


def check_importances(units: AdapterUnits) -> None:
    """Compare importances with what a loop over single weights gives."""
    name, layer = next(iter(units.params.items()))
    found, weight = importance_of(layer), layer.get_base_layer().weight.detach()
    if layer.fan_in_fan_out:
        found, weight = found.T, weight.T
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.grad is not None and b.grad is not None and a.grad.any()
    grad_a, grad_b, a, b = a.grad.tolist(), b.grad.tolist(), a.tolist(), b.tolist()
    for row, column in ((0, 0), (3, 7), (15, 2), (7, 31)):
        grad = update = 0.0
        for r in range(len(a)):
            grad += grad_b[row][r] * a[r][column] + b[row][r] * grad_a[r][column]
            grad -= grad_b[row][r] * grad_a[r][column]
            update += b[row][r] * a[r][column]
        value = weight[row, column].item()
        expected = abs(grad * (value + layer.scaling["default"] * update)) if value else 0.0
        assert found[row, column].item() == pytest.approx(expected, rel=1e-3, abs=1e-8), name


def test_adapters_choose_otherwise_than_magnitudes(
    pico: Any, anatomies: Any, tmp_path: Path, text: Tensor
) -> None:
    train(pico("llama"), tmp_path / "lora", text)
    settings = [*STILL, "prune.form=masked", "prune.allocation=uniform"]
    api.prune(
        pico("llama"), sparsity=0.3, method="magnitude-struct", pattern=UNITS, calib=text,
        out=tmp_path / "magnitude", device="cpu", quiet=True, settings=settings,
    )  # fmt: skip
    one, two = (kept_units(tmp_path / name, anatomies("llama")) for name in ("lora", "magnitude"))
    assert all(int(one[name].sum()) == int(two[name].sum()) for name in one)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_killed_run_goes_on_with_the_same_bytes(
    pico: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    train(pico("llama"), tmp_path / "whole", text, save_every=3)
    write = Saved.write

    def dying(self: Saved, step: int, *rest: Any, **named: Any) -> None:
        write(self, step, *rest, **named)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saved, "write", dying)
        with pytest.raises(Killed):
            train(pico("llama"), tmp_path / "out", text, save_every=3)
    state = load_file(tmp_path / "out.partial/llmprune/records/saved/00000006.safetensors")
    keeps = [keep for key, keep in state.items() if key.endswith("ffn-channels.keep")]
    assert keeps and all(0 < int((~keep).sum()) < 16 for keep in keeps)
    train(pico("llama"), tmp_path / "out", text, save_every=3)
    one, two = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_spared_blocks_keep_everything_and_the_rest_is_cut_out(
    pico: Any, anatomies: Any, stock: Any, tmp_path: Path, text: Tensor, tokens: Tensor
) -> None:
    train(pico("llama"), tmp_path / "spared", text, sparsity=0.2, options={})
    kept = kept_units(tmp_path / "spared", anatomies("llama"))
    assert kept["model.layers.1.heads"].all() and kept["model.layers.1.ffn-channels"].all()
    assert not kept["model.layers.0.ffn-channels"].all()
    train(pico("llama"), tmp_path / "masked", text)
    api.prune(
        tmp_path / "masked", sparsity=0.3, method="magnitude-struct", pattern=UNITS, calib=text,
        out=tmp_path / "small", device="cpu", quiet=True, settings=STILL,
    )  # fmt: skip
    masked, small = stock(tmp_path / "masked"), stock(tmp_path / "small")
    assert small.num_parameters() < masked.num_parameters()
    with torch.no_grad():
        one, two = (model(input_ids=tokens).logits for model in (masked, small))
    torch.testing.assert_close(one, two, atol=1e-5 * float(one.abs().max()), rtol=0)


def test_a_pruned_model_loses_units_on_top(
    pico: Any, anatomies: Any, tmp_path: Path, text: Tensor
) -> None:
    api.prune(
        pico("llama"), sparsity=0.3, method="magnitude", out=tmp_path / "in", device="cpu",
        quiet=True, settings=STILL,
    )  # fmt: skip
    report = train(tmp_path / "in", tmp_path / "out", text)
    before, after = (MaskFiles(tmp_path / name).of_block("") for name in ("in", "out"))
    assert report.sparsity > 0.45 and before.keys() == after.keys()
    assert all(not (after[name] & ~before[name]).any() for name in before)


def test_spared_blocks_are_a_share_ahead_and_a_number_behind() -> None:
    assert spared_blocks(wish_of(options={"first": 0.25}), 8) == {0, 1, 7}
    assert spared_blocks(wish_of(), 8) == set()


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"prune": None}, "recover.method: loraprune removes units while it trains"),
        (
            {"fade": "march", "options": {}},
            "recover.fade: loraprune removes units by what its adapters learn",
        ),
        ({"prune": {"sparsity": 0.5}}, "recover.prune.pattern: loraprune removes ffn-channels"),
        ({"prune": {"pattern": "ffn", "sparsity": 0.5}}, "and the pattern is ffn"),
        (
            {"prune": {"pattern": UNITS, "sparsity": 0.3, "allocation": "widths"}},
            "recover.prune.allocation: loraprune takes equally many units",
        ),
        ({"options": {"fist": 0.2}}, "recover.options: 'fist' is not known.*'first'"),
        ({"options": {"first": 1.5}}, "recover.options.first: 1.5 is no share"),
        ({"options": {"last": 0.5}}, "recover.options.last: 0.5 is no number of blocks"),
        ({"sparsity": 0.6, "options": {}}, r"at most 0.\d+ can go.*recover.options.first=0"),
        ({"options": {"last": 2}}, "recover.options: all 2 blocks are spared"),
        ({"schedule": "cubix"}, "'cubix' is not known"),
    ],
)
def test_wrong_wishes_are_refused(
    rest: dict[str, Any], message: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(LlmpruneError, match=message):
        train(pico("llama"), tmp_path / "out", text, **rest)
    assert list(tmp_path.iterdir()) == []


def test_experts_have_no_channels_of_a_dense_half(pico: Any, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(RecipeError, match="this mixtral model has no ffn-channels"):
        train(pico("mixtral"), tmp_path / "out", text)
