"""What llmprune costs: memory by depth, time by the model's own forward, bytes per second.

usage: python eval/cost/measure.py memory | wanda | methods | magnitude | startup   [--help]
Everything is a ratio within one run, or per core, so that it means the same on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "wanda", "methods", "magnitude", "startup"))
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--against", nargs="+", default=["sparsegpt"])
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    what = {"memory": memory, "wanda": wanda, "methods": methods, "magnitude": magnitude}
    (what | {"startup": startup})[args.what](args)


def checkpoint(folder: str, args: argparse.Namespace, blocks: int) -> Path:
    """Write the random model to measure on."""
    import torch
    from models import write_llama

    return write_llama(
        Path(folder) / f"llama-{blocks}",
        blocks=blocks,
        hidden=args.hidden,
        ffn=args.ffn,
        dtype=getattr(torch, args.dtype),
    )


def command(model: Path, out: Path, args: argparse.Namespace, method: str) -> list[str]:
    """Return the command line of a pruning."""
    return [
        *(sys.executable, "-m", "llmprune", "--model", str(model), "--sparsity", "0.5"),
        *("--method", method, "--out", str(out), "--no-eval", "--quiet", "--calib", "demo"),
        *("--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len)),
    ]


def memory(args: argparse.Namespace) -> None:
    """Peak anonymous pages of the run and its children, for every depth."""
    libraries, _ = peak_of([sys.executable, "-c", LIBRARIES])
    print(f"libraries alone: {libraries / 1e6:.0f} MB in each process")
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            model = checkpoint(folder, args, blocks)
            line = command(model, Path(folder) / "out", args, args.method)
            plan = json.loads(subprocess.check_output([*line, "--dry-run", "--json"]))
            peak, over = peak_of(line, libraries)
        estimate = plan["estimate"]["host_peak"]
        largest = largest_part(args, plan)
        print(
            f"{blocks} blocks: peak {peak / 1e6:.0f} MB, plan {estimate / 1e6:.0f} MB "
            f"(ratio {peak / estimate:.3f}), over libraries {over / 1e6:.0f} MB = "
            f"{over / largest:.2f} x the largest part of {largest / 1e6:.0f} MB"
        )


LIBRARIES = "import torch, transformers, datasets, accelerate, pydantic, safetensors.torch; \
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM"


def largest_part(args: argparse.Namespace, plan: dict) -> int:
    """Return the bytes of the largest of block, embedding, and head + hidden + statistics."""
    size = {"bfloat16": 2, "float16": 2, "float32": 4}
    held = size[plan["dtype"]] if plan["forward"] else size[args.dtype]
    block = (2.5 * args.hidden**2 + 3 * args.hidden * args.ffn) * held
    embedding = 4096 * args.hidden * held
    hidden = plan["estimate"]["hidden_bytes"] if plan["forward"] else 0
    return int(max(block, embedding, embedding + hidden))


def peak_of(line: list[str], libraries: int = 0) -> tuple[int, int]:
    """Run a command; return the largest sum of anonymous pages over it and its children.

    The second number is the same sum without the libraries of every process alive at that time.
    """
    process = subprocess.Popen(line)
    peak = over = 0
    while process.poll() is None:
        sizes = [anonymous(pid) for pid in tree(process.pid)]
        peak = max(peak, sum(sizes))
        over = max(over, sum(max(0, size - libraries) for size in sizes))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(line)} failed")
    return peak, over


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in tree(int(child)))]


def anonymous(pid: int) -> int:
    """Return the anonymous pages of a process in bytes."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def wanda(args: argparse.Namespace) -> None:
    """Time of the cut against the blocks' own forward of the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmprune.calibration.replay import call, capture

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = checkpoint(folder, args, args.blocks[0])
        subprocess.run(command(model, Path(folder) / "out", args, "wanda"), check=True)
        report = json.loads((Path(folder) / "out" / "llmprune" / "report.json").read_text())
        stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        micro = report["run"]["micro_batch"]
        tokens = torch.randint(0, 4096, (args.num_samples, args.seq_len))
        with torch.no_grad():
            batches = [capture(stock, stock.model.layers, ids) for ids in tokens.split(micro)]
            start = time.perf_counter()
            for index, block in enumerate(stock.model.layers):
                batches = [(call(block, h, rows[index]), rows) for h, rows in batches]
            forward = time.perf_counter() - start
    cut = report["seconds"]["cut"]
    parts: dict[str, float] = {}
    for row in report["blocks"]:
        for name, value in row["seconds"].items():
            parts[name] = parts.get(name, 0.0) + value
    shares = ", ".join(f"{name} {value / forward:.2f}" for name, value in parts.items())
    print(
        f"cut {cut:.2f} s, the blocks' own forward {forward:.2f} s: ratio {cut / forward:.2f} "
        f"({shares}); {tokens.numel()} tokens, micro-batch {micro}, {args.threads} threads"
    )


def methods(args: argparse.Namespace) -> None:
    """Engine time (embed and cut) of methods against that of `--method`, on one model."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = checkpoint(folder, args, args.blocks[0])
        found = {}
        for method in (args.method, *args.against):
            out = Path(folder) / method
            subprocess.run(command(model, out, args, method), check=True)
            seconds = json.loads((out / "llmprune" / "report.json").read_text())["seconds"]
            found[method] = seconds["embed"] + seconds["cut"] + seconds.get("survey", 0.0)
    tokens = f"{args.num_samples} x {args.seq_len} tokens"
    shape = f"{args.blocks[0]} blocks of hidden {args.hidden}, FFN {args.ffn}"
    for method, seconds in found.items():
        ratio = seconds / found[args.method]
        print(f"{method}: {seconds:.1f} s, {ratio:.2f} x {args.method} ({shape}, {tokens})")


def magnitude(args: argparse.Namespace) -> None:
    """Bytes of weights per second and core that are read, masked, hashed and written."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        model = checkpoint(folder, args, args.blocks[0])
        subprocess.run(command(model, Path(folder) / "out", args, "magnitude"), check=True)
        report = json.loads((Path(folder) / "out" / "llmprune" / "report.json").read_text())
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    seconds = report["seconds"]["cut"] + report["seconds"]["finish"]
    print(
        f"{size / 1e9:.2f} GB in {seconds:.2f} s with {args.threads} threads: "
        f"{size / seconds / args.threads / 1e9:.3f} GB/s per core"
    )


def startup(args: argparse.Namespace) -> None:
    """Seconds of `llmprune --help` and of `import llmprune`, and that neither loads torch."""
    python = sys.executable
    for name, line in (
        ("--help", [python, "-m", "llmprune", "--help"]),
        ("import", [python, "-c", "import llmprune, sys; assert 'torch' not in sys.modules"]),
    ):
        runs = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
            runs.append(time.perf_counter() - start)
        print(f"{name}: median {statistics.median(runs):.3f} s")


if __name__ == "__main__":
    main()
