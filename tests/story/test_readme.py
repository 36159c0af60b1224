"""The commands that the README shows run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.story.conftest import Command

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """Return the lines of the README's bash blocks that begin with llmprune, in their order."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line.startswith("llmprune ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the commands run one after the other, with llmprune on the path."""
    home = tmp_path_factory.mktemp("readme")
    tools = home / ".tools"
    tools.mkdir()
    script = tools / "llmprune"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llmprune "$@"\n')
    script.chmod(0o755)
    for folder in ("configs", "eval"):
        (home / folder).symlink_to(README.parent / folder)
    return home


def test_the_readme_shows_a_command_that_needs_no_download() -> None:
    assert "llmprune --model demo --sparsity 0.5" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_is_carried_out(
    line: str, workplace: Path, command: Command, quick_gate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which spares starting Python for each."""
    place = workplace / "here"
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    for folder in ("configs", "eval"):
        if not Path(folder).exists():
            Path(folder).symlink_to(README.parent / folder)
    ended = command(*shlex.split(line, comments=True)[1:])
    assert ended.code == 0, ended.err


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_runs_as_typed(line: str, workplace: Path) -> None:
    environment = os.environ | {
        "PATH": f"{workplace / '.tools'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
        "HF_HUB_OFFLINE": "1",
    }
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
