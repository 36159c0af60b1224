"""Damaged configs, indexes, headers, recipes, tokenizers and texts, each through the command.

    python -m eval.faults.fuzz --cases 5000 [--seed 0] [--keep DIR]

Every case is one file of a pico model or run with a few changes drawn from a seed. It must end
with code 0 or 2 within the time and memory given, print no traceback, and write nothing but its
--out. What does not is printed, and kept in DIR. Children take the cases in lots; a limit on
address space and an alarm hold each. One case in forty is a whole run; configs, indexes, headers
and recipes stop at the plan, tokenizers and texts when the text has been read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import llmprune.steps
from eval.faults.children import at_home, warm, write_model, write_text
from llmprune import cli
from llmprune.base.errors import RecipeError

SECONDS, MEMORY = 5, 1_000_000_000
LOT = 40
WHOLE = 40  # one case in so many runs to its end
SHARES = {"config": 30, "index": 15, "header": 20, "recipe": 20, "tokenizer": 8, "text": 7}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 10**6, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "0", "../../etc/passwd", "/etc/passwd", "\0", "é" * 99),
    *([], {}, [[]], [None], {"": None}, [1] * 50, ["llama"], "llama", "bfloat16", "gpt2"),
)
RECIPE = """\
model: MODEL
seed: 0
calibration: {data: TEXT, num_samples: 4, seq_len: 16}
steps:
  - prune:
      method: sparsegpt
      sparsity: 0.5
      pattern: unstructured
      allocation: owl
      skip: ["*lm_head*"]
  - evaluate: {perplexity: false}
