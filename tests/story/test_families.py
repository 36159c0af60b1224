"""Every family of the table and some without a row: pruned from disk, reloaded, logits equal.

The gate that ends each run compares a stock load with a walk over the stored blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmprune import api
from llmprune.arch.table import FAMILIES
from llmprune.report.run import Report

Pico = Callable[..., Path]

IN_TABLE = sorted(name for row in FAMILIES for name in row.model_types)
WITHOUT_ROW = ("codegen", "gemma3n_text", "granitemoe", "minimax", "qwen3_next", "recurrent_gemma")
WITH_FFN = sorted(  # dense ones whose config counts channels
    name
    for row in FAMILIES
    if any(ffn.config_key for ffn in row.ffns) and not any(each.stacked for each in row.unfuse)
    for name in row.model_types
)

pytestmark = pytest.mark.usefixtures("quick_gate")


def prune(source: Path, out: Path, **wishes: Any) -> Report:
    tokens = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    settings = ["evaluate.perplexity=false", *wishes.pop("settings", ())]
    return api.prune(
        source, out=out, calib=tokens, device="cpu", quiet=True, settings=settings, **wishes
    )


def logits_of(folder: Path, tokens_NT: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", [*IN_TABLE, *WITHOUT_ROW])
def test_a_family_is_pruned_and_reloaded(family: str, pico: Pico, tmp_path: Path) -> None:
    report = prune(pico(family), tmp_path / "out", sparsity=0.5)
    assert report.data["gate"]["agreement"]["passed"]
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    rows = [row for block in report.data["blocks"] for row in block["sites"]]
    assert all(row["tokens"] for row in rows if "experts" not in row["site"])  # every tap was read
    assert report.data["gate"]["masked_linears"] == len(rows)


@pytest.mark.parametrize("family", WITH_FFN)
def test_ffn_channels_cut_out_or_zeroed_compute_the_same(
    family: str, pico: Pico, tmp_path: Path, tokens: Tensor
) -> None:
    wishes = {"sparsity": 0.25, "pattern": "ffn-channels", "method": "magnitude"}
    prune(pico(family), tmp_path / "small", **wishes)
    prune(pico(family), tmp_path / "zeros", settings=["prune.form=masked"], **wishes)
    small, zeros = logits_of(tmp_path / "small", tokens), logits_of(tmp_path / "zeros", tokens)
    dense = logits_of(pico(family), tokens)
    assert float((small - zeros).abs().max()) < 1e-5 * float(zeros.abs().max())
    assert float((small - dense).abs().max()) > 1e-2 * float(dense.abs().max())
