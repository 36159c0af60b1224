"""The notebooks run from top to bottom, and are stored without what they printed."""

from __future__ import annotations

import os
import re
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


def test_the_quickstart_runs_and_shows_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this Python
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(HOME / "eval" / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
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
