"""What cells share: KL of the one walk that measures them, and statistics collected once."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import collecting, steps
from llmprune.api import make_recipe
from llmprune.base.errors import RecipeError, UnknownName
from llmprune.base.progress import Progress
from llmprune.collecting import collect
from llmprune.comparison.pictures import pareto_figure
from llmprune.comparison.result import Comparison
from llmprune.comparison.writing import protocol_lines
from llmprune.evaluation import perplexity

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def wish(pico: Any, text_file: Path) -> dict[str, Any]:
    return {
        **{"model": str(pico("llama")), "calib": str(text_file), "evaluation": str(text_file)},
        **{"num_samples": 4, "seq_len": 40, "num_windows": 3, "quiet": True},
    }


def counted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[str]:
    """Return a list that grows by each call of a function of a module."""
    calls: list[str] = []
    real: Callable[..., Any] = getattr(place, name)

    def call(*args: Any, **rest: Any) -> Any:
        calls.append(name)
        return real(*args, **rest)

    monkeypatch.setattr(place, name, call)
    return calls


def run(wish: dict[str, Any], out: Path, **more: Any) -> Comparison:
    found = llmprune.compare(**{**wish, **more}, out=out)
    assert found is not None
    return found


def test_statistics_are_collected_once_and_cells_are_what_they_make_alone(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = counted(monkeypatch, collecting, "embed")
    cut = counted(monkeypatch, steps, "embed")
    grid = {"methods": "magnitude,wanda,sparsegpt", "sparsity": 0.5, "statistics": "dense"}
    found = run(wish, tmp_path / "c", **grid)
    assert not found.failed
    assert len(collected) == 1  # a walk
    assert not cut
    told = {each["what"]: (each["made"], each["used"]) for each in found.data["shared"]}
    assert told["statistics of the dense model"] == (1, 2)
    assert "col_sq, gram of the dense model, collected once" in str(found)
    assert not list(tmp_path.glob("c/work/statistics-*"))  # as large as the model, or larger

    folder = tmp_path / "statistics"
    text = {"calib": wish["calib"], "num_samples": 4, "seq_len": 40}
    settings = ["prune.propagate=dense", "evaluate.perplexity=false"]
    wanda = make_recipe(wish["model"], sparsity=0.5, method="wanda", **text, settings=settings)
    collect(wanda, folder, Progress("quiet"))
    alone = llmprune.prune(
        wish["model"],
        method="wanda",
        sparsity=0.5,
        out=tmp_path / "alone",
        quiet=True,
        settings=[*settings, f"calibration.statistics={folder}", "calibration.seq_len=40"],
    )
    cell = next(cell for cell in found.data["cells"] if cell["method"] == "wanda")
    assert cell["files"] == dict(alone.data["files"])
    bare = run(wish, tmp_path / "d", methods="wanda", sparsity=0.5)
    assert bare.data["cells"][0]["files"] != cell["files"]  # which is why the page says so
    assert "statistics" not in dict(protocol_lines(bare.data))


def test_kl_comes_from_the_walk_that_measures_the_loss(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = counted(monkeypatch, perplexity, "walk")
    grid: dict[str, Any] = {"methods": "magnitude", "pareto": "kl"}
    found = run(wish, tmp_path / "c", sparsity="0,0.5", **grid)
    assert len(walks) == 3  # the dense model and two cells
    none, half = found.rows
    assert none.kl == (0.0, 0.0)
    assert half.kl is not None and half.kl[0] > 0 and half.kl[1]
    first, second, third = csv.DictReader(io.StringIO((tmp_path / "c/comparison.csv").read_text()))
    assert (first["kl"], second["kl"], third["kl"]) == ("0.0", "0.0", str(half.kl[0]))
    assert third["kl_stderr"] == str(half.kl[1])
    for kind in ("md", "html"):
        assert (
            f"{half.kl[0]:.4f} ± {half.kl[1]:.4f}"
            in (tmp_path / f"c/comparison.{kind}").read_text()
        )
    axes = pareto_figure(found.data["dense"], found.rows, found.axis).axes[0]
    assert axes.get_ylabel().startswith("KL") and axes.get_yscale() == "linear"
    more = run(wish, tmp_path / "c", sparsity="0,0.5,0.25", **grid)  # has grown after its end
    assert len(walks) == 5  # the dense model once more, and one cell
    assert more.rows[1].kl == half.kl


def test_a_wrong_choice_is_refused(wish: dict[str, Any], tmp_path: Path) -> None:
    grid: dict[str, Any] = {"methods": "wanda,snip", "sparsity": 0.5}
    with pytest.raises(RecipeError, match=r"'dnse' is no choice. Did you mean 'dense'"):
        run(wish, tmp_path / "c", **grid, statistics="dnse")
    with pytest.raises(UnknownName, match="Type --pareto perplexity or --pareto kl"):
        run(wish, tmp_path / "c", **grid, pareto="js")
    with pytest.raises(RecipeError, match=r"prune.propagate follows from --statistics dense"):
        run(wish, tmp_path / "c", **grid, statistics="dense", settings=["prune.propagate=pruned"])
    with pytest.raises(RecipeError, match=r"snip-0.5-seed0: with --statistics dense: .* gradients"):
        run(wish, tmp_path / "c", **grid, statistics="dense")
    assert not (tmp_path / "c").exists()
