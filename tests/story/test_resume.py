"""Killed anywhere and started again, a run ends with the same bytes, repeating no finished work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures.thread import _python_exit
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch

import llmprune.steps
import llmprune.walk.rewriting
from llmprune import api, cli
from llmprune.base.errors import NumericalError
from llmprune.checkpoint import sink
from llmprune.engine import cost, cutting, gradients, planning, records
from llmprune.engine.probing import Prober
from llmprune.engine.solving import Cutter
from llmprune.repair import halves
from llmprune.walk import observation
from tests.conftest import gate_here

NUM_BLOCKS = 4
Install = Callable[[int], None]
Expected = Callable[[list[Any]], dict[str, bytes]]
pytestmark = pytest.mark.usefixtures("quick_gate")
unproven = pytest.mark.usefixtures("no_gate")  # what is compared with a run that was not killed


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
    "statistics": Stage(32, lambda n: at_call(observation, "call", n)),
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
    monkeypatch.setattr(cost, "ACTIVATIONS", 1)


@pytest.fixture(autouse=True, scope="module")
def warm(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import here, once, what every child would import for itself."""
    out = tmp_path_factory.mktemp("warm") / "out"
    wish: dict[str, Any] = {"sparsity": 0.5, "num_samples": 2, "seq_len": 16, "quiet": True}
    with gate_here():
        api.prune(source, calib=text_file, out=out, settings=["evaluate.perplexity=false"], **wish)


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
    pid = begun(home, arguments, prepare)
    _, status = os.waitpid(pid, 0)
    logs = {name: (home / name).read_text() for name in LOGS}
    numbers = {name: [int(line) for line in logs[name].split()] for name in LOGS[1:]}
    return Child(status, logs["output"], numbers["cut"], numbers["finished"])


def begun(home: Path, arguments: Sequence[object], prepare: Callable[[], None]) -> int:
    """Begin the command in a forked child and return its number; its logs lie in `home`."""
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
            _python_exit()  # as at the end of any process: threads finish what they have begun
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


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
    own = {"llmprune/report.json", "llmprune/report.html", "llmprune/events.jsonl"}
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
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
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
    # The kill may come between a record and the line that says it was written.
    records = (partial / "llmprune" / "records").glob("[0-9]*.json")
    finished = sorted(int(path.stem) - 1 for path in records)
    assert set(first.finished) <= set(finished)
    before = marks(partial, finished)

    second = in_child(out.parent, arguments)
    assert second.code == 0, second.output
    assert [path.name for path in out.parent.iterdir() if path.name not in LOGS] == ["out"]
    assert contents(out) == expected
    assert second.cut == [index for index in range(NUM_BLOCKS) if index not in finished]
    assert marks(out, finished) == before
    if finished:
        last = max(finished)
        assert f"resumed after block {last}\n" in second.output
        assert last == next(event["after"] for event in events(out) if event["event"] == "resumed")


GROUPS = (
    ("statistics", "solve", "write"),
    ("before rename", "after rename", "record", "after record"),
    ("index", "after index", "gate", "after gate", "publish", "final rename"),
)
DRAW = random.Random(2024)
DRAWN = [(name, DRAW.randint(1, STAGES[name].calls)) for name in map(DRAW.choice, GROUPS)]
EVERY = [
    (name, nth)
    for name, stage in STAGES.items()
    for nth in sorted(DRAW.sample(range(1, stage.calls + 1), min(3, stage.calls)))
]
VARIANTS = {
    "wanda": (),
    "dense": ("--set", "prune.propagate=dense"),
    "shrunk": ("--pattern", "ffn-channels", "--set", "prune.sparsity=0.25"),
    "magnitude": ("--method", "magnitude"),
}


@unproven
@pytest.mark.parametrize(("name", "nth"), DRAWN)
def test_a_killed_run_resumes_to_the_same_bytes(
    name: str, nth: int, arguments: list[object], expected: Expected
) -> None:
    kill_and_resume(arguments, expected(arguments), STAGES[name], nth)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "nth"), EVERY)
def test_every_stage_may_be_killed(
    name: str, nth: int, variant: str, arguments: list[object], expected: Expected
) -> None:
    if (name, variant) == ("statistics", "magnitude"):
        pytest.skip("magnitude reads no text")
    if (name, variant) == ("solve", "shrunk"):
        nth = (nth - 1) % NUM_BLOCKS + 1  # one group per block
    arguments = [*arguments[:-2], *VARIANTS[variant], *arguments[-2:]]
    kill_and_resume(arguments, expected(arguments), STAGES[name], nth)


# What precedes the cut, and what follows it within a block: kept as far as it is whole.

