"""Parity with the published Wanda code: same tokens in, (nearly) the same masks and losses out.

The goldens were made in float32, batch 1, eager attention. See README.md beside this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmprune import api
from llmprune.checkpoint.locate import open_source
from llmprune.delivery.masks import MaskFiles
from llmprune.evaluation.perplexity import of_model
from llmprune.mask.packed import unpack

HERE = Path(__file__).parent
EXACT = ("attention=eager", "dtype=float32", "device=cpu", "evaluate.perplexity=false")
PUBLISHED = {"wanda-0.5": 47.643, "wanda-2of4": 51.969, "magnitude-0.5": 49.196}


@pytest.fixture(scope="module")
def tokens() -> dict[str, torch.Tensor]:
    with safe_open(str(HERE / "tokens.safetensors"), "pt") as handle:
        return {name: handle.get_tensor(name).long() for name in handle.keys()}  # noqa: SIM118


def kept(name: str) -> dict[str, torch.Tensor]:
    """Return what the published code kept, by linear."""
    shapes = {key: entry.shape for key, entry in open_source("demo").entries.items()}
    with safe_open(str(HERE / f"{name}.kept.safetensors"), "pt") as handle:
        return {
            key.removesuffix(".weight"): unpack(handle.get_tensor(key), tuple(shapes[key]))
            for key in handle.keys()  # noqa: SIM118
        }


def pruned(name: str, tokens: dict[str, torch.Tensor], tmp_path: Path) -> tuple[dict, float]:
    """Prune the demo model with the goldens' tokens; return our masks and our perplexity."""
    method, amount = name.split("-")
    wish = {"pattern": "2:4"} if amount == "2of4" else {"sparsity": float(amount)}
    api.prune(
        "demo",
        method=method,
        out=tmp_path / name,
        calib=tokens["calibration"],
        quiet=True,
        settings=(*EXACT, "prune.group=row" if method == "wanda" else "prune.group=matrix"),
        **wish,
    )
    masks = MaskFiles(tmp_path / name)
    ours = {}
    for index in range(6):
        ours |= masks.of_block(f"model.layers.{index}.")
    model = api.load(tmp_path / name, dtype="float32", device="cpu")
    return ours, of_model(model, tokens["evaluation"], micro_batch=4)[0]


@pytest.mark.parametrize("name", ["wanda-0.5", "wanda-2of4"])
def test_wanda_agrees_with_the_published_masks(
    name: str, tokens: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours, loss = pruned(name, tokens, tmp_path)
    theirs = kept(name)
    assert ours.keys() == theirs.keys()
    equal = sum(int((ours[key] == theirs[key]).sum()) for key in theirs)
    total = sum(mask.numel() for mask in theirs.values())
    for key in theirs:
        share = float((ours[key] == theirs[key]).float().mean())
        assert share >= 0.999, f"{key}: {share}"
    assert equal / total >= 0.999
    assert loss == pytest.approx(PUBLISHED[name], rel=3e-3)


def test_magnitude_differs_only_in_ties_and_the_one_extra_weight(
    tokens: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours, loss = pruned("magnitude-0.5", tokens, tmp_path)
    theirs = kept("magnitude-0.5")
    source = open_source("demo")
    for key, mask in theirs.items():
        weight = source.get([f"{key}.weight"])[f"{key}.weight"].float().abs()
        threshold = np.sort(weight.flatten().numpy())[int(weight.numel() * 0.5)]
        differing = weight[ours[key] != mask]
        assert bool((differing == threshold).all()), key
        assert int((~ours[key]).sum()) == weight.numel() // 2
    assert loss == pytest.approx(PUBLISHED["magnitude-0.5"], rel=3e-3)


def test_dense_perplexity_is_the_published_one(tokens: dict[str, torch.Tensor]) -> None:
    model = api.load("demo", dtype="float32", device="cpu")
    assert of_model(model, tokens["evaluation"], micro_batch=4)[0] == pytest.approx(
        45.260, rel=1e-4
    )
