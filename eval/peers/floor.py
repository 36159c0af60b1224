"""Time one plain forward of the blocks over the tokens: what no method can do without."""

from __future__ import annotations

import argparse
import time
from typing import Any

from runner import answer, calibration


def run(asked: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from llmprune.calibration.replay import call, capture

    dtype, batch = getattr(torch, asked.dtype), asked.batch or 1
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).eval()
    blocks = model.model.layers
    with torch.no_grad():
        batches = [capture(model, blocks, ids) for ids in calibration(asked).split(batch)]
        start, cpu = time.perf_counter(), time.process_time()
        for index, block in enumerate(blocks):
            batches = [(call(block, hidden, given[index]), given) for hidden, given in batches]
        engine, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "engine": engine,
        "engine_cpu": cpu,
        "batch": batch,
        "result": None,
        "version": transformers.__version__,
    }


if __name__ == "__main__":
    answer(run, __doc__.splitlines()[0])
