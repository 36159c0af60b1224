"""Perplexity of one-shot methods on the bundled model: one line per method, amount and seed.

    python eval/oneshot/demo.py wanda sparsegpt best --amounts 0.6 2:4 --seeds 0 1 2
    python eval/oneshot/demo.py alps+allocation=sensitivity --amounts 0.7 --text a.txt b.txt
    python eval/oneshot/demo.py compact flap+form=masked --amounts 0.2 --every 4

A method is a row of `llmprune methods` or an effort; `+KEY=VALUE` sets keys of the prune step. Each
seed draws its own calibration windows. `--tokens FILE.safetensors` takes the tensors `calibration`
and, without --text, `evaluation` of a file instead. Every line is appended to --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.calibration.heldout import evaluation_text
from llmprune.catalog import METHODS
from llmprune.checkpoint.locate import open_source
from llmprune.evaluation.perplexity import loss_of_model, pose
from llmprune.recipe.effort import EFFORTS


def main() -> None:
    asked = arguments()
    folder = open_source("demo").folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows_NT = evaluation_windows(asked, tokenizer)
    for method in asked.methods:
        for amount in asked.amounts:
            for seed in asked.seeds:
                row = measure(method, amount, seed, asked, folder, tokenizer, windows_NT)
                print(json.dumps(row), flush=True)
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--amounts", nargs="+", default=["0.5"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--every", type=int, default=1, help="measure on every Nth window")
    parser.add_argument("--text", nargs="*", type=Path, default=[])
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, default=Path("oneshot.jsonl"))
    return parser.parse_args()


def evaluation_windows(asked: argparse.Namespace, tokenizer: Any) -> Tensor:
    """Return the windows (N, T) whose perplexity is measured."""
    if asked.tokens and not asked.text:
        return load_file(asked.tokens)["evaluation"].long()[:: asked.every]
    texts = [path.read_text(encoding="utf-8") for path in asked.text]
    text = "\n\n".join(texts) if texts else evaluation_text("demo", tokenizer=tokenizer)
    return pose(text, tokenizer, data="text", seq_len=asked.seq_len).windows.inputs_NT[
        :: asked.every
    ]


def measure(
    method: str,
    amount: str,
    seed: int,
    asked: argparse.Namespace,
    folder: Path,
    tokenizer: Any,
    windows_NT: Tensor,
) -> dict[str, Any]:
    """Prune the model in memory and return a line of the results."""
    name, *settings = method.replace("wanda++", "wanda\0").split("+")
    name = name.replace("\0", "++")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    report, seconds = None, 0.0
    if name != "dense":
        wish: dict[str, Any] = {"effort" if name in EFFORTS else "method": name}
        wish |= (
            {"pattern": amount} if ":" in amount or "x" in amount else {"sparsity": float(amount)}
        )
        calib: Any = load_file(asked.tokens)["calibration"].long() if asked.tokens else "demo"
        wish |= {"num_samples": asked.num_samples, "seq_len": asked.seq_len, "seed": seed}
        wish |= {"settings": [f"prune.{setting}" for setting in settings]}
        start = time.perf_counter()
        model, report = prune(model, calib=calib, tokenizer=tokenizer, quiet=True, **wish)
        seconds = time.perf_counter() - start
    loss, count = loss_of_model(model, windows_NT, micro_batch=8)
    row = {
        "method": name,
        "settings": " ".join(settings),
        "amount": amount,
        "seed": seed,
        "perplexity": round(math.exp(loss / count), 4),
        "seconds": round(seconds, 1),
    }
    return row | (facts(report) if report is not None else {})


def prune(model: Any, **wish: Any) -> tuple[Any, llmprune.Report]:
    """Prune the model in memory or, where all its blocks are cut at once, by way of a folder."""
    method = METHODS.get(wish.get("method", ""))
    if method is None or method.pattern != "hidden":
        return model, llmprune.prune(model, **wish)
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "out"
        report = llmprune.prune("demo", out=out, **{**wish, "tokenizer": None})
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), report


def facts(report: llmprune.Report) -> dict[str, Any]:
    """Return what a report says of updates and allocation."""
    rows = [row for block in report.data["blocks"] for row in block["sites"]]
    accepted = [row["accepted"] for row in rows if "accepted" in row]
    found: dict[str, Any] = {"sparsity": round(report.sparsity, 6)}
    found |= {"parameters": report.data["parameters_after"]}
    found |= {"accepted": round(min(accepted), 4)} if accepted else {}
    return found | ({"verdict": report.data["verdict"]} if report.data.get("verdict") else {})


if __name__ == "__main__":
    main()