"""


class TooSlow(BaseException):
    """A case took longer than it may; no handler of errors takes it for one."""


class Case(NamedTuple):
    """What is fuzzed, whether it runs to its end, and the seed of its changes."""

    kind: str
    whole: bool
    seed: int


def cases(count: int, seed: int) -> list[Case]:
    """Draw the cases; the same seed draws the same."""
    draw = random.Random(seed)
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=count)
    return [
        Case(kind, index % WHOLE == WHOLE - 1, draw.getrandbits(40))
        for index, kind in enumerate(kinds)
    ]


# Changes.


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, cut, double or insert a few bytes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(5)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            data[at:at] = draw.randbytes(draw.choice((1, 8, 300)))
        elif how == 3:
            data[at:at] = data[max(0, at - draw.choice((1, 20, 500))) : at]
        else:
            del data[at : at + draw.choice((1, 4, 40))]
    return bytes(data)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of nested data."""
    rows = data.items() if isinstance(data, dict) else enumerate(data)
    found: list[tuple[Any, Any]] = []
    for key, value in rows:
        found.append((data, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


def changed_data(data: Any, draw: random.Random) -> Any:
    """Put odd values where others were, or take keys away."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        found = places(data)
        if not found:
            break
        holder, key = draw.choice(found)
        how = draw.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder[key], int):
            holder[key] = holder[key] * draw.choice((-1, 2, 3, 1000, 10**9))
        elif how == 2:
            other, name = draw.choice(found)
            with contextlib.suppress(KeyError, IndexError):  # one that has just gone
                holder[key] = json.loads(json.dumps(other[name]))
        elif how == 3 and isinstance(holder, dict):
            holder[str(draw.choice(VALUES))] = deepcopy(draw.choice(VALUES))
        else:
            holder[key] = deepcopy(draw.choice(VALUES))  # never one that an earlier case changed
    return data


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """Change a JSON file in its data, now and then in its bytes or by nesting it deeply."""
    how = draw.random()
    if how < 0.2:
        return changed_bytes(content, draw)
    if how < 0.22:
        depth = draw.choice((100, 5000, 200_000))
        return b'{"model_type":' + b"[" * depth + b"]" * depth + b"}"
    return json.dumps(changed_data(json.loads(content), draw)).encode()


def changed_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file, its length, or its bytes anywhere."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    how = draw.random()
    if how < 0.15:
        return changed_bytes(content, draw)
    if how < 0.3:
        sizes = (0, 1, length - 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1)
        return struct.pack("<Q", draw.choice(sizes)) + header + body
    header = changed_json(header, draw)
    return struct.pack("<Q", len(header)) + header + body


def changed_recipe(content: bytes, draw: random.Random) -> bytes:
    """Change a recipe in its text or its data; now and then by anchors that multiply."""
    import yaml

    how = draw.random()
    if how < 0.5:
        return changed_bytes(content, draw)
    if how < 0.53:
        rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        return "\n".join(["a0: &a0 [x]", *rows]).encode() + b"\n" + content
    if how < 0.55:
        return content + b"\nextra: " + b"[" * 3000
    return yaml.safe_dump(changed_data(yaml.safe_load(content), draw)).encode()


def changed_text(content: bytes, draw: random.Random) -> bytes:
    """Change a text or make one of another kind."""
    how = draw.randrange(5)
    if how == 0:
        return draw.randbytes(draw.choice((0, 1, 3000)))
    if how == 1:
        rows = [changed_data({"text": content.decode()[:900]}, draw) for _ in range(8)]
        return "\n".join(json.dumps(row) for row in rows).encode()
    if how == 2:
        return changed_bytes(content[: draw.choice((0, 5, 64, 400))], draw)
    return changed_bytes(content, draw)


# One case.


def arrange(case: Case, model: Path, text: Path, home: Path) -> list[str]:
    """Write what a case is made of; return its command line."""
    draw = random.Random(case.seed)
    source = home / "model"
    shutil.copytree(model, source)
    told = home / draw.choice(("text.txt", "text.jsonl") if case.kind == "text" else ("text.txt",))
    told.write_bytes(text.read_bytes())
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    files: dict[str, tuple[Path, Callable[[bytes, random.Random], bytes]]] = {
        "config": (source / "config.json", changed_json),
        "index": (source / "model.safetensors.index.json", changed_json),
        "header": (source / draw.choice(shards), changed_header),
        "recipe": (home / "recipe.yaml", changed_recipe),
        "tokenizer": (
            source / draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json")),
            changed_json,
        ),
        "text": (told, changed_text),
    }
    filled = RECIPE.replace("MODEL", str(source)).replace("TEXT", str(told))
    (home / "recipe.yaml").write_text(filled)
    path, change = files[case.kind]
    path.write_bytes(change(path.read_bytes(), draw))
    rest = ["--device", "cpu", "--out", str(home / "out")]
    if not case.whole and case.kind not in ("tokenizer", "text"):
        rest.append("--dry-run")
    if case.kind == "recipe":
        return ["--recipe", str(home / "recipe.yaml"), *rest]
    usual = ["--calib", str(told), "--num-samples", "4", "--seq-len", "16", "--no-eval"]
    return ["--model", str(source), "--sparsity", "0.5", *usual, *rest]


def listing(home: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all that lies in a folder, beside results."""
    return {
        str(path.relative_to(home)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in home.rglob("*")
        if path.is_file() and path.relative_to(home).parts[0] not in ("out", "out.partial")
    }


def judge(case: Case, model: Path, text: Path, home: Path) -> tuple[str, str]:
    """Run a case; return what came of it (done, refused, fault) and what was said."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    arguments = arrange(case, model, text, home)
    before = listing(home)
    said = io.StringIO()
    carry_out = llmprune.steps._carry_out
    if not case.whole:
        llmprune.steps._carry_out = enough
    signal.setitimer(signal.ITIMER_REAL, SECONDS * (6 if case.whole else 1))
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main(arguments)
        code: Any = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        code = "an exception"
        said.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        llmprune.steps._carry_out = carry_out
    if listing(home) != before:
        return "fault", f"files outside the result changed\n{said.getvalue()}"
    left = sorted(path.name for path in home.glob("out*"))
    if code == 2 and left:
        return "fault", f"refused, and {left} is left\n{said.getvalue()}"
    if code not in (0, 2) or "Traceback" in said.getvalue():
        return "fault", f"code {code}\n{said.getvalue()}"
    return ("done" if code == 0 else "refused"), said.getvalue()


def enough(*args: Any, **kwargs: Any) -> Any:
    """Stop where the text has been read and nothing has been cut."""
    raise RecipeError("far enough")


def in_lots(drawn: list[Case], model: Path, text: Path, home: Path) -> list[tuple[str, str]]:
    """Judge cases in forked children of LOT each; a child that dies or hangs is a fault."""
    found: list[tuple[str, str]] = []
    answers = home / "answers"
    while len(found) < len(drawn):
        lot = drawn[len(found) : len(found) + LOT]
        answers.write_text("")
        pid = os.fork()
        if pid == 0:
            _judge_lot(lot, model, text, home / "case", answers)
        status = _waited(pid, SECONDS * 8, answers)
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        found += [(row[0], row[1]) for row in rows]
        if len(rows) < len(lot):
            found.append(("fault", f"the process ended or hung, status {status}"))
    return found


def _judge_lot(lot: list[Case], model: Path, text: Path, case_home: Path, answers: Path) -> None:
    """Judge cases one by one in this child, and leave; never by the way out of the parent."""
    try:
        at_home()
        signal.signal(signal.SIGALRM, _too_slow)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for case in lot:
            answer = judge(case, model, text, case_home)
            with answers.open("a") as file:
                file.write(json.dumps(answer) + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _too_slow(number: int, frame: object) -> None:
    raise TooSlow


def _waited(pid: int, limit: float, answers: Path) -> int:
    """Wait for a child while it answers; kill it where it does not for `limit` seconds."""
    size, since = 0, time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if answers.stat().st_size != size:
            size, since = answers.stat().st_size, time.monotonic()
        if time.monotonic() - since > limit:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> None:
    """Judge as many cases as asked, and print counts by kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    warm()
    began = time.monotonic()
    drawn = cases(asked.cases, asked.seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        home = Path(folder)
        model, text = write_model(home / "pico", blocks=2), write_text(home / "pico.txt")
        found = in_lots(drawn, model, text, home)
        counts: dict[str, Counter[str]] = {kind: Counter() for kind in SHARES}
        for case, (came, said) in zip(drawn, found, strict=True):
            counts[case.kind][came] += 1
            if came != "fault":
                continue
            print(f"FAULT {case}\n{said[-2500:]}", flush=True)
            if asked.keep:
                arrange(case, model, text, _fresh(asked.keep / str(case.seed)))
    for kind, each in counts.items():
        print(f"{kind}: {each.total()} cases; {dict(each)}")
    faults = sum(each["fault"] for each in counts.values())
    whole = sum(case.whole for case in drawn)
    seconds = time.monotonic() - began
    print(f"{len(drawn)} cases, {whole} whole runs, {faults} faults, {seconds:.0f} s")
    sys.exit(1 if faults else 0)


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    main()
