"""What the tests of reports share: small runs, and the same as plain data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmprune
from llmprune import Report
from tests.conftest import Pico

Result = Callable[..., Path]


@pytest.fixture
def result(pico: Pico, tmp_path: Path, text_file: Path, quick_gate: None) -> Result:
    """Prune a pico model of a family into a folder: `result("llama", method="wanda")`."""

    def prune(model_type: str = "llama", **wishes: Any) -> Path:
        asked = {"sparsity": 0.5, "num_samples": 4, "seq_len": 16, "calib": str(text_file)} | wishes
        out = tmp_path / f"{model_type}-result"
        settings = asked.pop("settings", ["evaluate.perplexity=false"])
        llmprune.prune(pico(model_type), out=out, quiet=True, settings=settings, **asked)
        return out

    return prune


@pytest.fixture
def many_blocks() -> Callable[[Report, int], Report]:
    """Return a report like another, with so many blocks; every third has no attention."""

    def repeat(report: Report, count: int) -> Report:
        data: dict[str, Any] = copy.deepcopy(dict(report.data))
        first, data["blocks"] = data["blocks"][0], []
        for index in range(count):
            block = copy.deepcopy(first) | {"block": index, "error": 0.1 + 0.01 * index}
            for row in block["sites"]:
                row["site"] = row["site"].replace(".0.", f".{index}.", 1)
            if index % 3 == 2:
                block["sites"] = [row for row in block["sites"] if "attn" not in row["site"]]
            data["blocks"].append(block)
        return Report(data)

    return repeat
