"""How much of what pruning took does a recovery give back, on text that nothing was chosen by?

    python eval/recovery/shares.py --data BOOKS --heldout A.txt B.txt --methods mask-lora norms

The demo model is not trained to the end, so training helps it whatever was pruned. The recovered
share is therefore (loss(pruned) - loss(recovered)) / (loss(pruned) - loss(dense + the same
training)): 1 says that pruning cost nothing that training did not give back. A pruning is
METHOD@AMOUNT or METHOD@AMOUNT@PATTERN; `random@0.6` is a control, and so is a smaller dense model,
`compact@0.5@heads+ffn-channels`. A method may set keys of the step, as in `mask-lora+distill=kl`.
Every line is appended to --out, and what lies in --work is used again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

import llmprune
from llmprune.checkpoint.locate import open_source
from llmprune.evaluation.perplexity import loss_of_model, pose


def main() -> None:
    asked = arguments()
    asked.work.mkdir(parents=True, exist_ok=True)
    windows_NT = heldout_windows(asked)
    dense = loss_of(str(open_source("demo").folder), windows_NT)
    for seed in asked.seeds:
        same, seconds = recovered("demo", "lora+norms=true", seed, asked)
        best = loss_of(str(same), windows_NT)
        for pruning in asked.prunings:
            folder = pruned(pruning, seed, asked)
            before = loss_of(str(folder), windows_NT)
            for method in asked.methods:
                result, seconds = recovered(str(folder), method, seed, asked)
                after = loss_of(str(result), windows_NT)
                row = {
                    **{"pruning": pruning, "method": method, "seed": seed, "steps": asked.steps},
                    **{"dense": dense, "dense_trained": best, "pruned": before, "recovered": after},
                    "share": (before - after) / (before - best),
                    "seconds": seconds,
                    "held": held_out(result),
                }
                print(json.dumps(row), flush=True)
                with asked.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prunings", nargs="+", default=["wanda@0.6", "wanda@2:4"])
    parser.add_argument("--methods", nargs="+", default=["mask-lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--settings", nargs="*", default=[], help="keys of every recovery's step")
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", nargs="+", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="measure on every Nth window")
    parser.add_argument("--work", type=Path, default=Path("shares"))
    parser.add_argument("--out", type=Path, default=Path("shares.jsonl"))
    return parser.parse_args()


def heldout_windows(asked: argparse.Namespace) -> Tensor:
    """Return the windows (N, T) that losses are measured on."""
    tokenizer = AutoTokenizer.from_pretrained(open_source("demo").folder)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in asked.heldout)
    return pose(text, tokenizer, data="text", seq_len=512).windows.inputs_NT[:: asked.every]


def pruned(pruning: str, seed: int, asked: argparse.Namespace) -> Path:
    """Return the folder of the demo model pruned so; made where it is missing."""
    method, amount, *pattern = pruning.split("@")
    out: Path = asked.work / f"{pruning.replace(':', 'of')}-{seed}"
    if out.exists():
        return out
    wish: dict[str, Any] = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    if pattern:
        wish["pattern"] = pattern[0]
    llmprune.prune(
        "demo", method=method, out=out, seed=seed, quiet=True,
        settings=["evaluate.perplexity=false"], **wish,
    )  # fmt: skip
    return out


def recovered(folder: str, method: str, seed: int, asked: argparse.Namespace) -> tuple[Path, float]:
    """Return the folder of a recovery, made where it is missing, and the seconds it trained."""
    name, *own = method.split("+")
    settings = [*asked.settings, *own]
    out: Path = asked.work / f"{Path(folder).name}-{method}-{asked.steps}-{seed}"
    if not out.exists():
        llmprune.recover(
            folder, data=asked.data, method=name, steps=asked.steps, out=out, seed=seed, quiet=True,
            settings=["evaluate.perplexity=false", *(f"recover.{each}" for each in settings)],
        )  # fmt: skip
    report = llmprune.Report.read(out).data
    return out, float(report["seconds"]["train"])


def held_out(folder: Path) -> list[list[float]]:
    """Return the losses of what was held out of the training text, by step."""
    found: list[list[float]] = llmprune.Report.read(folder).data["recovery"][-1]["history"]["held"]
    return found


def loss_of(folder: str, windows_NT: Tensor) -> float:
    """Return the mean loss of a model, in float32 on the CPU."""
    model = llmprune.load(folder, dtype="float32", device="cpu")
    total, count = loss_of_model(model, windows_NT, micro_batch=8)
    return total / count


if __name__ == "__main__":
    main()
