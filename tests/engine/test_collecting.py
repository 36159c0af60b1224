"""Statistics collected apart and merged prune as the whole text does, and fit nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmprune import api, collecting
from llmprune.base.errors import CheckpointError, LlmpruneError, RecipeError
from llmprune.base.progress import Progress
from llmprune.engine.collected import INDEX, read_collected
from llmprune.engine.opening import open_plan
from llmprune.stats import STATISTICS
from llmprune.stats.keeping import joined, restore, stored
from llmprune.steps import run_streamed

DENSE = ("prune.propagate=dense", "evaluate.perplexity=false", "calibration.micro_batch=1")
QUIET = Progress("quiet")


def wish_of(model: Path, out: Path, method: str, *settings: str) -> Any:
    return api.make_recipe(
        str(model),
        method=method,
        sparsity=0.5,
        calib="demo",
        num_samples=3,
        seq_len=24,
        out=out,
        device="cpu",
        settings=[*DENSE, *settings],
    )


@pytest.fixture(scope="module")
def halves(pico: Any, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what collects both halves of the tokens for a method, and merges them, once."""
    made: dict[tuple[str, str], list[Path]] = {}

    def collected(method: str, model_type: str = "llama") -> list[Path]:
        if (method, model_type) not in made:
            home = tmp_path_factory.mktemp("collected")
            parts = [home / "first", home / "second"]
            for part, ids in zip(parts, (tokens[:3], tokens[3:]), strict=True):
                recipe = wish_of(pico(model_type), part, method)
                collecting.collect(recipe, part, QUIET, tokens=ids)
            collecting.merge(parts, home / "both")
            made[method, model_type] = [*parts, home / "both"]
        return made[method, model_type]

    return collected


def masks_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "llmprune").glob("masks-*"))}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_merged_halves_prune_to_the_bytes_of_the_whole_text(
    model_type: str,
    halves: Any,
    pico: Any,
    tokens: torch.Tensor,
    tmp_path: Path,
    quick_gate: None,
) -> None:
    *_, both = halves("wanda", model_type)
    wish = wish_of(pico(model_type), tmp_path / "given", "wanda", f"calibration.statistics={both}")
    opened = open_plan(wish)
    assert "statistics col_sq of 144 tokens in 2 texts" in repr(opened.plan)
    report = run_streamed(opened, QUIET)
    run_streamed(
        open_plan(wish_of(pico(model_type), tmp_path / "text", "wanda")), QUIET, tokens=tokens
    )
    expected = masks_of(tmp_path / "text")
    assert expected and masks_of(tmp_path / "given") == expected
    run = json.loads((tmp_path / "given" / "llmprune" / "run.json").read_text())
    assert run["statistics"] == read_collected(both).hash and run["tokens"] is None
    assert report.data["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_merged_gram_matrices_prune_as_the_whole_text_to_rounding(
    halves: Any, pico: Any, tokens: torch.Tensor, tmp_path: Path, quick_gate: None
) -> None:
    *_, both = halves("sparsegpt")
    model, setting = pico("llama"), f"calibration.statistics={both}"
    run_streamed(open_plan(wish_of(model, tmp_path / "given", "sparsegpt", setting)), QUIET)
    run_streamed(open_plan(wish_of(model, tmp_path / "text", "sparsegpt")), QUIET, tokens=tokens)
    for path in sorted((tmp_path / "given").glob("model-*")):
        theirs = load_file(tmp_path / "text" / path.name)
        for name, value in load_file(path).items():
            assert ((value == 0) == (theirs[name] == 0)).float().mean() > 0.99, name
            assert torch.isclose(value, theirs[name], atol=1e-4).float().mean() > 0.98, name


