"""One cut before training against cuts on the way: the same sparsity, tokens, rate and batches.

    python -m eval.recovery.schedules --data BOOKS --heldout A.txt B.txt --schedules one-shot cubic

The demo model is trained whole (`full`) while weights are removed by a schedule; `one-shot` removes
all at the first step. Losses are of held-out text, as in `eval/recovery/shares.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import llmprune
from eval.recovery.shares import heldout_windows, loss_of


def main() -> None:
    asked = arguments()
    asked.work.mkdir(parents=True, exist_ok=True)
    windows_NT = heldout_windows(asked)
    for seed in asked.seeds:
        for schedule in asked.schedules:
            out = asked.work / f"{schedule}-{asked.sparsity:g}-{asked.steps}-{seed}"
            if not out.exists():
                llmprune.recover(
                    "demo", data=asked.data, method="full", steps=asked.steps, out=out, seed=seed,
                    quiet=True, learning_rate=asked.rate,
                    settings=[
                        "evaluate.perplexity=false",
                        f"recover.prune.sparsity={asked.sparsity}",
                        f"recover.prune.method={asked.method}",
                        f"recover.schedule={schedule}",
                        f"recover.every={asked.every_steps}",
                    ],
                )  # fmt: skip
            data = llmprune.Report.read(out).data
            row = {
                **{"schedule": schedule, "seed": seed, "steps": asked.steps, "rate": asked.rate},
                **{"method": asked.method, "sparsity": data["sparsity"]},
                "loss": loss_of(str(out), windows_NT),
                "seconds": data["seconds"]["train"],
            }
            print(json.dumps(row), flush=True)
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", nargs="+", default=["one-shot", "cubic", "one-cycle"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every-steps", type=int, default=5, help="steps between cuts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--heldout", nargs="+", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4, help="measure on every Nth window")
    parser.add_argument("--work", type=Path, default=Path("schedules"))
    parser.add_argument("--out", type=Path, default=Path("schedules.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
