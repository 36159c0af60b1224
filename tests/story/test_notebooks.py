"""The notebooks run from top to bottom, and are stored without what they printed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

HOME = Path(__file__).parents[2]
NOTEBOOKS = sorted((HOME / "eval" / "notebooks").glob("*.ipynb"))


def outputs(notebook: Any, kind: str) -> list[str]:
    """Return all outputs of a MIME type; what is printed is text/plain too."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output = {"data": {"text/plain": output.text}}
            found += [output["data"][kind]] if kind in output["data"] else []
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], Any]:
    """Return what runs a notebook by name in a folder."""
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this Python

    def execute(name: str, work: Path) -> Any:
        work.mkdir()
        notebook = nbformat.read(HOME / "eval" / "notebooks" / f"{name}.ipynb", as_version=4)
        place = {"metadata": {"path": str(work)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
        return notebook

    return execute


def test_the_quickstart_runs_and_shows_what_it_promises(
    tmp_path: Path, run: Callable[[str, Path], Any]
) -> None:
    work = tmp_path / "work"
    notebook = run("quickstart", work)
    assert (work / "demo-half" / "llmprune" / "report.json").exists()
    assert sorted(os.listdir(work)) == ["demo-half"]
    tables = "".join(outputs(notebook, "text/html"))
    assert tables.count("<caption") == 2
    assert "self_attn.q_proj" in tables
    assert len(outputs(notebook, "image/png")) == 1
    text = "\n".join(outputs(notebook, "text/plain"))
    dense, pruned = (float(value) for value in re.findall(r"^\S+ +(\d+\.\d+) \(", text, re.M))
    assert 1 < dense < pruned < 2 * dense
    assert text.count("dense: ") == text.count("pruned: ") == 2


def test_the_whole_road_runs_and_shows_what_it_promises(
    tmp_path: Path, run: Callable[[str, Path], Any]
) -> None:
    work = tmp_path / "work"
    notebook = run("prune_and_evaluate", work)
    assert sorted(os.listdir(work)) == ["pruned", "recovered"]
    tables = outputs(notebook, "text/html")
    assert [table.count("<caption") for table in tables] == [1, 1, 1]
    assert "mask-lora" in tables[1].lower() or "Masked LoRA" in tables[1]
    assert len(outputs(notebook, "image/png")) == 2
    text = "\n".join(outputs(notebook, "text/plain"))
    lines = re.findall(r"^(demo|pruned|recovered) +(\d+\.\d+)$", text, re.M)
    found = {name: float(value) for name, value in lines}
    assert 1 < found["demo"] < found["recovered"] < found["pruned"]
    assert text.count("demo       The old man") == text.count("recovered  The old man") == 1
    assert "library_name: transformers" in text
    assert "llmprune/report.png" in text


def test_the_comparison_runs_and_shows_what_it_promises(
    tmp_path: Path, run: Callable[[str, Path], Any]
) -> None:
    work = tmp_path / "work"
    notebook = run("compare_methods", work)
    assert os.listdir(work) == ["compared"]
    written = {path.name for path in (work / "compared").iterdir()}
    assert {"comparison.html", "comparison.csv", "pareto.svg"} <= written
    (table,) = outputs(notebook, "text/html")
    assert "magnitude" in table
    assert "Protocol" in table
    assert len(outputs(notebook, "image/png")) == 1
    text = "\n".join(outputs(notebook, "text/plain"))
    perplexities = re.findall(r"^(\w+) +0\.50 +(\d+\.\d+) .*Pareto|^(\w+) +0\.50", text, re.M)
    assert len(perplexities) == 2
    assert sum(bool(found[0]) for found in perplexities) == 1
