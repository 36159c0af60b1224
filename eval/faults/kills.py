"""Real kills at random moments of pico runs; each is resumed until done, and its bytes compared.

    python -m eval.faults.kills --kills 200 [--seed 0] [--signal KILL|TERM] [--only RUN]

A quarter of the kills comes after a random time, a quarter before a random operation on a file of
the result's folder. The others share out what a run does: the part that was killed least is chosen,
and in it a random call of a function, so that short parts get as many kills as long ones. Runs:
Wanda, SparseGPT with a survey, gradients, shrunk, and a recovery with a teacher that saves its
state.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from eval.faults.children import Child, contents, in_child, warm, write_model, write_text

TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile", "os.chmod")
MOST = 12  # kills of one run before it is left in peace
PARTS = {
    "plan": ("engine/opening.py", "engine/planning.py", "recovery/planning.py"),
    "embed": ("walk/forward.py:embed_batches", "walk/forward.py:embed"),
    "observe": ("walk/observation.py",),
    "survey": ("engine/survey.py", "engine/spreads.py"),
    "gradients": ("walk/backward.py", "engine/gradients.py"),
    "solve": ("engine/solving.py", "engine/units.py", "solver/columnwise.py"),
    "write a block": ("walk/rewriting.py", "engine/folder.py"),
    "record": ("engine/records.py",),
    "advance": ("walk/forward.py:advance",),
    "teacher": ("recovery/teacher.py",),
    "training step": ("recovery/loop.py:step", "recovery/loop.py:_backward"),
    "between steps": ("recovery/loop.py:rate", "recovery/attaching.py:hold"),
    "state": ("recovery/saved.py",),
    "merge": ("recovering.py:_merge", "recovery/writing.py"),
    "gate": ("delivery/gate.py", "delivery/stock.py"),
    "report": ("report/run.py", "report/recoveries.py", "report/page.py", "pages/result.py"),
}
"""What a run does, by the functions (FILE of llmprune, or FILE:FUNCTION) that do it."""


class Run(NamedTuple):
    """A command without its --out, what it leaves undisturbed, and how much there is to disturb:
    seconds, operations on files, and calls by part."""

    arguments: list[object]
    expected: dict[str, bytes]
    seconds: float
    touches: int
    calls: Mapping[str, int]


def watch(home: Path, act: Callable[[int], object]) -> None:
    """Call `act` with a count before each operation of this process on files below `home`."""
    count, here = 0, str(home)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in TOUCHES and any(here in str(part) for part in args[:2]):
            count += 1
            act(count)

    sys.addaudithook(hook)


def watch_calls(act: Callable[[str], object]) -> None:
    """Call `act` with the part of a run that each called function belongs to, where it has one."""
    part_of = {place: part for part, places in PARTS.items() for place in places}
    known: dict[Any, str | None] = {}

    def hook(frame: Any, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in known:
            file = code.co_filename.rpartition("/llmprune/")[2]
            known[code] = part_of.get(f"{file}:{code.co_name}", part_of.get(file))
        if (part := known[code]) is not None:
            act(part)

    threading.setprofile(hook)
    sys.setprofile(hook)


def calls_of(home: Path, arguments: list[object]) -> dict[str, int]:
    """Run a command in peace; return how many calls each part of it makes."""
    work, path = home / "counted", home / "calls"
    work.mkdir()

    def prepare() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        watch_calls(lambda part: os.write(descriptor, f"{part}\n".encode()))

    child = in_child(home / "log", [*arguments, "--out", work / "out"], prepare)
    assert child.code == 0, child.output
    shutil.rmtree(work)
    return dict(Counter(path.read_text().splitlines()))


def die_in(part: str, nth: int, number: int) -> Callable[[], None]:
    """Return what sends this process a signal at the n-th call of a part."""
    left = nth

    def act(called: str) -> None:
        nonlocal left
        left -= called == part
        if called == part and left == 0:
            os.kill(os.getpid(), number)

    return lambda: watch_calls(act)


def count_into(home: Path, path: Path) -> Callable[[], None]:
    """Return what keeps the number of operations in a file elsewhere."""

    def prepare() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        watch(home, lambda count: os.pwrite(descriptor, str(count).encode(), 0))

    return prepare


def die_at(home: Path, nth: int, number: int) -> Callable[[], None]:
    """Return what sends this process a signal before its n-th operation."""
    return lambda: watch(home, lambda count: os.kill(os.getpid(), number) if count == nth else None)


def commands(home: Path) -> dict[str, list[object]]:
    """Write the models and return the commands that are disturbed."""
    source, text = write_model(home / "model"), write_text(home / "text.txt")
    usual: list[object] = ["--calib", text, "--num-samples", 8, "--seq-len", 16, "--no-eval"]
    prune: list[object] = ["--model", source, "--sparsity", 0.5, *usual]
    made = in_child(home / "log", [*prune, "--out", home / "pruned"])
    assert made.code == 0, made.output
    recover = ["recover", home / "pruned", "--data", text, "--steps", 8, "--batch", 2]
    recover += ["--seq-len", 16, "--rank", 2, "--no-eval"]
    return {
        "wanda": prune,
        "sparsegpt, owl": [*prune, "--method", "sparsegpt", "--set", "prune.allocation=owl"],
        "gradients": [*prune, "--method", "gblm"],
        "shrunk": [*prune, "--pattern", "ffn-channels", "--set", "prune.sparsity=0.25"],
        "recovery": [*recover, "--set", "recover.save_every=2"],
    }


def undisturbed(home: Path, arguments: list[object]) -> Run:
    """Run a command in peace."""
    work = home / "peace"
    work.mkdir()
    began = time.monotonic()
    child = in_child(
        home / "log", [*arguments, "--out", work / "out"], count_into(work, home / "count")
    )
    seconds = time.monotonic() - began
    assert child.code == 0, child.output
    touches = int((home / "count").read_text())
    found = contents(work / "out")
    shutil.rmtree(work)
    return Run(arguments, found, seconds, touches, calls_of(home, arguments))


def stage_of(out: Path) -> str:
    """Return the stage that a stopped run was in, by its own events."""
    partial = out.with_name("out.partial")
    for folder in (out, partial):
        events = folder / "llmprune" / "events.jsonl"
        if events.exists():
            lines = [json.loads(line) for line in events.read_text().splitlines() if line]
            names = [row["stage"] for row in lines if row["event"] == "stage_start"]
            ended = [row["stage"] for row in lines if row["event"] == "stage_end"]
            if folder == out:
                return "published"
            if not names:
                return "before the first stage"
            return names[-1] if len(names) > len(ended) else f"after {names[-1]}"
    return "published" if out.exists() else "nothing begun" if not partial.exists() else "beginning"


def struck(
    run: Run,
    arguments: list[object],
    home: Path,
    draw: random.Random,
    number: int,
    by_part: Counter[str],
) -> tuple[Child, str | None]:
    """Run a command that is sent a signal on its way; return its end, and the part it was in.

    The part is known where it was chosen.
    """
    how = draw.randrange(4)
    if how == 0:
        when = draw.uniform(0, run.seconds)
        return in_child(home / "log", arguments, after=(when, number)), None
    if how == 1:
        nth = draw.randint(1, run.touches)
        return in_child(home / "log", arguments, die_at(home / "work", nth, number)), None
    least = min(by_part[part] for part in run.calls)
    part = draw.choice([part for part in run.calls if by_part[part] == least])
    nth = draw.randint(1, run.calls[part])
    return in_child(home / "log", arguments, die_in(part, nth, number)), part


def disturb(
    run: Run, home: Path, draw: random.Random, number: int, left: int, by_part: Counter[str]
) -> tuple[int, str | None]:
    """Kill a run again and again and let it end; return the kills, and what went wrong."""
    work = home / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out, kills = work / "out", 0
    arguments = [*run.arguments, "--out", out]
    for _ in range(min(MOST, left)):
        child, part = struck(run, arguments, home, draw, number, by_part)
        if child.code == 0:
            break
        if wrong := unlike_a_kill(child, number):
            return kills, wrong
        kills += 1
        by_part[part or stage_of(out)] += 1
    else:
        child = in_child(home / "log", arguments)
    return kills, judged(child, run, work)


def unlike_a_kill(child: Child, number: int) -> str | None:
    """Return what is wrong with how a disturbed child ended."""
    if number == signal.SIGKILL and child.code == -signal.SIGKILL and not child.hung:
        return None
    if number == signal.SIGTERM and child.code in (130, -signal.SIGTERM) and not child.hung:
        return child.output if "Traceback" in child.output else None
    return f"code {child.code}, hung {child.hung}\n{child.output}"


def judged(child: Child, run: Run, work: Path) -> str | None:
    """Return what is wrong with the run that came to its end."""
    if child.code or child.hung:
        return f"code {child.code}, hung {child.hung}\n{child.output}"
    found = contents(work / "out")
    differing = [n for n in found.keys() | run.expected if found.get(n) != run.expected.get(n)]
    if differing:
        return f"differing: {sorted(differing)}"
    beside = sorted(path.name for path in work.iterdir())
    return None if beside == ["out"] else f"left beside the result: {beside}"


def main() -> None:
    """Kill as often as asked, and print counts by run and part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--only", help="a run, such as recovery")
    asked = parser.parse_args()
    number = getattr(signal, f"SIG{asked.signal}")
    warm()
    began, draw = time.monotonic(), random.Random(asked.seed)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        home = Path(folder)
        told = commands(home)
        if asked.only not in (None, *told):
            parser.error(f"--only {asked.only} is no run; type one of {', '.join(told)}")
        chosen = told if asked.only is None else {asked.only: told[asked.only]}
        runs = {name: undisturbed(home, arguments) for name, arguments in chosen.items()}
        for name, run in runs.items():
            print(f"{name}: {run.seconds:.1f} s, {run.touches} operations on files", flush=True)
        by_part = {name: Counter[str]() for name in runs}
        kills, ends = Counter[str](), Counter[str]()
        while (left := asked.kills - kills.total()) > 0:
            name = min(runs, key=lambda each: kills[each])
            more, fault = disturb(runs[name], home, draw, number, left, by_part[name])
            kills[name] += more
            ends[name] += 1
            print(f"{kills.total()} of {asked.kills} kills; {name}: {more}", flush=True)
            if fault:
                wrong.append(f"{name}: {fault}")
                print(f"WRONG {wrong[-1]}", flush=True)
            if len(wrong) > 9:
                break
    for name in runs:
        print(f"{name}: {kills[name]} kills, {ends[name]} ends; {dict(by_part[name])}")
    seconds = time.monotonic() - began
    print(f"{kills.total()} kills, {ends.total()} ends, {len(wrong)} wrong, {seconds:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