@pytest.mark.parametrize("name", ["col_sq", "col_mean", "col_var", "col_abs", "gram"])
def test_what_was_stored_adds_up_as_what_was_seen(name: str) -> None:
    x_BTI = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)) + 2
    whole, first, second = (STATISTICS[name].accumulator() for _ in range(3))
    for half_BTI in x_BTI.split(2):
        whole.update(half_BTI)
    first.update(x_BTI[:2])
    second.update(x_BTI[2:])
    kept = restore(STATISTICS[name].accumulator(), stored(first))
    kept.merge(restore(STATISTICS[name].accumulator(), stored(second)))
    found, expected = joined({name: kept}), joined({name: whole})
    assert found.num_tokens == expected.num_tokens == 24
    torch.testing.assert_close(found[name], expected[name])
    x_TI = x_BTI.flatten(0, 1).double()
    slow = {
        "col_sq": x_TI.square().sum(0),
        "col_mean": x_TI.mean(0),
        "col_var": x_TI.var(0, correction=0),
        "col_abs": x_BTI.double().abs().mean(1).square().sum(0),
        "gram": x_TI.T @ x_TI,
    }
    torch.testing.assert_close(found[name].double(), slow[name], rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_is_stored_as_such() -> None:
    kept = restore(STATISTICS["gram"].accumulator(), stored(STATISTICS["gram"].accumulator()))
    assert joined({"gram": kept}).num_tokens == 0 and not joined({"gram": kept}).values


def test_the_same_text_is_not_added_twice(halves: Any, tmp_path: Path) -> None:
    first, second, both = halves("wanda")
    for wrong in ([first, first], [both, second]):
        with pytest.raises(RecipeError, match="hold the same text"):
            collecting.merge(wrong, tmp_path / "out")
    with pytest.raises(RecipeError, match="Give two or more"):
        collecting.merge([first], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", {"name": "other", "fingerprint": "0"}, "of other, whose weights differ"),
        ("dtype", "bfloat16", "differ in dtype: 'float32' and 'bfloat16'"),
        ("statistics", ["gram"], "differ in statistics"),
        ("blocks", [{"attn_in": 7}], "differ in taps"),
    ],
)
def test_what_differs_is_not_added(
    key: str, value: Any, said: str, halves: Any, tmp_path: Path
) -> None:
    first, second, _ = halves("wanda")
    other = tmp_path / "other"
    shutil.copytree(second, other)
    record = json.loads((other / INDEX).read_text()) | {key: value}
    (other / INDEX).write_text(json.dumps(record))
    with pytest.raises(RecipeError, match=said):
        collecting.merge([first, other], tmp_path / "out")


def test_a_damaged_file_is_found_before_it_is_used(
    halves: Any, pico: Any, tmp_path: Path, quick_gate: None
) -> None:
    first, second, _ = halves("wanda")
    broken = tmp_path / "broken"
    shutil.copytree(second, broken)
    file = broken / "block-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"block-00002.*not what was written"):
        collecting.merge([first, broken], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
    wish = wish_of(pico("llama"), tmp_path / "out", "wanda", f"calibration.statistics={broken}")
    with pytest.raises(CheckpointError, match="block-00002"):
        run_streamed(open_plan(wish), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("wanda", ["prune.propagate=pruned"], "Type --set prune.propagate=dense"),
        ("wanda", ["prune.allocation=owl"], "a survey before the cut"),
        ("gblm", [], "gradients"),
        ("magnitude", [], "reads no text"),
        ("sparsegpt", [], "sparsegpt needs gram too. Type .* --for sparsegpt"),
    ],
)
def test_runs_that_learn_something_else_are_refused(
    method: str, settings: list[str], said: str, halves: Any, pico: Any, tmp_path: Path
) -> None:
    *_, both = halves("wanda")
    given = f"calibration.statistics={both}"
    with pytest.raises(RecipeError, match=said):
        open_plan(wish_of(pico("llama"), tmp_path / "out", method, *settings, given))


def test_another_model_and_a_folder_of_something_else_are_refused(
    halves: Any, pico: Any, make_model: Any, tokens: torch.Tensor, tmp_path: Path
) -> None:
    *_, both = halves("wanda")
    model = pico("qwen3")
    with pytest.raises(RecipeError, match="collected of another model"):
        open_plan(wish_of(model, tmp_path / "x", "wanda", f"calibration.statistics={both}"))
    with pytest.raises(RecipeError, match="holds no statistics"):
        open_plan(wish_of(model, tmp_path / "x", "wanda", f"calibration.statistics={model}"))
    with pytest.raises(RecipeError, match="a model in memory is calibrated on text"):
        api.prune(
            make_model("llama"), sparsity=0.5, calib=tokens, quiet=True,
            settings=["prune.propagate=dense", f"calibration.statistics={both}"],
        )  # fmt: skip


def test_a_fault_leaves_nothing(pico: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(LlmpruneError, match="vocabulary"):
        collecting.collect(wish_of(pico("llama"), out, "wanda"), out, QUIET, tokens=tokens + 64)
    assert not list(tmp_path.iterdir())
