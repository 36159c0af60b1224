"""llmprune beside llm-compressor and the published way: time, memory and perplexity in one run.

    sh eval/peers/setup.sh ../peers
    python eval/peers/compare.py --model demo --peers ../peers --threads 2 --out rows.jsonl
    python eval/peers/compare.py --model random --num-samples 32 --peers ../peers --out rows.jsonl

All tools read one model in one dtype and the same token ids, one after another, each in a fresh
process. Memory is the largest sum over a run and its children, looked at every 20 ms; CPU seconds,
of all threads and children, mean something beside other work too, where wall seconds do not. Each
run adds a row of JSON to --out; the table at the end is of this run's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "ours": "ours.py",
    "llmcompressor": "llmcompressor_runner.py",
    "published": "published.py",
    "floor": "floor.py",
}
NUMBERS = {"wall": "wall s", "cpu": "CPU s", "engine": "engine s", "engine_cpu": "engine CPU s"}
NUMBERS |= {"anonymous": "anonymous MB"}
METHODS = ["wanda", "sparsegpt"]
ONE_BATCH = ("published",)  # works at batch 1 alone, so it has no default beside it


def main() -> None:
    asked = arguments()
    sys.path.insert(0, str(HERE))
    from material import judged, material

    rows: list[dict[str, Any]] = []
    with scratch(asked.work) as folder:
        model, tokens = material(asked, folder)
        dense = judged(model, tokens)
        for turn in range(asked.repeat):
            for wish in wishes(asked):
                out = folder / "out"
                for left in folder.glob("out*"):  # an earlier run may have been stopped
                    shutil.rmtree(left, ignore_errors=True)
                row = wish | {"turn": turn, "model": model.name, "dtype": asked.dtype}
                row |= {"tokens": f"{asked.num_samples}x{asked.seq_len}", "threads": asked.threads}
                row |= measured(wish, model, tokens, out, asked)
                row |= judged(out, tokens) if row.pop("result") else {}
                row["dense"] = dense["perplexity"]
                rows.append(row)
                print(json.dumps(row), flush=True)
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a folder with a Llama, or random")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--tools", nargs="+", default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument("--batches", nargs="+", default=["1", "default"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-windows", type=int, default=48, help="perplexity is measured on")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=20, help="of the random model")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--peers", type=Path, help="the environment that setup.sh made")
    parser.add_argument("--work", type=Path, help="folder for models and results, kept")
    parser.add_argument("--out", type=Path, default=Path("rows.jsonl"))
    asked = parser.parse_args()
    asked.out = asked.out.resolve()
    if "llmcompressor" in asked.tools and not python_of("llmcompressor", asked.peers).exists():
        parser.error(
            f"--peers {asked.peers or 'not given'}: llm-compressor needs an environment, made by "
            "sh eval/peers/setup.sh FOLDER; or name other --tools: ours published floor"
        )
    wrong = [text for text in asked.batches if text != "default" and not text.isdecimal()]
    if wrong:
        parser.error(f"--batches {wrong[0]}: takes numbers and `default`, such as 1 default")
    return asked


def scratch(work: Path | None) -> Any:
    """Return a context of the folder to work in: the one named, or one that goes afterwards."""
    if work is None:
        return Scratch(dir=os.environ.get("TMPDIR"))
    work.mkdir(parents=True, exist_ok=True)
    return Kept(work.resolve())


class Scratch(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    def __enter__(self) -> Path:
        return Path(super().__enter__())


class Kept:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)


def wishes(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what to run, tools taking turns within a method and pattern; the floor once a batch."""
    if "floor" in asked.tools:
        for batch in asked.batches:
            if batch != "default":
                yield {"tool": "floor", "method": "-", "pattern": "-", "asked_batch": batch}
    for pattern in asked.patterns:
        for method in asked.methods:
            for batch in asked.batches:
                for tool in asked.tools:
                    if tool == "floor" or (tool in ONE_BATCH and batch != asked.batches[0]):
                        continue
                    wish = {"tool": tool, "method": method, "pattern": pattern}
                    yield wish | {"asked_batch": "1" if tool in ONE_BATCH else batch}


