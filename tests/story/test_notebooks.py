"""The notebooks run from top to bottom, and are stored without what they printed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

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


# Before each notebook: nothing is left of the one before, gates need no further Python, and runs
# write no texts.
BEGINNING = """
def begin(folder):
    import os
    from subprocess import CompletedProcess
    from types import SimpleNamespace
    from llmprune.delivery import gate, stock
    from llmprune.evaluation import samples

    def run_here(command, **options):
        try:
            stock.main(command[2])
        except Exception as error:
            return CompletedProcess(command, 1, "", repr(error))
        return CompletedProcess(command, 0, "", "")

    gate.subprocess = SimpleNamespace(run=run_here)
    samples.PROMPTS = ()
    os.mkdir(folder)
    os.chdir(folder)

begin({folder!r})
%reset -f
"""


class Ran(NamedTuple):
    """A notebook with its outputs, and the folder that it worked in."""

    notebook: Any
    work: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """Run all notebooks, one after the other in one kernel, which spares starting Python anew."""
    home = tmp_path_factory.mktemp("notebooks")
    found = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    whole = nbformat.v4.new_notebook()
    for name, notebook in found.items():
        beginning = BEGINNING.format(folder=str(home / name))
        whole.cells += [nbformat.v4.new_code_cell(beginning), *notebook.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HOME))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this Python
        place = {"metadata": {"path": str(home)}}
        NotebookClient(whole, timeout=300, kernel_name="python3", resources=place).execute()
    return {name: Ran(notebook, home / name) for name, notebook in found.items()}


def test_the_quickstart_runs_and_shows_what_it_promises(ran: dict[str, Ran]) -> None:
    notebook, work = ran["quickstart"]
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


def test_the_whole_road_runs_and_shows_what_it_promises(ran: dict[str, Ran]) -> None:
    notebook, work = ran["prune_and_evaluate"]
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


def test_the_comparison_runs_and_shows_what_it_promises(ran: dict[str, Ran]) -> None:
    notebook, work = ran["compare_methods"]
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
