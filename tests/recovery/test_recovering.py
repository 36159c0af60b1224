"""Recoveries of pruned folders: zeros stay, the merge is what was trained, runs resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api
from llmprune.base.errors import CheckpointError, LlmpruneError, NumericalError, RecipeError
from llmprune.delivery.masks import MaskFiles
from llmprune.recovery import objective
from llmprune.recovery.saved import Saved
from llmprune.report.run import Report

pytestmark = pytest.mark.usefixtures("quick_gate")

FAMILIES = ("llama", "qwen3", "gpt2", "gemma3_text", "mixtral", "phi3", "gpt_neox", "opt")
STILL = ["evaluate.perplexity=false"]


@pytest.fixture(scope="module")
def pruned(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of a pruned pico model, made once; never write into it."""
    home = tmp_path_factory.mktemp("pruned")

    def folder_of(model_type: str = "llama", **wishes: Any) -> Path:
        key = "-".join([model_type, *(str(value) for value in wishes.values())])
        if not (home / key).exists():
            wishes = {"sparsity": 0.5, "method": "magnitude"} | wishes
            api.prune(
                pico(model_type), out=home / key, device="cpu", quiet=True, settings=STILL, **wishes
            )
        return home / key

    return folder_of


@pytest.fixture
def text() -> Tensor:
    """Sixty windows of sixteen tokens that follow one another in few ways."""
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 64, (60, 1), generator=draw)
    return (starts + 3 * torch.arange(16)) % 64


def recover(folder: Path, out: Path, text: Tensor, **wishes: Any) -> Report:
    settings = ["recover.distill=none", *STILL, *wishes.pop("settings", ())]  # by text alone
    wishes = {"steps": 6, "batch": 4, "rank": 4} | wishes
    report = api.recover(
        folder, data=text, out=out, quiet=True, device="cpu", settings=settings, **wishes
    )
    assert report is not None
    return report


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def zeros_hold(folder: Path) -> None:
    masks, tensors = MaskFiles(folder), tensors_of(folder)
    assert masks.index
    for name, keep_OI in masks.of_block("model.layers.").items():
        assert not tensors[f"{name}.weight"][~keep_OI].any()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_learns_and_keeps_its_zeros(
    model_type: str, pruned: Any, tmp_path: Path, text: Tensor
) -> None:
    folder = pruned(model_type)
    report = recover(folder, tmp_path / "out", text, steps=20, learning_rate=0.01)
    made = report.data["recovery"][-1]
    assert made["merge"]["exact"] < 1e-5
    assert made["history"]["held"][-1][1] < made["history"]["held"][0][1]
    assert report.data["gate"]["masked_linears"] == len(MaskFiles(folder).index)
    assert api.gate(tmp_path / "out").masked_linears