SEARCH = (
    *("--set", "prune.allocation=evopress", "--set", "prune.options.generations=3"),
    *("--set", "prune.options.offspring=4", "--set", "prune.options.start=0"),
)
TARGET = ("--target", "ppl=+2%", "--set", "prune.sparsity=0.6")
NOISE = ("--set", "prune.allocation=ecoflap", "--method", "sparsegpt")
LONGER = [
    ("gradients", ("--method", "gblm"), lambda n: at_call(gradients.Gradients, "keep", n), 2),
    ("search", SEARCH, lambda n: at_call(Prober, "_advance", n), 7),
    ("gradients whole", ("--method", "gblm"), lambda n: at_call(Cutter, "cut", n), 6),
    ("gradients kept", ("--method", "gblm"),
     lambda n: at_call(gradients.Gradients, "keep", n, after=True), 3),
    ("search judged", SEARCH, lambda n: at_call(Prober, "_compare", n), 4),
    ("search over", SEARCH, lambda n: at_call(Cutter, "reorder_writers", n), 2),
    ("noise", NOISE, lambda n: at_call(Prober, "_advance", n), 3),
    ("noise answered", NOISE, lambda n: at_call(Prober, "_walk", n, after=True), 1),
    ("second order", ("--method", "alps"), lambda n: at_call(Cutter, "cut", n), 7),
    ("repair", ("--set", "prune.repair=halves"), lambda n: at_call(halves, "fit", n), 4),
    ("repair of blocks", ("--set", "prune.repair=block"), lambda n: at_call(halves, "fit", n), 3),
    ("regional repair", ("--method", "wanda++"),
     lambda n: at_call(cutting, "regional_squares", n), 9),
    ("target", TARGET, lambda n: at_call(Prober, "_walk", n), 2),
    ("target met", TARGET, lambda n: at_call(Cutter, "reorder_writers", n), 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "install", "nth"),
    [
        pytest.param(*row, id=name, marks=[] if index < 2 else pytest.mark.slow)
        for index, (name, *row) in enumerate(LONGER)
    ],
)
def test_surveys_searches_and_repairs_may_be_killed(
    options: tuple[str, ...],
    install: Install,
    nth: int,
    arguments: list[object],
    expected: Expected,
    text_file: Path,
) -> None:
    own = ("--set", f"evaluate.data={text_file}", *options)
    arguments = [*arguments[:-2], *own, *arguments[-2:]]
    kill_and_resume(arguments, expected(arguments), Stage(nth, install), nth)


@pytest.mark.slow
def test_gradients_whose_inputs_are_on_disk_resume_and_leave_nothing(
    arguments: list[object], expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*arguments[:-2], "--method", "gblm", *arguments[-2:]]
    in_memory = expected(arguments)
    decide = planning.estimate
    monkeypatch.setattr(
        planning,
        "estimate",
        lambda *args, **kwargs: replace(
            decide(*args, **kwargs), gradient_place="disk", gradient_bytes=40_000
        ),
    )
    killed = in_child(tmp_path, arguments, lambda: at_call(gradients.Gradients, "keep", 6))
    assert killed.killed, killed.output
    assert list((tmp_path / "out.partial").rglob("inputs/*"))
    second = in_child(tmp_path, arguments)
    assert second.code == 0, second.output
    assert contents(tmp_path / "out") == in_memory


@unproven
def test_with_dense_propagation_a_resumed_run_feeds_what_the_source_computes(
    arguments: list[object], expected: Expected
) -> None:
    arguments = [*arguments[:-2], *VARIANTS["dense"], *arguments[-2:]]
    kill_and_resume(arguments, expected(arguments), STAGES["solve"], 11)


@unproven
def test_the_report_says_after_which_block_a_run_was_resumed(
    arguments: list[object], tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments, lambda: STAGES["record"].install(3)).killed
    assert in_child(tmp_path, arguments).code == 0
    report = json.loads((tmp_path / "out/llmprune/report.json").read_text(encoding="utf-8"))
    assert report["resumed_after"] == 1


