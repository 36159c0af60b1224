"""Killed anywhere and started again, a run ends with the same bytes and repeats no finished work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

import llmprune.steps
import llmprune.walk.rewriting
from llmprune import cli
from llmprune.checkpoint import sink
from llmprune.engine import cut as cutting, estimate, plan as planning, records
from llmprune.engine.solving import Cutter
from llmprune.walk import observe as observing
from tests.story.conftest import Command

NUM_BLOCKS = 4
Install = Callable[[int], None]
pytestmark = pytest.mark.usefixtures("quick_gate")


# How to die: each stage replaces a function so that its n-th call kills the process.


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def at_call(
    owner: Any,
    name: str,
    nth: int,
    *,
    when: Callable[..., bool] = lambda *args, **kwargs: True,
    after: bool = False,
    first: Callable[..., object] = lambda *args, **kwargs: None,
) -> None:
    """Kill the process at the n-th call of a function that `when` counts, or after that call.

    `first` is done before dying.
    """
    original, calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += when(*args, **kwargs)
        if calls == nth and not after:
            first(*args, **kwargs)
            kill()
        result = original(*args, **kwargs)
        if calls == nth and after:
            kill()
        return result

    setattr(owner, name, dying)


def half_a_file(tensors: Any, path: str, **options: Any) -> None:
    """Leave what a write that was cut short leaves."""
    content = safetensors.torch.save(tensors, **options)
    Path(path).write_bytes(content[: len(content) // 2])


def is_shard(temporary: Any, target: Any) -> bool:
    return str(target).endswith(".safetensors")


def is_final(old: Any, new: Any) -> bool:
    return str(old).endswith(".partial")


class Stage(NamedTuple):
    """Where to die: how many calls there are to choose from, and what to replace."""

    calls: int
    install: Install


STAGES = {
    "statistics": Stage(32, lambda n: at_call(observing, "call", n)),
    "solve": Stage(16, lambda n: at_call(Cutter, "cut", n)),
    "write": Stage(9, lambda n: at_call(safetensors.torch, "save_file", n, first=half_a_file)),
    "before rename": Stage(9, lambda n: at_call(sink.os, "replace", n, when=is_shard)),
    "after rename": Stage(9, lambda n: at_call(sink.os, "replace", n, when=is_shard, after=True)),
    "record": Stage(4, lambda n: at_call(records.Records, "write", n)),
    "after record": Stage(4, lambda n: at_call(records.Records, "write", n, after=True)),
    "index": Stage(1, lambda n: at_call(llmprune.walk.rewriting, "write_index", n)),
    "after index": Stage(
        1, lambda n: at_call(llmprune.walk.rewriting, "write_index", n, after=True)
    ),
    "gate": Stage(1, lambda n: at_call(llmprune.steps, "pass_gate", n)),
    "after gate": Stage(1, lambda n: at_call(llmprune.steps, "pass_gate", n, after=True)),
    "publish": Stage(1, lambda n: at_call(records.Records, "publish", n)),
    "final rename": Stage(1, lambda n: at_call(records.os, "replace", n, when=is_final)),
}


# Runs in forked children, whose deaths and answers are read from files.


@pytest.fixture(autouse=True)
def one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split the calibration into several micro-batches."""
    monkeypatch.setattr(estimate, "ACTIVATIONS", 1)


LOGS = ("output", "cut", "finished")


class Child(NamedTuple):
    """What a child left: its wait status, its output, the blocks it cut and those it finished."""

    status: int
    output: str
    cut: list[int]
    finished: list[int]

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    @property
    def code(self) -> int:
        return os.waitstatus_to_exitcode(self.status)


def in_child(
    home: Path, arguments: Sequence[object], prepare: Callable[[], None] = lambda: None
) -> Child:
    """Run the command in a forked child; `prepare` may break something there first."""
    logs = {name: home / name for name in LOGS}
    for path in logs.values():
        path.write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with logs["output"].open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            torch.set_num_threads(1)  # the parent's pool of threads does not survive a fork
            _log_calls(cutting, "_cut_block", logs["cut"], after=False, position=5)
            _log_calls(records.Records, "write", logs["finished"], after=True, position=1)
            prepare()
            cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    numbers = {
        name: [int(line) for line in logs[name].read_text().split()] for name in LOGS[1:]
    }
    return Child(status, logs["output"].read_text(), numbers["cut"], numbers["finished"])