@pytest.mark.parametrize(
    "method",
    ["mask-lora", "lora-prune", "scale-lora", "hira", "ia3", "shira", "norms", "head", "full"],
)
def test_every_method_keeps_the_zeros(method: str, pico: Any, tmp_path: Path, text: Tensor) -> None:
    api.prune(
        pico("llama", tied=False), sparsity=0.5, method="magnitude", out=tmp_path / "in",
        device="cpu", quiet=True, settings=STILL,
    )  # fmt: skip
    wishes: dict[str, Any] = {} if method not in ("norms", "head", "full") else {"rank": None}
    report = recover(
        tmp_path / "in",
        tmp_path / "out",
        text,
        method=method,
        learning_rate=0.01,
        steps=20,
        **wishes,
    )
    made = report.data["recovery"][-1]
    before, after = (tensors_of(tmp_path / name) for name in ("in", "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    zeros_hold(tmp_path / "out")
    if method != "lora-prune":
        assert made["merge"]["exact"] < 1e-5
        assert made["history"]["held"][-1][1] < made["history"]["held"][0][1]


def test_lora_of_a_masked_model_is_refused(pruned: Any, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"puts numbers where .* has zeros.*--method mask-lora"):
        recover(pruned(), tmp_path / "out", text, method="lora")


def test_a_smaller_model_gets_lora(pruned: Any, tmp_path: Path, text: Tensor) -> None:
    folder = pruned("llama", pattern="ffn-channels", method="magnitude-struct")
    report = recover(folder, tmp_path / "out", text, steps=20, learning_rate=0.01)
    made = report.data["recovery"][-1]
    assert made["method"] == "lora" and made["merge"]["exact"] < 1e-5
    assert made["history"]["held"][-1][1] < made["history"]["held"][0][1]


def test_a_killed_run_goes_on_with_the_same_bytes(
    pruned: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    wishes: dict[str, Any] = {"steps": 8, "settings": ["recover.save_every=2"]}
    recover(pruned(), tmp_path / "whole", text, **wishes)
    write, count = Saved.write, 0

    def dying(self: Saved, step: int, *rest: Any, **named: Any) -> None:
        nonlocal count
        write(self, step, *rest, **named)
        count += 1
        if count == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Saved, "write", dying)
        with pytest.raises(Killed):
            recover(pruned(), tmp_path / "out", text, **wishes)
    assert (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()
    report = recover(pruned(), tmp_path / "out", text, **wishes)
    assert [step for step, _ in report.data["recovery"][-1]["history"]["training"]] == [
        *range(1, 9)
    ]
    one, two = (tensors_of(tmp_path / name) for name in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "out.partial").exists()


def test_another_wish_does_not_go_on(
    pruned: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("llmprune.recovering._merge", _stopped)
        with pytest.raises(KeyboardInterrupt):
            recover(pruned(), tmp_path / "out", text, settings=["recover.save_every=2"])
    with pytest.raises(RecipeError, match=r"(?s)learning_rate: None then, 0.02 now.*--overwrite"):
        recover(
            pruned(), tmp_path / "out", text, learning_rate=0.02, settings=["recover.save_every=2"]
        )


def _stopped(*args: Any, **named: Any) -> Any:
    raise KeyboardInterrupt


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(
    pruned: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss, count = objective.next_token_loss, 0

    def failing(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal count
        count += logits.requires_grad
        return true_loss(logits, targets) * (float("nan") if count > 4 else 1.0)

    monkeypatch.setattr(objective, "next_token_loss", failing)
    with pytest.raises(NumericalError, match=r"loss of step 5 is nan.*step 4 is kept.*--learning"):
        recover(pruned(), tmp_path / "out", text, settings=["recover.save_every=2"])
    assert Saved(folder=tmp_path / "out.partial/llmprune/records/saved").newest()
    assert not (tmp_path / "out").exists()


def test_a_step_is_the_same_whatever_the_micro_batch(
    pruned: Any, tmp_path: Path, text: Tensor
) -> None:
    found = []
    for size in (1, 4):
        report = recover(
            pruned(), tmp_path / str(size), text, settings=[f"recover.micro_batch={size}"]
        )
        found.append([loss for _, loss in report.data["recovery"][-1]["history"]["training"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_blocks_computed_again_give_the_same_losses(
    pruned: Any, tmp_path: Path, text: Tensor
) -> None:
    found = []
    for choice in ("true", "false"):
        report = recover(
            pruned("gpt2"), tmp_path / choice, text, settings=[f"recover.checkpointing={choice}"]
        )
        found.append([loss for _, loss in report.data["recovery"][-1]["history"]["training"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_kept_adapter_is_a_folder_of_peft(pruned: Any, tmp_path: Path, text: Tensor) -> None:
    from peft import PeftConfig

    recover(pruned(), tmp_path / "out", text, settings=["recover.keep_adapter=true"])
    folder = tmp_path / "out/llmprune/adapter"
    config = PeftConfig.from_pretrained(str(folder))
    assert config.peft_type.value == "LORA" and config.r == 4
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert any(name.endswith("q_proj.lora_A.weight") for name in names)
    assert any("input_layernorm" in name for name in names)


def test_dense_and_damaged_models_are_refused(
    pico: Any, pruned: Any, tmp_path: Path, text: Tensor
) -> None:
    with pytest.raises(CheckpointError, match=r"has no masks.*--masks zeros"):
        recover(pico("llama"), tmp_path / "out", text)
    damaged = tmp_path / "damaged"
    shutil.copytree(pruned(), damaged)
    from safetensors.torch import save_file

    path = next(damaged.glob("model-00001-*.safetensors"))
    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="numbers where its mask says removed"):
        recover(damaged, tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def test_zeros_of_another_tool_can_be_the_masks(pruned: Any, tmp_path: Path, text: Tensor) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(pruned(), bare)
    shutil.rmtree(bare / "llmprune")
    report = recover(bare, tmp_path / "out", text, settings=["recover.masks=zeros"])
    assert report.data["recovery"][-1]["method"] == "mask-lora"
    before, after = tensors_of(bare), tensors_of(tmp_path / "out")
    assert all(not after[name][before[name] == 0].any() for name in before if "proj" in name)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"method": "mask-lroa"}, "recover.method: 'mask-lroa' is not known.*'mask-lora'"),
        ({"rank": 4000}, "recover.rank: 4000 is larger than"),
        ({"method": "norms"}, "recover.rank: norms has no adapters"),
        ({"method": "biases", "rank": None}, "has no biases to train"),
        ({"settings": ["recover.step=3"]}, "recover.step: there is no such key.*'steps'"),
        ({"steps": 0}, "recover.steps: 0 does not fit"),
        ({"seq_len": 100_000, "data": None}, "recover.seq_len: 100000 is longer than"),
    ],
)
def test_wrong_wishes_are_refused(
    wishes: dict[str, Any], message: str, pruned: Any, tmp_path: Path, text: Tensor
) -> None:
    data = wishes.pop("data", text)
    with pytest.raises(LlmpruneError, match=message):
        recover(pruned(), tmp_path / "out", data, **wishes)
    assert not (tmp_path / "out.partial").exists()


def test_too_little_text_is_refused(pruned: Any, tmp_path: Path, text: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"fills 1 window of 16 tokens, and one is held out"):
        recover(pruned(), tmp_path / "out", text[:1])


def test_a_chain_prunes_and_recovers_in_turn(pico: Any, tmp_path: Path, text_file: Path) -> None:
    from llmprune.base.progress import Progress
    from llmprune.recipe import build
    from llmprune.runs import run_recipe

    cut = {"method": "magnitude"}
    train = {"steps": 2, "batch": 2, "rank": 2, "seq_len": 16, "data": str(text_file)}
    wish = {
        "model": str(pico("llama")),
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "calibration": {"seq_len": 16, "num_samples": 4},
        "steps": [
            {"prune": {"sparsity": 0.3, **cut}},
            {"recover": train},
            {"prune": {"sparsity": 0.6, **cut}},
            {"recover": train},
            {"evaluate": {"data": str(text_file), "num_windows": 2}},
        ],
    }
    report = run_recipe(build(wish), Progress("quiet"))
    assert report is not None and report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert len(report.data["recovery"]) == 2
    assert set(report.data["perplexity"]) == {"dense", "before", "pruned"}
    run = json.loads((tmp_path / "out/llmprune/run.json").read_text())
    assert run["origin"]["folder"] == str(pico("llama").resolve())
    assert not (tmp_path / "out.stages").exists()
    again = run_recipe(build(wish), Progress("quiet"))
    assert again is not None and again.data == report.data
    wish["steps"][2]["prune"]["sparsity"] = 0.7
    with pytest.raises(RecipeError, match=r"prune.sparsity: 0.6 then, 0.7 now"):
        run_recipe(build(wish), Progress("quiet"))


def test_blocks_that_matter_more_get_higher_ranks(
    pruned: Any, tmp_path: Path, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, float] = {}

    def importance(angles: dict[int, float]) -> dict[int, float]:
        seen.update(angles)
        return {0: 1.0, 1: 2.0}

    monkeypatch.setattr("llmprune.recovery.student.importance_of_angles", importance)
    folder = pruned("llama", pattern="ffn-channels", method="magnitude-struct")
    wishes = ["recover.ranks=importance", "recover.keep_adapter=true"]
    recover(folder, tmp_path / "out", text, settings=wishes, rank=6)
    assert seen and all(0 < angle < 1 for angle in seen.values())
    factors = load_file(tmp_path / "out/llmprune/adapter/adapter_model.safetensors")
    ranks = {
        name.split("layers.")[1].split(".")[0]: len(value)
        for name, value in factors.items()
        if name.endswith("q_proj.lora_A.weight")
    }
    assert ranks == {"0": 4, "1": 8}


def test_a_teacher_of_hidden_states_knows_which_blocks_are_left(
    pico: Any, tmp_path: Path, text: Tensor
) -> None:
    api.prune(
        pico("llama"), sparsity=0.5, method="shortgpt", out=tmp_path / "in", device="cpu",
        quiet=True, calib=text,
        settings=[*STILL, "prune.options.first=0", "prune.options.last=0"],
    )  # fmt: skip
    report = recover(
        tmp_path / "in", tmp_path / "out", text, settings=["recover.distill=kl+hidden"],
        learning_rate=0.01, steps=20,
    )  # fmt: skip
    losses = [loss for _, loss in report.data["recovery"][-1]["history"]["training"]]
    assert sum(losses[-3:]) < sum(losses[:3])
