"""What measuring by tasks needs: the repository's own tasks, a text, and a folder like a result."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.api import load
from llmprune.checkpoint.locate import open_source

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
DEMO = Path(str(resources.files("llmprune") / "demo"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `datasets` keep its tables, and llmprune its scores, in this test's folder."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the bundled evaluation text, up to the end of a line."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    text = (DEMO / "evaluation.txt").read_text(encoding="utf-8")[:6000]
    path.write_text(text[: text.rindex("\n") + 1], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo without the smaller 80 % of each linear, with the records that evaluation reads."""
    folder = tmp_path_factory.mktemp("result") / "demo-0.8"
    model: Any = load("demo", dtype="float32", device="cpu")
    with torch.no_grad():
        for name, weight_OI in model.named_parameters():
            if "_proj" in name:
                weight_OI[weight_OI.abs() < weight_OI.abs().quantile(0.8)] = 0
    model.save_pretrained(folder)
    for path in (DEMO / "model").glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    source = {"name": "demo", "revision": None, "fingerprint": open_source("demo").fingerprint()}
    (folder / "llmprune").mkdir()
    (folder / "llmprune" / "run.json").write_text(json.dumps({"source": source, "origin": source}))
    (folder / "llmprune" / "report.json").write_text("{}")
    return folder
