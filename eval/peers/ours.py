"""Prune by llmprune, from a folder into a folder; print seconds by stage."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from runner import answer, calibration, share_and_groups

STAGES = ("embed", "survey", "cut")


def run(asked: argparse.Namespace) -> dict[str, Any]:
    import llmprune

    share, kept, _ = share_and_groups(asked.pattern)
    settings = ["evaluate.perplexity=false"]
    settings += [f"calibration.micro_batch={asked.batch}"] if asked.batch else []
    cpu = time.process_time()
    llmprune.prune(
        asked.model,
        method=asked.method,
        calib=calibration(asked),
        out=asked.out,
        settings=settings,
        device="cpu",
        dtype=asked.dtype,
        quiet=True,
        **({"pattern": asked.pattern} if kept else {"sparsity": share}),
    )
    cpu = time.process_time() - cpu
    report = json.loads((asked.out / "llmprune" / "report.json").read_text())
    seconds = report["seconds"]
    parts: dict[str, float] = {}
    for block in report["blocks"]:
        for name, value in block["seconds"].items():
            parts[name] = round(parts.get(name, 0.0) + value, 3)
    return {
        "engine": sum(seconds.get(stage, 0.0) for stage in STAGES),
        "engine_cpu": cpu,
        "stages": seconds,
        "parts": parts,
        "batch": report["run"]["micro_batch"],
        "result": str(asked.out),
        "version": llmprune.__version__,
    }


if __name__ == "__main__":
    answer(run, __doc__.splitlines()[0])
