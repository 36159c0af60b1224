"""Masks that move while weights are trained, and teachers: through the whole of a recovery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api
from llmprune.base.errors import LlmpruneError
from llmprune.delivery.masks import MaskFiles
from llmprune.recovery.saved import Saved
from llmprune.report.run import Report
from tests.conftest import gate_here

pytestmark = pytest.mark.usefixtures("no_gate")
STILL = ["evaluate.perplexity=false"]


@pytest.fixture
def text() -> Tensor:
    """Sixty windows of sixteen tokens that follow one another in few ways."""
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (60, 1), generator=draw)
    return (starts + 3 * torch.arange(16)) % 64


def train(folder: Path, out: Path, text: Tensor, *settings: str, **wishes: Any) -> Report:
    wishes = {"steps": 12, "batch": 4, "learning_rate": 0.003} | wishes
    report = api.recover(
        folder,
        data=text,
        out=out,
        quiet=True,
        device="cpu",
        settings=[*STILL, "recover.every=2", *(f"recover.{each}" for each in settings)],
        **wishes,
    )
    assert report is not None
    return report


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Return the linears that have masks, with those, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    keeps = MaskFiles(folder).of_block("")
    assert keeps
    found = {}
    for name, keep_OI in keeps.items():
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            assert not weight[~keep_OI].any()
            found[name] = keep_OI
    return found


def share_of(folder: Path) -> float:
    keeps = list(weights_of(folder).values())
    return sum(int((~keep).sum()) for keep in keeps) / sum(keep.numel() for keep in keeps)


@pytest.mark.parametrize("schedule", ["one-shot", "iterative", "cubic", "one-cycle", "geometric"])
def test_a_dense_model_is_pruned_to_the_exact_share(
    schedule: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    report = train(
        pico("llama"), tmp_path / "out", text,
        "prune.sparsity=0.6", "prune.method=magnitude", f"schedule={schedule}",
    )  # fmt: skip
    assert share_of(tmp_path / "out") == pytest.approx(0.6, abs=1e-3)
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert report.data["recovery"][-1]["method"] == "full"


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "phi3"])
def test_scores_with_activations_cut_other_families(
    model_type: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    train(pico(model_type), tmp_path / "out", text, "prune.sparsity=0.5", "prune.method=wanda")
    masks = MaskFiles(tmp_path / "out").of_block("")
    removed = sum(int((~keep).sum()) for keep in masks.values())
    assert removed / sum(keep.numel() for keep in masks.values()) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("regrow", ["set", "rigl", "granet"])
def test_regrowth_moves_masks_and_keeps_the_count(
    regrow: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    wish = ("prune.sparsity=0.6", "prune.method=magnitude", "schedule=one-shot")
    train(pico("llama"), tmp_path / "still", text, *wish)
    train(pico("llama"), tmp_path / "moved", text, *wish, f"regrow={regrow}")
    still, moved = weights_of(tmp_path / "still"), weights_of(tmp_path / "moved")
    assert share_of(tmp_path / "moved") == pytest.approx(0.6, abs=1e-3)
    assert any(not torch.equal(still[name], moved[name]) for name in still)


@pytest.mark.parametrize("schedule", ["cubic", "staircase"])
def test_n_of_m_is_reached(schedule: str, pico: Any, tmp_path: Path, text: Tensor) -> None:
    train(
        pico("llama"), tmp_path / "out", text,
        "prune.pattern=2:4", "prune.method=magnitude", f"schedule={schedule}", "regrow=rigl",
    )  # fmt: skip
    for keep_OI in weights_of(tmp_path / "out").values():
        assert torch.equal(keep_OI.reshape(-1, 4).sum(1), torch.full((keep_OI.numel() // 4,), 2))


@pytest.mark.parametrize(
    "soft", ["sr-ste", "mask-decay", "mask-decay-exponential", "pdp", "soft-shrinkage"]
)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_soft_masks_end_hard(
    soft: str, pattern: str, pico: Any, tmp_path: Path, text: Tensor
) -> None:
    amount = "prune.sparsity=0.5" if pattern == "unstructured" else "prune.pattern=2:4"
    report = train(
        pico("llama"), tmp_path / "out", text, amount, "prune.method=magnitude", f"soft={soft}"
    )
    assert share_of(tmp_path / "out") == pytest.approx(0.5, abs=1e-3)
    held = report.data["recovery"][-1]["history"]["held"]
    assert held[-1][1] < held[0][1]


@pytest.mark.parametrize("rewind", ["weights", "rate"])
def test_rewinding_prunes_in_rounds(rewind: str, pico: Any, tmp_path: Path, text: Tensor) -> None:
    train(
        pico("llama"), tmp_path / "out", text,
        "prune.sparsity=0.6", "prune.method=magnitude", f"rewind={rewind}", "rounds=3",
    )  # fmt: skip
    assert share_of(tmp_path / "out") == pytest.approx(0.6, abs=1e-3)


def test_a_pruned_model_is_tightened(pico: Any, tmp_path: Path, text: Tensor) -> None:
    api.prune(
        pico("llama"), sparsity=0.3, method="magnitude", out=tmp_path / "in", device="cpu",
        quiet=True, settings=STILL,
    )  # fmt: skip
    train(tmp_path / "in", tmp_path / "out", text, "prune.sparsity=0.6", "prune.method=magnitude")
    before, after = weights_of(tmp_path / "in"), weights_of(tmp_path / "out")
    assert all(not (after[name] & ~before[name]).any() for name in before)
    assert share_of(tmp_path / "out") == pytest.approx(0.6, abs=1e-3)


def test_a_killed_run_goes_on_with_its_masks(
    pico: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    wish = ("prune.sparsity=0.6", "prune.method=magnitude", "regrow=rigl", "save_every=3")
    train(pico("llama"), tmp_path / "whole", text, *wish)
    write = Saved.write

    def dying(self: Saved, step: int, *rest: Any, **named: Any) -> None:
        write(self, step, *rest, **named)
        if step == 6:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saved, "write", dying)
        with pytest.raises(Killed):
            train(pico("llama"), tmp_path / "out", text, *wish)
    train(pico("llama"), tmp_path / "out", text, *wish)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        one, two = load_file(path), load_file(tmp_path / "out" / path.name)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def pruned(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "in"
    with gate_here():
        api.prune(
            pico("llama"), sparsity=0.5, method="magnitude", out=out, device="cpu", quiet=True,
            settings=STILL,
        )  # fmt: skip
    return out


@pytest.mark.parametrize(
    ("distill", "again"),
    [("kl", False), ("reverse-kl", False), ("hidden", True), ("kl+hidden", False)],
)
def test_a_teacher_is_followed(distill: str, again: bool, pruned: Path, tmp_path: Path) -> None:
    text = torch.randint(0, 64, (60, 16), generator=torch.Generator().manual_seed(5))
    report = train(
        pruned, tmp_path / "out", text, f"distill={distill}", f"checkpointing={again}", "rank=4",
        learning_rate=0.02, steps=20,
    )  # fmt: skip
    losses = [loss for _, loss in report.data["recovery"][-1]["history"]["training"]]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not (tmp_path / "out/llmprune/records").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["regrow=rigl"], "recover.regrow: it is about masks that move"),
        (["prune.sparsity=0.5", "method=mask-lora"], "mask-lora leaves weights frozen"),
        (["prune.sparsity=0.5", "schedule=cubix"], "'cubix' is not known.*'cubic'"),
        (["prune.sparsity=0.5", "schedule=staircase"], "a staircase leads to N:M"),
        (["prune.sparsity=0.5", "regrow=rigl", "soft=pdp"], "recover.soft: it does not go with"),
        (["distill=kll"], "recover.distill: 'kll' is not known.*'kl'"),
        (["distill=kl+kl"], "names more losses than go together"),
        (["prune.sparsity=1.5"], "steps.0..recover.prune.sparsity: 1.5 is not a fraction"),
    ],
)
def test_wrong_wishes_are_refused(
    settings: list[str], message: str, pruned: Path, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(LlmpruneError, match=message):
        train(pruned, tmp_path / "out", text, *settings)
    assert not (tmp_path / "out.partial").exists()
