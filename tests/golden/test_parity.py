"""Parity with the published Wanda code: same tokens in, (nearly) the same masks and losses out.

The goldens were made in float32, batch 1, eager attention. See README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from torch import Tensor

from llmprune import api
from llmprune.checkpoint.locate import open_source
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import solving
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from tests.reference.perplexities import of_model

HERE = Path(__file__).parent
EXACT = ("attention=eager", "dtype=float32", "device=cpu", "evaluate.perplexity=false")
PUBLISHED = {"wanda-0.5": 47.643, "wanda-2of4": 51.969, "magnitude-0.5": 49.196}


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    with safe_open(str(HERE / "tokens.safetensors"), "pt") as handle:
        return {name: handle.get_tensor(name).long() for name in handle.keys()}  # noqa: SIM118


def kept(name: str) -> dict[str, Tensor]:
    """Return what the published code kept, by linear."""
    shapes = {key: entry.shape for key, entry in open_source("demo").entries.items()}
    with safe_open(str(HERE / f"{name}.kept.safetensors"), "pt") as handle:
        return {
            key.removesuffix(".weight"): unpack(handle.get_tensor(key), tuple(shapes[key]))
            for key in handle.keys()  # noqa: SIM118
        }


def wish(name: str) -> dict[str, Any]:
    """Return the keywords of a run that the goldens have."""
    method, amount = name.split("-")
    group = "row" if method == "wanda" else "matrix"
    share = {"pattern": "2:4"} if amount == "2of4" else {"sparsity": float(amount)}
    return {"method": method, "settings": (*EXACT, f"prune.group={group}"), **share}


def pruned(name: str, tokens: dict[str, Tensor], out: Path) -> tuple[dict[str, Tensor], float]:
    """Prune the demo model with the goldens' tokens; return our masks and our perplexity."""
    api.prune("demo", out=out, calib=tokens["calibration"], quiet=True, **wish(name))
    masks = MaskFiles(out)
    ours = {}
    for index in range(6):
        ours |= masks.of_block(f"model.layers.{index}.")
    model = api.load(out, dtype="float32", device="cpu")
    return ours, of_model(model, tokens["evaluation"], micro_batch=4)[0]


@pytest.mark.parametrize("name", ["wanda-0.5", pytest.param("wanda-2of4", marks=pytest.mark.slow)])
def test_wanda_agrees_with_the_published_masks(
    name: str, tokens: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = kept(name)
    gaps = gaps_of_disagreements(name, tokens, theirs, monkeypatch)
    ours, loss = pruned(name, tokens, tmp_path / "out")
    assert ours.keys() == theirs.keys()
    for key, mask in theirs.items():
        share = float((ours[key] == mask).float().mean())
        assert share >= 0.999, f"{key}: {share}"
    assert len(gaps) == len(theirs)
    assert max(gaps) <= 1e-4
    assert loss == pytest.approx(PUBLISHED[name], rel=3e-3)


def gaps_of_disagreements(
    name: str,
    tokens: dict[str, Tensor],
    theirs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> list[float]:
    """Record, per linear, how far from its threshold the farthest disagreeing score lies."""
    shape = {"num_samples": 128, "seq_len": 512}
    order = [site.name for site in api.plan("demo", **wish(name), **shape).sites]
    decide, gaps = solving.choose_keep, []

    def choose(pattern: Any, score_OI: Tensor, count: int, *others: Any) -> Tensor:
        keep_OI = decide(pattern, score_OI, count, *others)
        disagree = keep_OI != theirs[order[len(gaps)]]
        width = getattr(pattern, "m", score_OI.shape[1])
        score, removed = score_OI.reshape(-1, width), ~keep_OI.reshape(-1, width)
        threshold = score.masked_fill(~removed, 0).amax(1, keepdim=True)
        gap = ((score - threshold).abs() / threshold)[disagree.reshape(-1, width)]
        gaps.append(float(gap.max()) if len(gap) else 0.0)
        return keep_OI

    monkeypatch.setattr(solving, "choose_keep", choose)
    return gaps


def test_magnitude_differs_only_in_ties_and_the_one_extra_weight(
    tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    ours, loss = pruned("magnitude-0.5", tokens, tmp_path / "out")
    theirs = kept("magnitude-0.5")
    source = open_source("demo")
    for key, mask in theirs.items():
        weight = source.get([f"{key}.weight"])[f"{key}.weight"].float().abs()
        threshold = np.sort(weight.flatten().numpy())[int(weight.numel() * 0.5)]
        differing = weight[ours[key] != mask]
        assert bool((differing == threshold).all()), key
        assert int((~ours[key]).sum()) == weight.numel() // 2
    assert loss == pytest.approx(PUBLISHED["magnitude-0.5"], rel=3e-3)


def test_dense_perplexity_is_the_published_one(tokens: dict[str, Tensor]) -> None:
    model = api.load("demo", dtype="float32", device="cpu")
    assert of_model(model, tokens["evaluation"], micro_batch=4)[0] == pytest.approx(
        45.260, rel=1e-4
    )


@pytest.mark.slow  # Gram matrices of 65,000 tokens
@pytest.mark.parametrize(
    ("name", "published"), [("sparsegpt-0.6", 49.374), ("sparsegpt-2of4", 49.757)]
)
def test_sparsegpt_is_as_good_as_the_published_code(
    name: str, published: float, tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    _, perplexity = pruned(name, tokens, tmp_path / "out")
    assert perplexity == pytest.approx(published, rel=0.005)
    sites = [
        row for block in Report.read(tmp_path / "out").data["blocks"] for row in block["sites"]
    ]
    assert min(row["accepted"] for row in sites) >= 0.9
