"""A grid from end to end: cells are normal runs, what is shared is made once, and it resumes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import llmprune
from llmprune import cli, steps
from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.comparison import shared, working
from llmprune.comparison.grid import grid_from
from llmprune.comparison.previewing import make_grid
from llmprune.comparison.result import Comparison
from llmprune.engine import gradients

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def wish(pico: Any, text_file: Path) -> dict[str, Any]:
    """What every comparison here is of: a few short windows of a pico model."""
    return {
        **{"model": str(pico("llama")), "calib": str(text_file), "evaluation": str(text_file)},
        **{"num_samples": 4, "seq_len": 40, "num_windows": 3, "quiet": True},
    }


def run(wish: dict[str, Any], out: Path, **more: Any) -> Comparison:
    found = llmprune.compare(**{**wish, **more}, out=out)
    assert found is not None
    return found


def test_a_cell_is_what_the_bare_command_writes_and_what_is_shared_is_made_once(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = gradients.take_gradients

    def take_counted(*args: Any, **rest: Any) -> Any:
        taken.append(1)
        return take(*args, **rest)

    monkeypatch.setattr(shared, "take_gradients", take_counted)
    found = run(wish, tmp_path / "c", methods="snip", sparsity="0.5,0.25", keep=True)
    names = ["snip-0.5-seed0", "snip-0.25-seed0"]
    assert [cell["name"] for cell in found.data["cells"]] == names
    assert not found.failed
    assert len(taken) == 1
    told = {each["what"]: (each["made"], each["used"]) for each in found.data["shared"]}
    assert told == {"calibration windows": (1, 2), "dense baseline": (1, 2), "gradients": (1, 2)}
    assert all(each["seconds"] > 0 for each in found.data["shared"])

    alone = llmprune.prune(
        *(wish["model"],),
        method="snip",
        sparsity=0.25,
        out=tmp_path / "alone",
        calib=wish["calib"],
        num_samples=4,
        seq_len=40,
        quiet=True,
        settings=[f"evaluate.data={wish['evaluation']}", "evaluate.num_windows=3"],
    )
    kept = tmp_path / "c" / "runs" / "snip-0.25-seed0"
    cell = found.data["cells"][1]
    assert cell["files"] == dict(alone.data["files"])
    for file in [*alone.data["files"], "config.json", "model.safetensors.index.json"]:
        assert (kept / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert alone.perplexity is not None
    dense, pruned = alone.perplexity
    assert found.data["dense"]["perplexity"] == pytest.approx(dense, rel=1e-6)
    assert cell["perplexity"] == pytest.approx(pruned, rel=1e-6)
    assert cell["loss"] == pytest.approx(math.log(pruned), rel=1e-6)
    assert cell["kept"] == alone.data["parameters_after"] - round(
        alone.data["sparsity_of_all"] * alone.data["parameters_before"]
    )


def test_an_interrupted_grid_goes_on_and_only_grows(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    done: list[str] = []
    real = working.prune_and_measure

    def stop_at_the_second(*args: Any, **rest: Any) -> Any:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **rest)

    monkeypatch.setattr(working, "prune_and_measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(wish, out, methods="magnitude,random", sparsity=0.5)
    assert [path.stem for path in (out / "cells").iterdir()] == done == ["magnitude-0.5-seed0"]
    assert not (out / "comparison.json").exists()
    first = (out / "cells" / f"{done[0]}.json").read_bytes()

    def count(*args: Any, **rest: Any) -> Any:
        done.append(args[1].name)
        return real(*args, **rest)

    monkeypatch.setattr(working, "prune_and_measure", count)
    run(wish, out, methods="magnitude,random", sparsity=0.5)
    assert done == ["magnitude-0.5-seed0", "random-0.5-seed0"]
    assert (out / "cells" / f"{done[0]}.json").read_bytes() == first
    assert not (out / "runs").exists()
    assert {path.stem for path in (out / "reports").iterdir()} == set(done)

    found = run(wish, out, methods="magnitude,random", sparsity=0.5, seeds="0,1")
    assert done[2:] == ["magnitude-0.5-seed1", "random-0.5-seed1"]
    assert [row.num_seeds for row in found.rows] == [2, 2]
    assert found.rows[0].perplexity.deviation == 0.0  # magnitude draws nothing
    assert found.rows[1].perplexity.deviation

    with pytest.raises(
        RecipeError, match=r"seeds: without 1, which was compared(.|\n)*--overwrite"
    ):
        run(wish, out, methods="magnitude,random", sparsity=0.5)
    with pytest.raises(RecipeError, match="num_windows: 3 then, 2 now"):
        run(wish, out, methods="magnitude,random", sparsity=0.5, seeds="0,1", num_windows=2)
    run(wish, out, methods="magnitude", sparsity=0.5, overwrite=True)
    assert [path.stem for path in (out / "cells").iterdir()] == ["magnitude-0.5-seed0"]


def test_a_cell_that_fails_costs_only_itself_and_is_tried_again(
    wish: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = steps.run_streamed

    def fail_once(opened: Any, *args: Any, **rest: Any) -> Any:
        if opened.plan.method.name == "random":
            raise CheckpointError("the shard is damaged")
        return real(opened, *args, **rest)

    monkeypatch.setattr(working, "run_streamed", fail_once)
    arguments = ["compare", "--out", str(tmp_path / "c"), "--sparsity", "0.5", "--num-windows", "3"]
    arguments += ["--model", wish["model"], "--perplexity", wish["evaluation"], "--seq-len", "40"]

    def command(methods: str) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main([*arguments, "--methods", methods])
        return int(ended.value.code or 0)

    assert command("random,magnitude") == 2
    said = capsys.readouterr()
    assert "failed: random-0.5-seed0: the shard is damaged" in said.out
    assert "magnitude  0.5" in said.out
    assert "Traceback" not in said.out + said.err
    monkeypatch.setattr(working, "run_streamed", real)
    assert command("random,magnitude") == 0
    assert not Comparison.read(tmp_path / "c").failed


def test_a_fault_of_ours_is_kept_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def divide(*args: Any, **rest: Any) -> Any:
        return 1 / 0

    monkeypatch.setattr(working, "prune_and_measure", divide)
    grid = make_grid("demo", "wanda", 0.5)
    found = working.attempt(shared.Shared(tmp_path, grid), grid.cells[0], keep=False)
    assert found["error"]["code"] == 1
    assert found["error"]["message"].startswith("ZeroDivisionError")
    assert "in divide" in found["error"]["traceback"]


def test_impossible_cells_are_named_before_anything_is_written(
    wish: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "c"
    grid = {"methods": "magnitude,flap", "pattern": "2:4"}
    with pytest.raises(RecipeError, match=r"1 of 2 (.|\n)*flap-2of4-seed0(.|\n)*--skip-impossible"):
        run(wish, out, **grid)
    assert not out.exists()
    found = run(wish, out, **grid, skip_impossible=True)
    assert [row.asked for row in found.rows] == ["2:4"]
    assert [each["name"] for each in found.data["skipped"]] == ["flap-2of4-seed0"]
    with pytest.raises(RecipeError, match="Nothing is left"):
        run(wish, tmp_path / "d", methods="flap", pattern="2:4", skip_impossible=True)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        run(wish, tmp_path / "e", methods="magnitude", sparsity=0.5, overwrite=True)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["mine.txt"]


def test_processes_share_the_cells_by_their_locks(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    helped: list[str] = []

    class Child:
        """Stands in for another process: it works at once, while one cell is held by a third."""

        def __init__(self, command: list[str], **rest: Any) -> None:
            assert command[1:3] == ["-m", "llmprune.comparison.working"]
            lock = out / "work" / "locks" / "random-0.5-seed0.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                working.main(command[3:])
            helped.extend(path.stem for path in (out / "cells").iterdir())

        def poll(self) -> int:
            return 0

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Child)
    found = run(wish, out, methods="magnitude,random", sparsity=0.5, jobs=2)
    assert helped == ["magnitude-0.5-seed0"]
    assert [cell["method"] for cell in found.data["cells"]] == ["magnitude", "random"]
    assert not found.failed


def test_a_rank_of_torchrun_does_its_share_and_leaves_the_rest_to_the_first(
    wish: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    grid: dict[str, Any] = {"methods": "magnitude", "sparsity": "0.25,0.5"}
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert run(wish, out, **grid).data["protocol"]["threads"] >= 1
    shutil.rmtree(out / "cells")
    monkeypatch.setenv("RANK", "1")
    assert llmprune.compare(**wish, **grid, out=out) is None
    assert len(list((out / "cells").iterdir())) == 2


def test_a_dry_run_writes_nothing(
    wish: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", wish["model"], "--methods", "wanda,snip", "--sparsity", "0.5,0.6"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *arguments, "--calib", wish["calib"], "--dry-run", "--json"])
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert len(told["cells"]) == 4
    assert told["disk_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_calibrated_and_measured_on_is_told(
    wish: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("again a " * 80)
    texts = {"calib": str(text), "evaluation": str(text)}
    found = run(wish | texts, tmp_path / "c", methods="wanda", sparsity=0.5)
    assert found.data["protocol"]["leak"] == {"0": 1.0}
    assert "100.00 % of the evaluated tokens" in str(found)
    assert "Choose another --calib" in capsys.readouterr().err
    told = json.loads((tmp_path / "c" / "grid.json").read_text())
    assert grid_from(told["grid"]).calib == str(text)
