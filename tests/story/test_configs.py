"""Every recipe in configs/ is a recipe, says which command runs it, and can be planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llmprune.api import plan
from llmprune.base.progress import Progress
from llmprune.catalog import METHODS
from llmprune.recipe import PruneStep, Recipe
from llmprune.recovery.methods import RECOVERIES
from llmprune.runs import plans_of, run_recipe
from tests.story.conftest import Command
from tests.story.upload_hub import TOKEN, UploadHub, serving

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(scope="module")
def served() -> Iterator[UploadHub]:
    with serving({}) as server:
        yield server


@pytest.fixture
def hub(served: UploadHub, monkeypatch: pytest.MonkeyPatch) -> UploadHub:
    """An empty Hub in this process, for the recipes that push."""
    served.repositories.clear()
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return served


CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs").glob("*.yaml"))


def model_of(path: Path, source: Path, mixture: Path) -> Path:
    """Return a model that a recipe is for."""
    return mixture if cut_of(Recipe.read(path)).pattern == "experts" else source


def cut_of(recipe: Recipe) -> PruneStep:
    """Return what a recipe removes, in a step of its own or while it trains."""
    within = recipe.recover and recipe.recover.prune
    return within or recipe.prune


def quick(recipe: Recipe) -> list[str]:
    """Return settings that keep trainings short, and let small stages be small of few channels."""
    places = [*enumerate(recipe.steps)]
    cuts = [place for place, step in places if step.prune is not None]
    short = ("steps=4", "batch=2", "seq_len=16", "every=1", "window=[0, 1]")
    return [
        *(f"steps[{at}].prune.multiple=1" for at in cuts if len(cuts) > 1),
        *(f"steps[{at}].recover.{key}" for at, step in places if step.recover for key in short),
    ]


def check_amount(sparsity: float, recipe: Recipe) -> None:
    """Check what is removed: the sparsity, or no more than it where there is a target."""
    cut = cut_of(recipe)
    if cut.target:
        assert 0 < sparsity <= cut.sparsity
    else:
        assert sparsity == pytest.approx(cut.sparsity, abs=0.03)


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_planned(path: Path, source: Path, mixture: Path, tmp_path: Path) -> None:
    model = model_of(path, source, mixture)
    here = [f"model={model}", f"out={tmp_path / 'out'}", *quick(Recipe.read(path))]
    recipe = Recipe.read(path, here)
    first, *later = plans_of(recipe)
    if recipe.stages()[0].recover is None:
        check_amount(first.sparsity, recipe)
        assert METHODS[recipe.prune.method].title in str(first)
    else:
        assert RECOVERIES[recipe.recover.method].title in str(first)
    assert str(first.out) == str(tmp_path / "out")
    assert len(later) == len(recipe.stages()) - 1 + (recipe.push is not None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_run(
    path: Path,
    source: Path,
    mixture: Path,
    tmp_path: Path,
    text_file: Path,
    hub: UploadHub,
    quick_gate: None,
) -> None:
    here = [
        f"model={model_of(path, source, mixture)}", f"out={tmp_path / 'out'}",
        "calibration.num_samples=4",
        "calibration.seq_len=16", f"calibration.data={text_file}", f"evaluate.data={text_file}",
        "evaluate.num_windows=2", "evaluate.perplexity=true", "device=cpu",
    ]  # fmt: skip
    recipe = Recipe.read(path, [*here, *quick(Recipe.read(path))])
    report = run_recipe(recipe, Progress("quiet"))
    assert report is not None
    check_amount(report.sparsity, recipe)
    assert report.data["gate"]["agreement"]["passed"] and report.perplexity is not None
    assert report.data["method"] == cut_of(recipe).method
    trainings = [step for step in recipe.steps if step.recover is not None]
    assert len(report.data.get("recovery", ())) == len(trainings)
    if recipe.push is not None:
        (repository,) = hub.repositories.values()
        assert set(report.data["files"]) < set(repository.files)
        assert recipe.push.repo in repository.files["README.md"].decode()
        assert repository.private == recipe.push.private
    assert len(hub.repositories) == (recipe.push is not None)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_names_its_own_command(path: Path) -> None:
    assert f"llmprune --recipe configs/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flags_go_before_a_config(
    path: Path, source: Path, mixture: Path, tmp_path: Path, command: Command
) -> None:
    model = model_of(path, source, mixture)
    prunes_first = Recipe.read(path).stages()[0].recover is None
    ended = command(
        *("plan", "--recipe", path, "--model", model, "--num-samples", 3),
        *("--out", tmp_path / "out", *(["--json"] if prunes_first else [])),
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
