"""Parity with the published Wanda code: same tokens in, (nearly) the same masks and losses out.

The goldens were made in float32, batch 1, eager attention. See README.md beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmprune import api
from llmprune.checkpoint.locate import open_source
from llmprune.delivery.masks import MaskFiles
from llmprune.engine import solving
from llmprune.mask.packed import unpack
from llmprune.report.run import Report
from tests.reference.perplexities import of_model

HERE = Path(__file__).parent
NUM_BLOCKS = 6
EXACT = ("attention=eager", "dtype=float32", "device=cpu", "evaluate.perplexity=false")
PUBLISHED = {"wanda-0.5": 47.643, "wanda-2of4": 51.969, "magnitude-0.5": 49.196}
pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    with safe_open(str(HERE / "tokens.safetensors"), "pt") as handle:
        return {name: handle.get_tensor(name).long() for name in handle.keys()}  # noqa: SIM118


def kept(name: str, model: str = "demo") -> dict[str, Tensor]:
    """Return what the published code kept, by linear, of the blocks that a model has."""
    shapes = {key: entry.shape for key, entry in open_source(model).entries.items()}
    with safe_open(str(HERE / f"{name}.kept.safetensors"), "pt") as handle:
        return {
            key.removesuffix(".weight"): unpack(handle.get_tensor(key), tuple(shapes[key]))
            for key in handle.keys()  # noqa: SIM118
            if key in shapes
        }


def beginning(folder: Path, num_blocks: int) -> str:
    """Write the first blocks of the demo model into a folder: later ones change no mask of them."""
    source = open_source("demo")
    parts = [name.split(".") for name in source.entries]
    names = [".".join(part) for part in parts if part[1] != "layers" or int(part[2]) < num_blocks]
    folder.mkdir()
    save_file(source.get(names), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_blocks}))
    for path in source.folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return str(folder)


def wish(name: str) -> dict[str, Any]:
    """Return the keywords of a run that the goldens have."""
    method, amount = name.split("-")
    group = "row" if method == "wanda" else "matrix"
    share = {"pattern": "2:4"} if amount == "2of4" else {"sparsity": float(amount)}
    return {"method": method, "settings": (*EXACT, f"prune.group={group}"), **share}


def masks_of(name: str, tokens: dict[str, Tensor], out: Path, model: str = "demo") -> Any:
    """Prune a model with the goldens' tokens; return our masks by linear."""
    api.prune(model, out=out, calib=tokens["calibration"], quiet=True, **wish(name))
    masks = MaskFiles(out)
    ours: dict[str, Tensor] = {}
    for index in range(NUM_BLOCKS):
        ours |= masks.of_block(f"model.layers.{index}.")
    return ours


def perplexity_of(folder: str | Path, tokens: dict[str, Tensor]) -> float:
    model = api.load(folder, dtype="float32", device="cpu")
    return of_model(model, tokens["evaluation"], micro_batch=4)[0]


def test_wanda_agrees_with_the_published_masks_of_the_first_two_blocks(
    tokens: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = beginning(tmp_path / "beginning", 2)
    theirs = kept("wanda-0.5", model)
    assert len(theirs) == 2 * 7
    gaps = gaps_of_disagreements("wanda-0.5", model, theirs, monkeypatch)
    check_wanda(masks_of("wanda-0.5", tokens, tmp_path / "out", model), theirs, gaps)


@pytest.mark.slow  # 65,000 tokens through six blocks
@pytest.mark.parametrize("name", ["wanda-0.5", "wanda-2of4"])
def test_wanda_agrees_with_the_published_masks_and_perplexity(
    name: str, tokens: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = kept(name)
    assert len(theirs) == NUM_BLOCKS * 7
    gaps = gaps_of_disagreements(name, "demo", theirs, monkeypatch)
    check_wanda(masks_of(name, tokens, tmp_path / "out"), theirs, gaps)
    assert perplexity_of(tmp_path / "out", tokens) == pytest.approx(PUBLISHED[name], rel=3e-3)


def check_wanda(ours: dict[str, Tensor], theirs: dict[str, Tensor], gaps: list[float]) -> None:
    """Check that masks agree but for a thousandth, whose scores are next to the threshold."""
    assert ours.keys() == theirs.keys()
    for key, mask in theirs.items():
        share = float((ours[key] == mask).float().mean())
        assert share >= 0.999, f"{key}: {share}"
    assert len(gaps) == len(theirs)
    assert max(gaps) <= 1e-4


def gaps_of_disagreements(
    name: str,
    model: str,
    theirs: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> list[float]:
    """Record, per linear, how far from its threshold the farthest disagreeing score lies."""
    shape = {"num_samples": 128, "seq_len": 512}
    order = [site.name for site in api.plan(model, **wish(name), **shape).sites]
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
    ours = masks_of("magnitude-0.5", tokens, tmp_path / "out")
    theirs = kept("magnitude-0.5")
    assert ours.keys() == theirs.keys() and len(theirs) == NUM_BLOCKS * 7
    source = open_source("demo")
    for key, mask in theirs.items():
        weight = source.get([f"{key}.weight"])[f"{key}.weight"].float().abs()
        threshold = np.sort(weight.flatten().numpy())[int(weight.numel() * 0.5)]
        differing = weight[ours[key] != mask]
        assert bool((differing == threshold).all()), key
        assert int((~ours[key]).sum()) == weight.numel() // 2


@pytest.mark.slow  # a loss of 48,000 tokens
def test_magnitude_has_the_published_perplexity(tokens: dict[str, Tensor], tmp_path: Path) -> None:
    masks_of("magnitude-0.5", tokens, tmp_path / "out")
    found = perplexity_of(tmp_path / "out", tokens)
    assert found == pytest.approx(PUBLISHED["magnitude-0.5"], rel=3e-3)


def test_dense_perplexity_is_the_published_one(tokens: dict[str, Tensor]) -> None:
    assert perplexity_of("demo", tokens) == pytest.approx(45.260, rel=1e-4)


@pytest.mark.slow  # Gram matrices of 65,000 tokens
@pytest.mark.parametrize(
    ("name", "published"), [("sparsegpt-0.6", 49.374), ("sparsegpt-2of4", 49.757)]
)
def test_sparsegpt_is_as_good_as_the_published_code(
    name: str, published: float, tokens: dict[str, Tensor], tmp_path: Path
) -> None:
    masks_of(name, tokens, tmp_path / "out")
    assert perplexity_of(tmp_path / "out", tokens) == pytest.approx(published, rel=0.005)
    sites = [
        row for block in Report.read(tmp_path / "out").data["blocks"] for row in block["sites"]
    ]
    assert min(row["accepted"] for row in sites) >= 0.9
