"""Readable in a pipe and on a terminal, and events that are complete JSON lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune.base.progress import Progress, human_bytes, human_count, human_seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def events(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_before_bind_are_written_first(tmp_path: Path) -> None:
    progress = Progress("quiet")
    progress.event("early", value=1)
    progress.bind(tmp_path / "events.jsonl")
    progress.event("late", value=float("inf"), folder=tmp_path)
    early, late = events(tmp_path / "events.jsonl")
    assert (early["event"], early["value"]) == ("early", 1)
    assert (late["event"], late["value"], late["folder"]) == ("late", "inf", str(tmp_path))
    assert str(early["time"]).endswith("+00:00")


def test_events_survive_the_rename_of_their_folder(tmp_path: Path) -> None:
    progress = Progress("quiet")
    (tmp_path / "out.partial").mkdir()
    progress.bind(tmp_path / "out.partial" / "events.jsonl")
    progress.event("first")
    (tmp_path / "out.partial").rename(tmp_path / "out")
    progress.event("second")
    progress.bind(tmp_path / "out" / "events.jsonl")
    names = [event["event"] for event in events(tmp_path / "out" / "events.jsonl")]
    assert names == ["first", "second"]


def test_a_pipe_gets_one_plain_line_per_tenth() -> None:
    stream = io.StringIO()
    with Progress("rich", stream).stage("cut", total=40) as stage:
        for block in range(40):
            stage.advance(f"block {block}", sparsity=0.5, error=0.012, memory=812e6)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("cut 40/40")
    assert lines[-1].endswith("block 39  sparsity 50.0 %  error 1.2e-02  memory 812 MB")
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_and_notes_above_it() -> None:
    stream = Terminal()
    progress = Progress("rich", stream)
    with progress.stage("cut", total=2) as stage:
        stage.advance("a")
        progress.note("steps[0].prune is kept as typed")
        with progress.stage("inner", total=1) as inner:
            inner.advance("b")
        stage.advance("c")
    assert "2/2" in stream.getvalue() and "1/1" in stream.getvalue()
    assert "steps[0].prune is kept as typed" in stream.getvalue()


def test_json_mode_prints_events_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("json")
    progress.note("hello")
    progress.table("numbers", ["a"], [[1]])
    with progress.stage("cut", total=1) as stage:
        stage.advance("block 0")
    names = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert names == ["note", "stage_start", "stage_advance", "stage_end"]


def test_quiet_mode_shows_warnings_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("quiet")
    progress.note("hello")
    progress.table("numbers", ["a"], [[1]])
    progress.warn("few windows")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: few windows\n")
    assert progress.warnings == ["few windows"]


def test_a_stage_that_fails_records_how_far_it_came(tmp_path: Path) -> None:
    progress = Progress("quiet")
    progress.bind(tmp_path / "events.jsonl")
    with pytest.raises(RuntimeError), progress.stage("cut", total=3) as stage:
        stage.advance()
        raise RuntimeError
    last = events(tmp_path / "events.jsonl")[-1]
    assert (last["event"], last["done"], last["total"]) == ("stage_end", 1, 3)


def test_tables_print_brackets_as_typed_and_wide_rows_on_one_line() -> None:
    stream = io.StringIO()
    wide = "model.layers.0.mlp.down_proj " * 3
    Progress("rich", stream).table("linears [all]", ["name", "kept"], [[wide + "[0]", 0.512345]])
    assert "linears [all]" in stream.getvalue()
    assert any(wide + "[0]" in line and "0.5123" in line for line in stream.getvalue().splitlines())


def test_importing_the_display_does_not_import_rich() -> None:
    code = "import sys, llmprune.base.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (human_bytes(0), "0 B"),
        (human_bytes(999_600), "1 MB"),
        (human_bytes(1.5e9), "1.5 GB"),
        (human_count(128), "128"),
        (human_count(8_030_000_000), "8.03 B"),
        (human_seconds(0.42), "0.4 s"),
        (human_seconds(59.7), "1 min 00 s"),
        (human_seconds(7 * 60 + 2 * 3600 + 10), "2 h 07 min"),
    ],
)
def test_human_numbers(shown: str, expected: str) -> None:
    assert shown == expected
