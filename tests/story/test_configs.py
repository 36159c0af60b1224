"""Every recipe in configs/ is a recipe, says which command runs it, and can be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune.api import plan, run
from llmprune.catalog import METHODS
from llmprune.recipe import Recipe
from tests.story.conftest import Command

CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_planned(path: Path, source: Path, tmp_path: Path) -> None:
    recipe = Recipe.read(path, [f"model={source}", f"out={tmp_path / 'out'}"])
    decided = plan(recipe)
    assert decided.sparsity == pytest.approx(recipe.prune.sparsity, abs=0.03)
    assert decided.out == str(tmp_path / "out")
    assert METHODS[recipe.prune.method].title in repr(decided)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_run(
    path: Path, source: Path, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    here = [
        f"model={source}", f"out={tmp_path / 'out'}", "calibration.num_samples=4",
        "calibration.seq_len=16", f"calibration.data={text_file}", f"evaluate.data={text_file}",
        "evaluate.num_windows=2", "evaluate.perplexity=true", "device=cpu",
    ]  # fmt: skip
    recipe = Recipe.read(path, here)
    report = run(plan(recipe), quiet=True)
    assert report.sparsity == pytest.approx(recipe.prune.sparsity, abs=0.03)
    assert report.data["gate"]["agreement"]["passed"] and report.perplexity is not None
    assert report.data["method"] == recipe.prune.method


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_names_its_own_command(path: Path) -> None:
    assert f"llmprune --recipe configs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_go_before_a_config(
    path: Path, source: Path, tmp_path: Path, command: Command
) -> None:
    ended = command(
        *("plan", "--recipe", path, "--model", source, "--num-samples", 3),
        *("--out", tmp_path / "out", "--json"),
    )
    assert ended.code == 0, ended.err
    assert str(source) in ended.out


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