@unproven
def test_hidden_states_on_disk_resume_and_leave_nothing(
    arguments: list[object],
    expected: Expected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_memory = expected(arguments)
    decide = planning.estimate
    monkeypatch.setattr(
        planning, "estimate", lambda *args, **kwargs: replace(decide(*args, **kwargs), place="disk")
    )
    assert in_child(tmp_path, arguments, lambda: STAGES["statistics"].install(20)).killed
    assert list((tmp_path / "out.partial").rglob("hidden-*.bin"))
    second = in_child(tmp_path, arguments)
    assert second.code == 0, second.output
    found = contents(tmp_path / "out")
    assert json.loads(found.pop("llmprune/run.json"))["place"] == "disk"
    assert found == {name: value for name, value in in_memory.items() if "run.json" not in name}


@unproven
def test_a_resumed_run_obeys_the_threads_of_its_beginning(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments, lambda: STAGES["solve"].install(9)).killed
    used = tmp_path / "threads"

    def note(count: int) -> None:
        with used.open("a") as file:
            file.write(f"{count} ")

    def two_threads() -> None:
        torch.get_num_threads = lambda: 2
        torch.set_num_threads = note

    second = in_child(tmp_path, arguments, two_threads)
    assert second.code == 0, second.output
    assert used.read_text() == "1 2 "  # put back at the end
    assert contents(tmp_path / "out") == expected(arguments)


@unproven
def test_a_shard_damaged_after_it_was_finished_is_cut_again(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    first = in_child(tmp_path, arguments, lambda: STAGES["index"].install(1))
    assert first.finished == [0, 1, 2, 3]
    partial = tmp_path / "out.partial"
    shard = partial / f"model-00002-of-{NUM_BLOCKS + 1:05d}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    before = marks(partial, [0, 2, 3])
    second = in_child(tmp_path, arguments)
    assert second.code == 0, second.output
    assert second.cut == [1]
    assert contents(tmp_path / "out") == expected(arguments)
    assert marks(tmp_path / "out", [0, 2, 3]) == before


@unproven
def test_a_mask_file_that_vanished_is_made_again(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments, lambda: STAGES["index"].install(1)).killed
    (tmp_path / f"out.partial/llmprune/masks-00001-of-{NUM_BLOCKS + 1:05d}.safetensors").unlink()
    assert in_child(tmp_path, arguments).cut == [0]
    assert contents(tmp_path / "out") == expected(arguments)


def test_a_run_killed_right_after_its_final_rename_is_finished(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    def install() -> None:
        at_call(records.os, "replace", 1, when=is_final, after=True)

    assert in_child(tmp_path, arguments, install).killed
    second = in_child(tmp_path, arguments)
    assert (second.code, second.cut) == (0, [])
    assert "already holds this result" in second.output
    assert contents(tmp_path / "out") == expected(arguments)


@unproven
def test_killed_again_and_again_it_still_ends_with_the_same_bytes(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    for index in range(NUM_BLOCKS):
        child = in_child(tmp_path, arguments, lambda: STAGES["after record"].install(1))
        assert child.killed
        assert child.finished == [index]
    assert in_child(tmp_path, arguments).cut == []
    assert contents(tmp_path / "out") == expected(arguments)


@unproven
def test_an_old_result_stays_until_the_new_one_is_proven(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments).code == 0
    old = contents(tmp_path / "out")
    other = ["--method", "magnitude", *arguments]
    for stage in ("solve", "after gate"):
        install = STAGES[stage].install
        assert in_child(tmp_path, [*other, "--overwrite"], lambda go=install: go(1)).killed
        assert contents(tmp_path / "out") == old
    last = in_child(tmp_path, [*other, "--overwrite"])
    assert last.code == 0, last.output
    assert contents(tmp_path / "out") == expected(other)
    assert not (tmp_path / "out.old").exists()


# What is refused: continuing one run with the wishes of another.


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (("--sparsity", "0.6"), "recipe.steps[0].prune.sparsity: 0.5 then, 0.6 now"),
        (("--seed", "1"), "recipe.seed: 0 then, 1 now"),
        (("--set", "prune.propagate=dense"), "recipe.steps[0].prune.propagate"),
        (("--num-samples", "4"), "recipe.calibration.num_samples: 8 then, 4 now"),
    ],
)
def test_another_recipe_does_not_continue_a_run(
    change: tuple[str, ...], key: str, arguments: list[object], tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments, lambda: STAGES["solve"].install(6)).killed
    before = contents(tmp_path / "out.partial")
    refused = in_child(tmp_path, [*arguments, *change])
    assert refused.code == 2
    assert key in refused.output
    assert "--overwrite" in refused.output
    assert "Traceback" not in refused.output
    assert contents(tmp_path / "out.partial") == before


@unproven
def test_another_text_under_the_same_name_does_not_continue_a_run(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    text = shutil.copy(text_file, tmp_path / "text.txt")
    arguments = ["--model", source, "--sparsity", 0.5, "--calib", text, "--num-samples", 4]
    arguments += ["--seq-len", 16, "--no-eval", "--out", tmp_path / "out"]
    assert in_child(tmp_path, arguments, lambda: STAGES["solve"].install(6)).killed
    Path(text).write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    refused = in_child(tmp_path, arguments)
    assert refused.code == 2
    assert "tokens: " in refused.output
    anew = in_child(tmp_path, [*arguments, "--overwrite"])
    assert (anew.code, anew.cut) == (0, [0, 1, 2, 3])


def test_other_weights_under_the_same_name_do_not_continue_a_run(
    own_source: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["--model", own_source, "--sparsity", 0.5, "--calib", text_file]
    arguments += ["--num-samples", 4, "--seq-len", 16, "--no-eval", "--out", tmp_path / "out"]
    assert in_child(tmp_path, arguments, lambda: STAGES["solve"].install(6)).killed
    shard = sorted(own_source.glob("*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    safetensors.torch.save_file({name: 2 * value for name, value in tensors.items()}, shard)
    refused = in_child(tmp_path, arguments)
    assert refused.code == 2
    assert "source.fingerprint" in refused.output


@unproven
def test_a_finished_result_of_another_recipe_is_refused_and_of_the_same_is_kept(
    arguments: list[object], tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments).code == 0
    before = contents(tmp_path / "out")
    again = in_child(tmp_path, arguments)
    assert (again.code, again.cut) == (0, [])
    other = in_child(tmp_path, [*arguments, "--sparsity", "0.25"])
    assert other.code == 2
    assert "sparsity: 0.5 then, 0.25 now" in other.output
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()


@unproven
def test_a_finished_result_from_another_text_is_not_taken_for_this_one(
    source: Path, text_file: Path, tmp_path: Path
) -> None:
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    arguments = ["--model", source, "--sparsity", 0.5, "--calib", text, "--num-samples", 4]
    arguments += ["--seq-len", 16, "--no-eval", "--out", tmp_path / "out"]
    assert in_child(tmp_path, arguments).code == 0
    text.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    refused = in_child(tmp_path, arguments)
    assert refused.code == 2, refused.output
    assert "tokens" in refused.output


@unproven
def test_a_fault_keeps_the_block_whose_record_was_still_being_written(
    own_source: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["--model", own_source, "--sparsity", 0.5, "--calib", text_file]
    arguments += ["--num-samples", 4, "--seq-len", 16, "--no-eval", "--out", tmp_path / "out"]

    def slow_record_then_fault() -> None:
        write, cut_group, calls = records.Records.write, Cutter.cut, 0

        def slow(*args: Any) -> Any:
            time.sleep(0.5)
            return write(*args)

        def faulty(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise NumericalError("a fault in block 1")
            cut_group(*args)

        records.Records.write, Cutter.cut = slow, faulty  # type: ignore[method-assign]

    failed = in_child(tmp_path, arguments, slow_record_then_fault)
    assert failed.code == 2, failed.output
    assert "a fault in block 1" in failed.output
    assert failed.finished == [0]
    second = in_child(tmp_path, arguments)
    assert (second.code, second.cut) == (0, [1, 2, 3]), second.output


# Signals, sent inside the second block.


def interrupted(arguments: list[object], home: Path, number: int) -> tuple[int, str, str]:
    """Run a command in a child and send it a signal; return its code and what it wrote where."""
    here, said = home / "here", home / "said"

    def wait() -> None:
        sys.stdout = said.open("w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as of a shell in front
        at_call(Cutter, "cut", 7, first=lambda *args: (here.touch(), time.sleep(120)))

    pid = begun(home, arguments, wait)
    deadline = time.monotonic() + 100
    while not here.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(), (home / "output").read_text()


def test_ctrl_c_stops_with_130_and_another_process_resumes(
    arguments: list[object], tmp_path: Path
) -> None:
    code, _, err = interrupted(arguments, tmp_path, signal.SIGINT)
    assert code == 130
    assert "the same command resumes" in err
    assert "Traceback" not in err
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*lock"))
    resumed = in_child(tmp_path, arguments)
    assert resumed.code == 0, resumed.output
    assert "resumed after block 0" in resumed.output
    assert "loads in a fresh process" in resumed.output
    assert not (tmp_path / "out.partial").exists()


def test_sigterm_stops_as_ctrl_c_does(arguments: list[object], tmp_path: Path) -> None:
    code, out, err = interrupted([*arguments, "--json"], tmp_path, signal.SIGTERM)
    assert code == 130
    assert "the same command resumes" in err
    assert json.loads(out.splitlines()[-1])["code"] == 130
    assert (tmp_path / "out.partial").is_dir()
    assert not (tmp_path / "out").exists()


@unproven
def test_a_replacing_run_is_continued_by_the_plain_command(
    arguments: list[object], expected: Expected, tmp_path: Path
) -> None:
    assert in_child(tmp_path, arguments).code == 0
    other = ["--method", "magnitude", *arguments]
    killed = in_child(tmp_path, [*other, "--overwrite"], lambda: STAGES["solve"].install(9))
    assert killed.killed
    last = in_child(tmp_path, other)
    assert last.code == 0, last.output
    assert contents(tmp_path / "out") == expected(other)


@pytest.mark.parametrize("name", ["out.partial", "out.old"])
def test_folders_of_the_user_beside_the_result_are_left_alone(
    name: str, arguments: list[object], tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("mine")
    assert in_child(tmp_path, arguments).code == (2 if name == "out.partial" else 0)
    assert (tmp_path / name / "notes.txt").read_text() == "mine"
