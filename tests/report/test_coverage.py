"""Experts that saw no or few calibration tokens are named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmprune
from llmprune import Report
from llmprune.report.coverage import coverage_line, coverage_text, experts_of
from tests.conftest import pico_tokenizer
from tests.report.conftest import Result
from tests.story.conftest import Command, command

__all__ = ["command"]


def starved(report: Report) -> dict[str, Any]:
    """Return a report whose first block's expert 2 saw nothing, and expert 3 fifty tokens."""
    data: dict[str, Any] = copy.deepcopy(dict(report.data))
    for row in data["blocks"][0]["sites"]:
        for expert, tokens in ((0, 70), (1, 90), (2, 0), (3, 50)):
            if f".experts.{expert}." in row["site"]:
                row["tokens"] = tokens
    return data


def test_tokens_are_those_of_the_rows(result: Result) -> None:
    report = Report.read(result("mixtral"))
    found = experts_of(report.data)
    assert [one.block for one in found] == [0, 1]
    rows = {row["site"]: row["tokens"] for block in report.data["blocks"] for row in block["sites"]}
    for one in found:
        for expert, tokens in one.tokens.items():
            assert rows[f"model.layers.{one.block}.mlp.experts.{expert}.up_proj"] == tokens
    # 4 sequences of 16 tokens, each of which goes to 2 experts
    assert [sum(one.tokens.values()) for one in found] == [128, 128]


def test_unseen_and_thin_experts_are_listed(result: Result) -> None:
    data = starved(Report.read(result("mixtral")))
    first = experts_of(data)[0]
    assert first.unseen == [2]
    assert first.thin == [3]  # its down projection has 64 columns
    line = coverage_text(data).splitlines()[1].split()
    assert line[:5] == ["0", "4", "0", "60", "90"]
    assert "1 (2)" in coverage_text(data)


def test_the_final_report_has_a_line_where_experts_lack_tokens(result: Result) -> None:
    report = Report(starved(Report.read(result("mixtral"))))
    assert "1 of 8 saw no token" in coverage_line(report.data)
    assert "experts " in repr(report)
    for block in report.data["blocks"]:
        for row in block["sites"]:
            row["tokens"] = 1000
    assert "experts " not in repr(report)


def test_dense_models_and_methods_without_tokens_say_so(result: Result) -> None:
    assert Report.read(result("llama")).coverage() == "this model has no experts"
    found = Report.read(result("mixtral", method="magnitude"))
    assert found.coverage() == "no calibration token flowed: magnitude looks at weights alone"
    assert coverage_line(found.data) == ""


def test_show_prints_the_table(result: Result, command: Command) -> None:
    folder = result("mixtral")
    ended = command("show", folder, "--coverage")
    assert ended.code == 0
    assert Report.read(folder).coverage() in ended.out
    assert "fewer tokens than columns" not in command("show", folder).out


def test_a_model_in_memory_has_tokens_but_no_columns(
    make_model: Callable[..., Any], text_file: Path
) -> None:
    report = llmprune.prune(
        make_model("mixtral"), sparsity=0.5, tokenizer=pico_tokenizer(), calib=str(text_file),
        num_samples=4, seq_len=16, quiet=True,
    )  # fmt: skip
    assert report.coverage().count("not known") == 2
    assert len(report.plot().axes) == 3
    assert "in memory" in report._repr_html_()
