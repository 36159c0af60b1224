"""What an accelerator does: the masks of the host, in a small multiple of what the products cost.

usage: python eval/accelerator/measure.py agree|cost|decode [--device cuda] [--help]

agree   prunes the demo on the host and on the device in float32: bits of masks that differ, and the
        perplexities of both, which are equal but for ties
cost    prunes a random Llama of a shape: seconds of the cut beside 4 x parameters x tokens / rate
        (one forward to observe, one to advance), with the rate of a bf16 product measured before
decode  removes 30 % of the heads and FFN channels of that Llama and measures both in turn

Prints a row of JSON per run. `--device cpu --shape 0.1` tries the script where there is none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cost"))

SHAPES = {  # blocks, hidden size, FFN
    "0.1": (4, 768, 2048),
    "1": (22, 2048, 5632),
    "8": (32, 4096, 14336),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["agree", "cost", "decode"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="8", choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "gblm"])
    parser.add_argument("--patterns", nargs="+", default=["unstructured", "2:4"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batches", default="1,8,32", help="of decode")
    parser.add_argument("--folder", type=Path, help="where models are, and stay")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for row in {"agree": agree, "cost": cost, "decode": decode}[asked.what](
            asked, Path(scratch)
        ):
            print(
                json.dumps({"what": asked.what, "device": name_of(asked.device)} | row), flush=True
            )


def agree(asked: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each method and pattern, how many bits of the masks differ, and both losses."""
    for method in asked.methods:
        for pattern in asked.patterns:
            found = {}
            for side, device in (("here", "cpu"), ("there", asked.device)):
                found[side] = scratch / f"{method}-{pattern.replace(':', 'of')}-{side}"
                prune("demo", found[side], "--method", method, "--pattern", pattern,
                      *sparsity_of(pattern), "--device", device, "--dtype", "float32",
                      "--num-samples", "32", "--seq-len", "512",
                      "--set", "evaluate.perplexity=true")  # fmt: skip
            told = {"method": method, "pattern": pattern}
            yield told | differing(found["here"], found["there"])


def differing(here: Path, there: Path) -> dict[str, Any]:
    """Return the bits of two results' masks, how many differ, and the perplexity of each."""
    from llmprune import Report
    from llmprune.delivery.masks import MaskFiles

    bits = differ = 0
    mine, theirs = MaskFiles(here), MaskFiles(there)
    for name in mine.index:
        one, other = mine.of_block(name)[name], theirs.of_block(name)[name]
        bits, differ = bits + one.numel(), differ + int((one != other).sum())
    losses = [Report.read(folder).data["perplexity"]["pruned"]["value"] for folder in (here, there)]
    return {"bits": bits, "differ": differ, "perplexity": losses}


def cost(asked: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each method, what its cut took beside the floor."""
    model, rate = model_of(asked, scratch), product_rate(asked.device)
    for method in asked.methods:
        out = scratch / "out"
        line = (
            *("--method", method, "--sparsity", "0.5", "--device", asked.device, "--no-eval"),
            *("--num-samples", str(asked.num_samples), "--seq-len", str(asked.seq_len)),
        )
        plan = json.loads(
            subprocess.check_output([*command(str(model), out), *line, "--dry-run", "--json"])
        )
        start = time.perf_counter()
        prune(str(model), out, *line, "--profile")
        seconds = time.perf_counter() - start
        report = json.loads((out / "llmprune" / "report.json").read_text())
        tokens = asked.num_samples * asked.seq_len
        floor = 4 * sum(row["units"] for row in plan["sites"].values()) * tokens / rate
        parts: dict[str, float] = {}
        for block in report["blocks"]:
            for name, value in block["seconds"].items():
                parts[name] = round(parts.get(name, 0.0) + value, 2)
        yield {
            **{"method": method, "shape": asked.shape, "tokens": tokens},
            **{"seconds": round(seconds, 1), "stages": report["seconds"], "parts": parts},
            **{"tflops": round(rate / 1e12, 2), "floor": round(floor, 2)},
            **{"cut_over_floor": round(report["seconds"]["cut"] / floor, 2)},
            **{"peak_memory": report["peak_memory"], "estimate": plan["estimate"]},
            "profile": report["profile"],
        }
        shutil.rmtree(out)


def decode(asked: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield the speed of a model without 30 % of its heads and channels beside the dense one."""
    model, out = model_of(asked, scratch), scratch / "cut"
    prune(str(model), out, "--pattern", "heads+ffn-channels", "--sparsity", "0.3", "--no-eval",
          "--num-samples", "8", "--seq-len", "512", "--device", asked.device)  # fmt: skip
    yield json.loads(
        subprocess.check_output(
            [sys.executable, "-m", "llmprune", "bench", str(out), "--against", str(model),
             "--batch", asked.batches, "--device", asked.device, "--json"]
        )
    )  # fmt: skip


def model_of(asked: argparse.Namespace, scratch: Path) -> Path:
    """Return the random model of the shape, written if it is not there."""
    from models import write_llama

    blocks, hidden, ffn = SHAPES[asked.shape]
    folder = (asked.folder or scratch) / f"llama-{asked.shape}"
    if not folder.exists():
        write_llama(folder, blocks=blocks, hidden=hidden, ffn=ffn)
    return folder


def command(model: str, out: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "llmprune",
        "--model",
        model,
        "--out",
        str(out),
        "--calib",
        "demo",
    ]


def prune(model: str, out: Path, *line: str) -> None:
    subprocess.run([*command(model, out), "--quiet", *line], check=True)


def sparsity_of(pattern: str) -> list[str]:
    return ["--sparsity", "0.5"] if pattern == "unstructured" else []


def product_rate(device: str, size: int = 8192, repeat: int = 20) -> float:
    """Return the FLOP/s of a bf16 product on a device, the best of some."""
    import torch

    size = size if device != "cpu" else 1024
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(repeat):
        wait(device)
        start = time.perf_counter()
        left @ left
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.accelerator.synchronize()


def name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
