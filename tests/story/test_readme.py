"""The commands that the README shows run as they are written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from llmprune import asking
from llmprune.engine import planning
from llmprune.evaluation import speed, stopwatch
from tests.story.conftest import Command

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """Return the lines of the README's bash blocks that begin with llmprune, in their order."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line.startswith("llmprune ")]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """An empty folder in which the commands run one after the other, with llmprune on the path."""
    home = tmp_path / "readme"
    home.mkdir()
    tools = home / ".tools"
    tools.mkdir()
    script = tools / "llmprune"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmprune "$@"\n')
    script.chmod(0o755)
    for folder in ("configs", "eval"):
        (home / folder).symlink_to(README.parent / folder)
    return home


class Beside:
    """Stands in for a measuring process: the same script in a thread, without starting Python."""

    def __init__(self, command: list[str], **options: Any) -> None:
        assert Path(command[-1]).name == "stopwatch.py"
        requests, self.stdin = (
            os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True)
        )
        self.stdout, said = (
            os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True)
        )

        def work() -> None:
            with requests, said:
                stopwatch.serve(
                    requests, lambda words: print(json.dumps(words), file=said, flush=True)
                )

        self.thread = Thread(target=work)
        self.thread.start()

    def kill(self) -> None:
        self.stdin.close()

    def communicate(self) -> None:
        self.thread.join()
        self.stdout.close()


def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
    """Let threads wait for one another while they load, which transformers asks for."""
    lock = Lock()

    def locked(job: dict[str, Any]) -> Any:
        with lock:
            return load(job)

    return locked


def fewer_windows(pose: Callable[..., Any]) -> Callable[..., Any]:
    """Let runs measure perplexity on two windows of the many that they ask for."""
    return lambda *args, **named: pose(*args, **named | {"num_windows": 2})


def test_the_readme_shows_a_command_that_needs_no_download() -> None:
    assert "llmprune --model demo --sparsity 0.5" in README.read_text(encoding="utf-8")


def test_the_commands_of_the_readme_are_carried_out_in_their_order(
    workplace: Path, command: Command, quick_gate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which spares starting Python for each; some work on what others wrote.

    Sequences are short where a command does not say how long they are.
    """
    monkeypatch.setattr(planning, "MAX_SEQ_LEN", 64)
    monkeypatch.setattr(speed, "subprocess", SimpleNamespace(Popen=Beside, PIPE=None))
    monkeypatch.setattr(stopwatch, "load", one_at_a_time(stopwatch.load))
    monkeypatch.setattr(asking, "question_for", fewer_windows(asking.question_for))
    monkeypatch.chdir(workplace)
    assert len(commands()) > 10
    for line in commands():
        ended = command(*shlex.split(line, comments=True)[1:])
        assert ended.code == 0, f"{line}\n{ended.err}"


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_typed(workplace: Path) -> None:
    environment = os.environ | {
        "PATH": f"{workplace / '.tools'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "HF_HUB_OFFLINE": "1",
    }
    for line in commands():
        done = subprocess.run(
            line,
            shell=True,
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
