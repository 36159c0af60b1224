"""Every recipe in configs/ is a recipe, says which command runs it, and can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune.api import plan, run
from llmprune.catalog import METHODS
from llmprune.recipe import Recipe
from tests.story.conftest import Command

pytestmark = pytest.mark.usefixtures("clock")
CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def model_of(path: Path, source: Path, mixture: Path) -> Path:
    """Return a model that a recipe is for."""
    return mixture if Recipe.read(path).prune.pattern == "experts" else source


def check_amount(sparsity: float, recipe: Recipe) -> None:
    """Check what is removed: the sparsity, or no more than it where there is a target."""
    if recipe.prune.target:
        assert 0 < sparsity <= recipe.prune.sparsity
    else:
        assert sparsity == pytest.approx(recipe.prune.sparsity, abs=0.03)


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_planned(path: Path, source: Path, mixture: Path, tmp_path: Path) -> None:
    model = model_of(path, source, mixture)
    recipe = Recipe.read(path, [f"model={model}", f"out={tmp_path / 'out'}"])
    decided = plan(recipe)
    check_amount(decided.sparsity, recipe)
    assert decided.out == str(tmp_path / "out")
    assert METHODS[recipe.prune.method].title in repr(decided)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_run(
    path: Path, source: Path, mixture: Path, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    here = [
        f"model={model_of(path, source, mixture)}", f"out={tmp_path / 'out'}",
        "calibration.num_samples=4",
        "calibration.seq_len=16", f"calibration.data={text_file}", f"evaluate.data={text_file}",
        "evaluate.num_windows=2", "evaluate.perplexity=true", "device=cpu",
    ]  # fmt: skip
    recipe = Recipe.read(path, here)
    report = run(plan(recipe), quiet=True)
    check_amount(report.sparsity, recipe)
    assert report.data["gate"]["agreement"]["passed"] and report.perplexity is not None
    assert report.data["method"] == recipe.prune.method


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_names_its_own_command(path: Path) -> None:
    assert f"llmprune --recipe configs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_go_before_a_config(
    path: Path, source: Path, mixture: Path, tmp_path: Path, command: Command
) -> None:
    model = model_of(path, source, mixture)
    ended = command(
        *("plan", "--recipe", path, "--model", model, "--num-samples", 3),
        *("--out", tmp_path / "out", "--json"),
    )
    assert ended.code == 0, ended.err
    assert str(model) in ended.out


@pytest.mark.parametrize("effort", ["fast", "good", "best"])
def test_an_effort_is_planned_for_every_pattern(effort: str, source: Path, tmp_path: Path) -> None:
    wishes: list[dict[str, Any]] = [
        *({"sparsity": share} for share in (0.5, 0.7)),
        {"pattern": "2:4"},
        {"target": {"ppl": "+5%"}},
        {"pattern": "16x16", "sparsity": 0.5},
        {"pattern": "ffn-channels", "sparsity": 0.25},
    ]
    for wish in wishes:
        prune = {"effort": effort, **wish}
        decided = plan(Recipe(model=str(source), out=str(tmp_path / "o"), steps=[{"prune": prune}]))
        assert decided.sparsity > 0, wish
