"""Prune by llm-compressor's `oneshot`, from a folder into a folder; runs in the peers' environment.

Its sequential pipeline, as its modifiers choose it; the head is left alone, as everywhere here. The
result is saved dense: it no longer writes sparse layouts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from runner import answer, calibration, share_and_groups


def run(asked: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    share, kept, group = share_and_groups(asked.pattern)
    # its N:M counts what goes, ours what stays
    structure = f"{group - kept}:{group}" if group else "0:0"
    ids_NT = calibration(asked)
    rows = {"input_ids": ids_NT.tolist(), "attention_mask": torch.ones_like(ids_NT).tolist()}
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[asked.method]
    start, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        tokenizer=asked.model,
        recipe=modifier(sparsity=share, mask_structure=structure, ignore=["re:.*lm_head"]),
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=ids_NT.shape[0],
        max_seq_length=ids_NT.shape[1],
        shuffle_calibration_samples=False,
        **({"batch_size": asked.batch} if asked.batch else {}),
    )
    engine, cpu = time.perf_counter() - start, time.process_time() - cpu
    model.save_pretrained(asked.out, save_compressed=False)
    return {
        "engine": engine,
        "engine_cpu": cpu,
        "batch": asked.batch or 1,
        "result": str(asked.out),
        "version": version("llmcompressor"),
    }


if __name__ == "__main__":
    answer(run, __doc__.splitlines()[0])
