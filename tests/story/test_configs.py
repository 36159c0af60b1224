"""Every recipe in configs/ is a recipe, says which command runs it, and can be planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmprune.api import plan
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
    assert str(recipe.prune.method) in repr(decided).lower()
    assert list(tmp_path.iterdir()) == []


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
