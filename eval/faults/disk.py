"""A disk that is full before any write of a pico run; then there is room, and it is resumed.

    python -m eval.faults.disk --points 20 [--seed 0]

Results lie on a small disk in memory, which needs the right to mount one. Before an operation on a
file of the result a ballast takes all room but a few bytes. The run must end with code 0 or 2, one
line and no traceback, and leave its source alone; once the ballast is gone the same command must
end in the bytes of an undisturbed run, and leave nothing beside them. Operations are spread evenly
over a run, and runs are those of `kills`, with a packed export. Also: a source that is read-only, a
place that is read-only, and two processes in one folder.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from eval.faults.children import Child, contents, in_child, warm
from eval.faults.kills import Run, commands, judged, stage_of, undisturbed, watch

ROOM = 64 * 2**20
LEFT = (0, 4096, 16384, 65536)  # bytes that the ballast leaves
PIECE = b"\0" * 65536


class Disturbed(NamedTuple):
    """The stage in which a run met the full disk (or that it did not), and what went wrong."""

    stage: str
    wrong: str | None = None


@contextmanager
def small_disk(folder: Path, size: int = ROOM) -> Iterator[Path]:
    """Mount a disk in memory for as long as the body runs.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise PermissionError("there is no `mount` here") from None
    if made.returncode:
        raise PermissionError(made.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    """Make a mounted disk read-only (`ro`) or not (`rw`)."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def fill(path: Path, left: int) -> None:
    """Write a ballast until its disk has only `left` bytes; pages that were asked for stay free."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, PIECE)
    except OSError:
        size = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, max(0, size - left))
    finally:
        os.close(descriptor)


def full_at(work: Path, ballast: Path, nth: int, left: int) -> Callable[[], None]:
    """Return what fills the disk before the n-th operation on files below `work`."""
    return lambda: watch(work, lambda count: fill(ballast, left) if count == nth else None)


def unlike_a_refusal(child: Child) -> str | None:
    """Return what is wrong with how a run ended that met a full disk."""
    errors = [line for line in child.output.splitlines() if line.startswith("error: ")]
    if child.hung or child.code not in (0, 2) or "Traceback" in child.output:
        return f"code {child.code}, hung {child.hung}\n{child.output}"
    said = ("the disk is full", " free. Free some space")  # the latter before anything is written
    if child.code == 2 and (len(errors) != 1 or not any(words in errors[0] for words in said)):
        return f"the error does not speak of a full disk\n{child.output}"
    return None


def starve(run: Run, home: Path, disk: Path, nth: int, left: int) -> Disturbed:
    """Run into a full disk at one operation, make room, and resume."""
    work, ballast = disk / "work", disk / "ballast"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out = work / "out"
    child = in_child(
        home / "log", [*run.arguments, "--out", out], full_at(work, ballast, nth, left)
    )
    stage = "not noticed" if child.code == 0 else stage_of(out)
    ballast.unlink(missing_ok=True)
    wrong = unlike_a_refusal(child)
    if wrong is None:
        again = in_child(home / "log", [*run.arguments, "--out", out])
        wrong = judged(again, run, work)
    return Disturbed(stage, wrong)


def exported(home: Path) -> list[object]:
    """Return the command that packs a masked result."""
    return ["export", home / "pruned", "--to", "packed", "--overwrite"]


def oddities(home: Path, disk: Path, prune: Run) -> dict[str, str | None]:
    """Return what is wrong with runs on read-only places, and with two in one folder."""
    out = disk / "work" / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    shutil.copytree(home / "model", disk / "model")
    moved = [disk / "model" if part == home / "model" else part for part in prune.arguments]
    remount(disk, "ro")
    refused = in_child(home / "log", [*prune.arguments, "--out", out])
    read = in_child(home / "log", [*moved, "--out", home / "elsewhere"])
    remount(disk, "rw")
    shutil.rmtree(disk / "model")
    return {
        "a read-only place": None
        if refused.code == 2 and "error: " in refused.output and "Traceback" not in refused.output
        else refused.output,
        "a read-only source": read.output if read.code else None,
        "two in one folder": two_at_once([*prune.arguments, "--out", out], prune, out.parent, home),
    }


def two_at_once(arguments: list[object], run: Run, work: Path, home: Path) -> str | None:
    """Start two processes in one folder; return what is wrong with how they ended.

    The second starts once the first holds the folder, which rests in the middle of its files.
    """
    rest = partial(watch, work, lambda count: time.sleep(5) if count == run.touches // 2 else None)
    first = os.fork()
    if first == 0:
        os._exit(in_child(home / "log-1", arguments, rest).code)
    until = time.monotonic() + 30
    while not (work / "out.partial" / "llmprune").exists() and time.monotonic() < until:
        time.sleep(0.002)
    second = in_child(home / "log-2", arguments)
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    said = "another run is writing" in second.output and "Traceback" not in second.output
    if code or second.code != 2 or not said:
        return f"codes {code} and {second.code}\n{second.output}"
    return judged(Child(code, ""), run, work)


def points(run: Run, count: int) -> list[int]:
    """Return operations of a run, spread evenly from the first to the last."""
    count = min(count, run.touches)
    return [1 + place * (run.touches - 1) // max(1, count - 1) for place in range(count)]


def main() -> None:
    """Fill the disk as often as asked in each run, and print counts by run and stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warm()
    began, draw, faults, total = time.monotonic(), random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        home = Path(folder)
        told = commands(home) | {"packed": exported(home)}
        source = contents(home / "model")
        runs = {name: undisturbed(home, arguments) for name, arguments in told.items()}
        try:
            with small_disk(home / "disk") as disk:
                for name, run in runs.items():
                    stages = Counter[str]()
                    for nth in points(run, asked.points):
                        left = draw.choice(LEFT)
                        came = starve(run, home, disk, nth, left)
                        stages[came.stage] += 1
                        total += 1
                        if came.wrong:
                            faults += 1
                            print(f"WRONG {name} {nth} {left}: {came.wrong[-2500:]}", flush=True)
                    print(f"{name}: {run.touches} operations; {dict(stages)}", flush=True)
                for name, wrong in oddities(home, disk, runs["wanda"]).items():
                    faults += wrong is not None
                    print(f"{name}: {'as it should' if wrong is None else wrong}", flush=True)
        except PermissionError as error:
            sys.exit(f"a small disk cannot be mounted here ({error}); nothing was tried")
        if contents(home / "model") != source:
            faults += 1
            print("WRONG: the source changed")
    print(f"{total} full disks, {faults} wrong, {time.monotonic() - began:.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