def _log_calls(owner: Any, name: str, path: Path, *, after: bool, position: int) -> None:
    """Append the block number that a function is given to a file."""
    original = getattr(owner, name)

    def logged(*args: Any, **kwargs: Any) -> Any:
        def note() -> None:
            with path.open("a") as file:
                file.write(f"{args[position]}\n")

        if not after:
            note()
        result = original(*args, **kwargs)
        if after:
            note()
        return result

    setattr(owner, name, logged)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file and folder of a result, without what tells of the run itself."""
    own = {"llmprune/report.json", "llmprune/events.jsonl"}
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
        if str(path.relative_to(folder)) not in own
    }


def marks(folder: Path, finished: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Return inode and time of the files of finished blocks."""
    found = {}
    for index in finished:
        stem = f"{index + 1:05d}-of-{NUM_BLOCKS + 1:05d}.safetensors"
        for name in (f"model-{stem}", f"llmprune/masks-{stem}"):
            status = (folder / name).stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def events(out: Path) -> list[dict[str, Any]]:
    text = (out / "llmprune" / "events.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def arguments(source: Path, text_file: Path, tmp_path: Path) -> list[object]:
    """The command that is run, killed and repeated; it writes tmp_path/out."""
    return [
        *("--model", source, "--sparsity", 0.5, "--calib", text_file, "--num-samples", 8),
        *("--seq-len", 16, "--no-eval", "--out", tmp_path / "out"),
    ]


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """Return what the same command leaves when nothing disturbs it; each is run once."""
    known: dict[str, dict[str, bytes]] = {}

    def contents_of(arguments: list[object]) -> dict[str, bytes]:
        assert arguments[-2] == "--out"
        key = " ".join(map(str, arguments[:-1]))
        if key not in known:
            home = tmp_path_factory.mktemp("expected")
            child = in_child(home, [*arguments[:-1], home / "out"])
            assert child.code == 0, child.output
            known[key] = contents(home / "out")
        return known[key]

    return contents_of


def kill_and_resume(
    arguments: list[object], expected: dict[str, bytes], stage: Stage, nth: int
) -> None:
    """Kill a run, run it again, and check all that a resumed run owes."""
    out = Path(str(arguments[-1]))
    partial = out.with_name("out.partial")
    first = in_child(out.parent, arguments, lambda: stage.install(nth))
    assert first.killed, first.output
    assert partial.is_dir()
    assert not out.exists()
    before = marks(partial, first.finished)

    second = in_child(out.parent, arguments)
    assert second.code == 0, second.output
    assert [path.name for path in out.parent.iterdir() if path.name not in LOGS] == ["out"]
    assert contents(out) == expected
    assert second.cut == [index for index in range(NUM_BLOCKS) if index not in first.finished]
    assert marks(out, first.finished) == before
    if first.finished:
        last = max(first.finished)
        assert f"resumed after block {last}\n" in second.output
        assert last == next(event["after"] for event in events(out) if event["event"] == "resumed")


DRAW = random.Random(2024)
DRAWN = [(name, DRAW.randint(1, STAGES[name].calls)) for name in DRAW.sample(sorted(STAGES), 3)]
EVERY = [
    (name, nth)
    for name, stage in STAGES.items()
    for nth in sorted(DRAW.sample(range(1, stage.calls + 1), min(3, stage.calls)))
]


@pytest.mark.parametrize(("name", "nth"), DRAWN)
def test_a_killed_run_resumes_to_the_same_bytes(
    name: str, nth: int, arguments: list[object], expected: Callable[..., dict[str, bytes]]
) -> None:
    kill_and_resume(arguments, expected(arguments), STAGES[name], nth)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--set", "prune.propagate=dense"),
        ("--pattern", "ffn-channels", "--set", "prune.multiple=1"),
        ("--method", "magnitude"),
    ],
    ids=["wanda", "dense", "shrunk", "magnitude"],
)
@pytest.mark.parametrize(("name", "nth"), EVERY)
def test_every_stage_may_be_killed(
    name: str,
    nth: int,
    more: tuple[str, ...],
    arguments: list[object],
    expected: Callable[..., dict[str, bytes]],
) -> None:
    if name == "statistics" and "magnitude" in more:
        pytest.skip("magnitude reads no text")
    if name == "solve":
        nth = (nth - 1) % (NUM_BLOCKS * (1 if "ffn-channels" in more else 4)) + 1
    if "ffn-channels" in more:
        more = (*more, "--set", "prune.sparsity=0.25")
    arguments = [*arguments[:-2], *more, *arguments[-2:]]
    kill_and_resume(arguments, expected(arguments), STAGES[name], nth)
