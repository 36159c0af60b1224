"""What a token of masked LoRA costs beside one of plain LoRA: time and memory, as ratios.

    python eval/recovery/cost.py DENSE MASKED --methods mask-lora hira full --tokens 1024

DENSE and MASKED are folders of one shape; plain LoRA trains the dense one. Each method runs in a
process of its own, activations checkpointed, and the processes take turns; ratios are medians of
pairs. Memory is the most that the process held while it trained, looked at every 5 ms, less what it
held before the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

PLAIN = "lora"


def main() -> None:
    asked = arguments()
    if asked.alone:
        print(json.dumps(measured(asked.alone, asked)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (PLAIN, *asked.methods)}
    for _ in range(asked.repeat):
        for name in rows:
            rows[name].append(in_a_process(name, asked))
    for name, found in rows.items():
        pairs = list(zip(found, rows[PLAIN], strict=True))
        time_ratio = median(own["seconds"] / plain["seconds"] for own, plain in pairs)
        memory = median(own["grown"] / plain["grown"] for own, plain in pairs)
        rate = median(asked.tokens / own["seconds"] for own in found)
        grown = median(own["grown"] for own in found)
        print(
            f"{name:12s} {rate:8.0f} tokens/s  {time_ratio:5.2f} x the time  "
            f"{grown / 1e6:7.0f} MB beside the weights  {memory:5.2f} x"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("masked", type=Path)
    parser.add_argument("--methods", nargs="+", default=["mask-lora", "hira", "full"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """Return what one method measures in a fresh process."""
    command = [sys.executable, __file__, str(asked.dense), str(asked.masked), "--alone", name]
    command += ["--tokens", str(asked.tokens), "--seq-len", str(asked.seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def most_held() -> Iterator[list[int]]:
    """Yield a list of one number: the most bytes that this process has held since it began."""
    from llmprune.base.memory import anonymous_bytes

    most, done = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], anonymous_bytes())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def measured(name: str, asked: argparse.Namespace) -> dict[str, float]:
    """Return seconds of a step, the mean of two, and the most bytes held beside the model."""
    import torch
    from accelerate import Accelerator

    from llmprune.base.memory import anonymous_bytes, map_large_pieces, return_freed
    from llmprune.base.progress import Progress
    from llmprune.recipe import recovery_recipe
    from llmprune.recovery.examples import examples_of
    from llmprune.recovery.loop import train
    from llmprune.recovery.planning import open_recovery
    from llmprune.recovery.saved import Saved
    from llmprune.recovery.student import open_student

    folder = asked.dense if name == PLAIN else asked.masked
    batch = asked.tokens // asked.seq_len
    wish: dict[str, Any] = {"method": name, "steps": 2, "batch": batch, "checkpointing": True}
    wish |= {
        "seq_len": asked.seq_len,
        "evaluate_every": 2,
        "save_every": 2,
        "norms": True,
        "distill": "none",
    }
    wish |= {} if name == PLAIN else {"masks": "zeros"}
    plan = open_recovery(recovery_recipe(str(folder), wish, {"device": "cpu"}))
    shape = (2 * batch + 1, asked.seq_len)
    vocab = plan.blocks.model.config.vocab_size
    ids_NT = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(0))
    examples = examples_of(ids_NT, seed=0)
    student = open_student(plan, examples, torch.device("cpu"))
    map_large_pieces()
    return_freed()
    held = anonymous_bytes()
    with most_held() as most:
        history = train(
            student.trainee, examples, plan.course, Saved(folder=Path("unused")),
            Progress("quiet"), Accelerator(cpu=True),
        )  # fmt: skip
    return {"seconds": history.seconds / 2, "grown": float(most[0] - held)}


if __name__ == "__main__":
    main()
