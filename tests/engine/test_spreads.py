"""Counts of scores and activations for the report: right, the same again, and without effect."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import llmprune
from llmprune.engine import spreads
from llmprune.engine.spreads import BIAS, Spreads, exponents_of
from tests.conftest import Pico

WISH: dict[str, Any] = {"sparsity": 0.5, "num_samples": 4, "seq_len": 16, "quiet": True}


def slow(values: torch.Tensor) -> Counter[int]:
    """Return how many positive normal numbers lie from 2^e on, by e."""
    found = [float(v) for v in values.flatten() if 2**-126 <= float(v) < math.inf]
    return Counter(math.frexp(v)[1] - 1 for v in found)


def counted(spread: dict[str, Any], part: str) -> Counter[int]:
    counts = map(int, spread["counts"][part].split())
    return Counter({spread["low"] + i: count for i, count in enumerate(counts) if count})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_counted_by_their_powers_of_two(dtype: torch.dtype) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).mul(3).exp2().to(dtype)
    values[:6] = torch.tensor([0.0, -1.0, math.inf, -math.inf, math.nan, 1.0])
    found = exponents_of(values)[0]
    expected = slow(values.float())
    assert sum(expected.values()) == 495
    assert {e - BIAS: int(found[e]) for e in found.nonzero().flatten().tolist()} == dict(expected)


def test_counts_of_a_hand_made_linear() -> None:
    score_OI = torch.tensor([[1.0, 3.0], [0.3, 0.0]])
    found = Spreads()
    found.judge("mlp.up_proj", score_OI, score_OI > 0.5)
    found.observe("ffn_in", torch.tensor([400.0, 1.0]), 100)  # root mean square 2 and 0.1
    assert found.to_dict() == {
        "scores": {
            "mlp.up_proj": {"low": -2, "counts": {"removed": "1 0 0 0", "kept": "0 0 1 1"}},
        },
        "activations": {"ffn_in": {"low": -4, "counts": {"all": "1 0 0 0 0 1"}}},
    }


def test_experts_are_one_kind_and_parts_of_a_linear_add_up() -> None:
    keep, score = torch.tensor([[True, False]]), torch.tensor([[1.0, 1.0]])
    found = Spreads()
    found.judge("mlp.experts.0.up_proj", score, keep)
    found.judge("mlp.experts.1.up_proj", 2 * score, keep)
    found.judge("mlp.experts.1.up_proj", 2 * score, keep, first=False)
    (kind,) = found.to_dict()["scores"]
    assert kind == "mlp.experts.*.up_proj"
    assert found.to_dict()["scores"][kind]["counts"] == {"removed": "1 2", "kept": "1 2"}
    found.judge("mlp.experts.1.up_proj", 2 * score, keep)  # decided anew
    assert found.to_dict()["scores"][kind]["counts"] == {"removed": "1 1", "kept": "1 1"}
    assert Spreads().to_dict() == {}


def test_of_a_large_linear_whole_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreads, "SAMPLE", 8)
    score_OI = torch.arange(1.0, 25.0).view(6, 4)
    found = Spreads()
    found.judge("a", score_OI, score_OI > 4)
    expected = slow(score_OI[::3])
    assert counted(found.to_dict()["scores"]["a"], "kept") == expected - slow(score_OI[0])
    found.judge("b", score_OI[:, :2], score_OI[:, :2] > 4, parts=2)
    assert counted(found.to_dict()["scores"]["b"], "kept") == slow(score_OI[::3, :2]) - slow(
        score_OI[0, :2]
    )


def test_a_run_counts_all_scores_and_channels(
    pico: Pico, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    wish = WISH | {"calib": str(text_file), "settings": ["evaluate.perplexity=false"]}
    for method in ("wanda", "sparsegpt"):
        report = llmprune.prune(pico("llama"), out=tmp_path / method, method=method, **wish)
        for block in report.data["blocks"]:
            taps = block["spreads"]["activations"]
            assert set(taps) == {"attn_in", "attn_out", "ffn_in", "ffn_out"}
            rows = {row["site"].split(f".{block['block']}.")[1]: row for row in block["sites"]}
            assert block["spreads"]["scores"].keys() == rows.keys()
            for name, row in rows.items():
                spread = block["spreads"]["scores"][name]
                assert counted(spread, "kept").total() == row["weights"] - row["removed_weights"]
                assert counted(spread, "removed").total() == row["removed_weights"]


def test_counting_changes_no_byte(
    pico: Pico, tmp_path: Path, text_file: Path, quick_gate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = WISH | {"calib": str(text_file), "settings": ["evaluate.perplexity=false"]}

    def weights(name: str) -> dict[str, bytes]:
        out = tmp_path / name
        llmprune.prune(pico("llama"), out=out, method="sparsegpt", **wish)
        return {p.name: p.read_bytes() for p in out.rglob("*.safetensors")}

    counted_too = weights("with")
    monkeypatch.setattr(Spreads, "judge", lambda *args, **options: None)
    monkeypatch.setattr(Spreads, "observe", lambda *args, **options: None)
    assert weights("without") == counted_too
    assert len(counted_too) > 4


def test_units_are_counted_too(
    pico: Pico, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    settings = ["evaluate.perplexity=false"]
    report = llmprune.prune(
        pico("llama"), out=tmp_path / "out", method="wanda", pattern="ffn-channels",
        calib=str(text_file), settings=settings, **WISH,
    )  # fmt: skip
    for block in report.data["blocks"]:
        (row,) = block["sites"]
        (spread,) = block["spreads"]["scores"].values()
        assert counted(spread, "kept").total() == row["units"] - row["removed"]