def measured(
    wish: dict[str, Any], model: Path, tokens: Path, out: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Run one tool in a fresh process; return its answer with wall seconds and peaks in MB."""
    line = [str(python_of(wish["tool"], asked.peers)), str(HERE / SCRIPTS[wish["tool"]])]
    line += ["--model", str(model), "--tokens", str(tokens), "--out", str(out)]
    line += ["--threads", str(asked.threads), "--dtype", asked.dtype]
    if wish["tool"] != "floor":
        line += ["--method", wish["method"], "--pattern", wish["pattern"]]
    if wish["asked_batch"] != "default":
        line += ["--batch", wish["asked_batch"]]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    surroundings = os.environ | offline | {"OMP_NUM_THREADS": str(asked.threads)}
    log = out.with_suffix(".log")
    with log.open("w+", encoding="utf-8") as file:
        start, before = time.perf_counter(), cpu_seconds()
        process = subprocess.Popen(line, stdout=file, stderr=file, env=surroundings, cwd=out.parent)
        anonymous, resident = peaks(process)
        wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    said = log.read_text(encoding="utf-8").splitlines()
    if process.returncode:
        raise SystemExit("\n".join([*said[-20:], f"{wish} ended with {process.returncode}: {log}"]))
    answer = next(text for text in reversed(said) if text.startswith("{"))
    found: dict[str, Any] = json.loads(answer)
    found |= {"wall": round(wall, 2), "cpu": round(cpu, 2), "engine": round(found["engine"], 2)}
    found["engine_cpu"] = round(found["engine_cpu"], 2)
    return found | {"anonymous": anonymous // 10**6, "resident": resident // 10**6}


def cpu_seconds() -> float:
    """Return the processor seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def python_of(tool: str, peers: Path | None) -> Path:
    """Return the interpreter of a tool; the peers' has an environment of its own."""
    if tool != "llmcompressor":
        return Path(sys.executable)
    return (peers or Path("peers")).absolute() / "bin" / "python"


def peaks(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process; return the largest sums of anonymous and of resident bytes."""
    most = (0, 0)
    while process.poll() is None:
        held = [pages(pid) for pid in tree(process.pid)]
        anonymous, resident = (sum(kind) for kind in zip(*held, strict=True)) if held else (0, 0)
        most = (max(most[0], anonymous), max(most[1], resident))
        time.sleep(0.02)
    return most


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(found for child in children for found in tree(int(child)))]


def pages(pid: int) -> tuple[int, int]:
    """Return anonymous and resident bytes of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    kinds = {name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", status)}
    return kinds.get("RssAnon", 0), kinds.get("VmRSS", 0)


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians over the turns as Markdown, with ratios to llm-compressor in brackets."""
    heads = ["method", "pattern", "batch", "tool", *NUMBERS.values(), "perplexity"]
    lines = [line_of(heads), "|---" * len(heads) + "|"]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        names = ("method", "pattern", "asked_batch", "tool")
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, own in groups.items():
        peer = groups.get((*key[:3], "llmcompressor"), [])
        numbers = [f"{middle(own, name):.1f}{ratio(own, peer, name)}" for name in NUMBERS]
        lines.append(line_of([*key, *numbers, str(own[0].get("perplexity", ""))]))
    return "\n".join(lines)


def line_of(cells: list[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def middle(rows: list[dict[str, Any]], name: str) -> float:
    """Return the median of a number over rows."""
    return float(median(row[name] for row in rows))


def ratio(own: list[dict[str, Any]], peer: list[dict[str, Any]], name: str) -> str:
    """Return how a median compares with the peer's; empty where the peer did not run."""
    return f" ({middle(own, name) / middle(peer, name):.2f})" if peer else ""


if __name__ == "__main__":
    main()
