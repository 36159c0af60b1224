"""A run without perplexity says why among its last lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmprune.report.unmeasured import unmeasured_text
from tests.conftest import Pico
from tests.story.conftest import Command, command

__all__ = ["command"]


@pytest.mark.parametrize(
    ("steps", "warnings", "said"),
    [
        ([{"prune": {}}], [], "the recipe has no step `evaluate`; llmprune eval small --perp"),
        ([{"evaluate": {"perplexity": "auto"}}], ["perplexity is not measured: no text"],
         "not measured: no text"),
        ([{"evaluate": {"perplexity": "auto"}}], ["another"], "--set evaluate.perplexity=true in"),
        ([{"evaluate": {"perplexity": False}}], [], "as asked; llmprune eval small --perplexity"),
    ],
)  # fmt: skip
def test_every_reason_is_told(steps: list[Any], warnings: list[str], said: str) -> None:
    data = {"out": "small", "run": {"wish": {"steps": steps}}, "warnings": warnings}
    assert said in unmeasured_text(data)
    assert unmeasured_text({**data, "out": None}).startswith("not measured of a model in memory")


def test_the_command_says_it(
    pico: Pico, tmp_path: Path, text_file: Path, command: Command, quick_gate: None
) -> None:
    wish = ("--model", pico("llama"), "--sparsity", 0.5, "--seq-len", 16, "--num-samples", 2)
    text = ("--calib", text_file, "--method")
    asked = command(*wish, *text, "magnitude", "--no-eval", "--out", tmp_path / "a")
    assert f"perplexity  not measured, as asked; llmprune eval {tmp_path / 'a'}" in asked.out
    missing = ("--set", "evaluate.data=gone.txt", "--set", "evaluate.num_windows=1")
    gone = command(*wish, *text, "sparsegpt", *missing, "--out", tmp_path / "b")
    assert gone.code == 0
    assert "perplexity  not measured: evaluate.data: 'gone.txt' is neither" in gone.out
