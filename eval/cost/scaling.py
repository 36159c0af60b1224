"""Time and memory against the size of a model: random Llamas in bf16, pruned under a limit.

usage: python eval/cost/scaling.py --sizes 0.1 0.3 1 3 --methods wanda sparsegpt [--help]
Memory is the largest sum of anonymous pages over the run and its children, sampled every 10 ms. A
row of JSON per run goes to standard output. The floor is what the products of the cut cost alone:
one forward to observe and one to advance, at the rate of a matrix product measured just before.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

SHAPES = {  # blocks, hidden size, FFN
    "0.1": (14, 768, 2048),
    "0.3": (24, 1024, 2816),
    "1": (22, 2048, 5632),
    "3": (30, 3072, 8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["0.1"], choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-memory", default="cpu=8GB")
    parser.add_argument("--folder", help="where models are, and stay; otherwise they are removed")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        for size in args.sizes:
            model = checkpoint(Path(args.folder or scratch), size)
            for method in args.methods:
                out = Path(scratch) / "out"
                print(json.dumps(measured(model, out, size, method, args)), flush=True)
                shutil.rmtree(out)
            if not args.folder:
                shutil.rmtree(model)


def checkpoint(folder: Path, size: str) -> Path:
    """Return the random model of a size, written if it is not there."""
    import torch
    from models import write_llama

    blocks, hidden, ffn = SHAPES[size]
    model = folder / f"llama-{size}"
    if not model.exists():
        torch.set_num_threads(1)
        write_llama(model, blocks=blocks, hidden=hidden, ffn=ffn)
    return model


def measured(
    model: Path, out: Path, size: str, method: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Prune a model; return seconds, peaks and the floor."""
    from measure import peak_of

    line = [
        *(sys.executable, "-m", "llmprune", "--model", str(model), "--sparsity", "0.5"),
        *("--method", method, "--out", str(out), "--no-eval", "--quiet", "--calib", "demo"),
        *("--num-samples", str(args.num_samples), "--seq-len", str(args.seq_len)),
        *("--max-memory", args.max_memory),
    ]
    plan = json.loads(subprocess.check_output([*line, "--dry-run", "--json"]))
    rate = product_rate()
    start = time.perf_counter()
    peak, _ = peak_of([*line, "--profile"])
    seconds = time.perf_counter() - start
    report = json.loads((out / "llmprune" / "report.json").read_text())
    params = sum(row["units"] for row in plan["sites"].values())
    tokens = args.num_samples * args.seq_len
    blocks: dict[str, float] = {}
    for row in report["blocks"]:
        for name, value in row["seconds"].items():
            blocks[name] = round(blocks.get(name, 0.0) + value, 2)
    return {
        "size": size,
        "method": method,
        "tokens": tokens,
        "threads": args.threads,
        "seconds": round(seconds, 1),
        "stages": report["seconds"],
        "cut": blocks,
        "floor": round(2 * 2 * params * tokens / rate, 1),
        "gflops": round(rate / 1e9, 1),
        "peak": peak,
        "block_end": report["peak_memory"],
        "estimate": plan["estimate"]["host_peak"],
        "profile": report["profile"],
        "fallbacks": sum(bool(r.get("fallback")) for b in report["blocks"] for r in b["sites"]),
        "linears": sum(len(block["sites"]) for block in report["blocks"]),
    }


def product_rate() -> float:
    """Return the FLOP/s of a float32 product of 1024, the best of ten."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    left = torch.ones(1024, 1024)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


if __name__ == "__main__":
    main()
