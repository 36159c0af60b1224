"""Recovery as people start it: from the command line, in several processes, with wrong inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api
from llmprune.delivery.masks import MaskFiles

STILL = ["evaluate.perplexity=false"]


@pytest.fixture(scope="module")
def pruned(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned pico model; never write into it."""
    out = tmp_path_factory.mktemp("recover") / "in"
    api.prune(
        pico("llama"), sparsity=0.5, method="magnitude", out=out, device="cpu", quiet=True,
        settings=STILL,
    )  # fmt: skip
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def words(folder: Path, out: Path, text_file: Path, *more: str) -> list[str]:
    """Return a command line of a short recovery."""
    wish = ["recover", str(folder), "--data", str(text_file), "--steps", "4", "--batch", "4"]
    wish += ["--seq-len", "16", "--rank", "4", "--no-eval", "--device", "cpu", "--out", str(out)]
    return [*wish, *more]


def test_two_processes_learn_what_one_does(
    pruned: Path, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ("--set", "recover.micro_batch=2", "--set", "recover.save_every=2", "--quiet")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "llmprune"]
    done = subprocess.Popen(
        [*command, *words(pruned, two, text_file, *asked)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    report = api.recover(
        pruned, data=str(text_file), steps=4, batch=4, seq_len=16, rank=4, out=one, quiet=True,
        device="cpu", settings=[*STILL, "recover.micro_batch=2"],
    )  # fmt: skip
    said, _ = done.communicate(timeout=300)
    assert not done.returncode, said
    alone = report.data["recovery"][-1]["history"] if report else {}
    together = json.loads((two / "llmprune/report.json").read_text())["recovery"][-1]["history"]
    for key in ("training", "held"):
        assert [loss for _, loss in together[key]] == pytest.approx(
            [loss for _, loss in alone[key]], rel=1e-5
        )
    ours, theirs = tensors_of(one), tensors_of(two)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_the_command_recovers_and_shows(
    pruned: Path, tmp_path: Path, text_file: Path, command: Callable[..., Any], quick_gate: None
) -> None:
    out = tmp_path / "out"
    planned = command(*words(pruned, out, text_file, "--dry-run"))
    assert planned.code == 0 and "4 steps of 4 x 16 tokens" in planned.out and not out.exists()
    done = command(*words(pruned, out, text_file))
    assert done.code == 0, done.err
    again = command(*words(pruned, out, text_file))
    assert again.code == 0 and "already holds this result" in again.out
    for name, keep_OI in MaskFiles(out).of_block("").items():
        assert not tensors_of(out)[f"{name}.weight"][~keep_OI].any()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--method", "lora"), "puts numbers where"),
        (("--method", "mask-lorra"), "Did you mean 'mask-lora'?"),
        (("--rank", "500"), "recover.rank: 500 is larger"),
        (("--seq-len", "99999"), "recover.seq_len: 99999 is longer"),
        (("--steps", "0"), "recover.steps"),
        (("--data", "nothing.txt"), "nothing.txt"),
    ],
)
def test_wrong_input_ends_with_what_to_type(
    more: tuple[str, ...], message: str, pruned: Path, tmp_path: Path, text_file: Path,
    command: Callable[..., Any],
) -> None:  # fmt: skip
    done = command(*words(pruned, tmp_path / "out", text_file, *more))
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not list(tmp_path.glob("out*"))


def test_a_batch_that_processes_cannot_share_is_refused(pruned: Path) -> None:
    from llmprune.base.errors import RecipeError
    from llmprune.recipe import recovery_recipe
    from llmprune.recovery.planning import open_recovery

    with pytest.raises(RecipeError, match=r"5 windows cannot be shared evenly by 2.*--batch 6"):
        open_recovery(recovery_recipe(str(pruned), {"batch": 5}), num_processes=2)


def test_half_precision_trains_and_rounds_once(
    pico: Any, tmp_path: Path, text_file: Path, quick_gate: None
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico("qwen3"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for path in pico("qwen3").glob("tokenizer*"):
        (tmp_path / "half" / path.name).write_bytes(path.read_bytes())
    common: dict[str, Any] = {"device": "cpu", "quiet": True, "settings": STILL}
    api.prune(tmp_path / "half", pattern="2:4", method="magnitude", out=tmp_path / "in", **common)
    report = api.recover(
        tmp_path / "in", data=str(text_file), steps=10, batch=4, seq_len=16, rank=4,
        out=tmp_path / "out", dtype="bfloat16", learning_rate=0.01,
        **common | {"settings": [*STILL, "recover.distill=none"]},
    )  # fmt: skip
    assert report is not None
    made = report.data["recovery"][-1]
    assert made["merge"]["exact"] < 1e-5 < made["merge"]["stored"]
    assert made["history"]["held"][-1][1] < made["history"]["held"][0][1]
    tensors, masks = tensors_of(tmp_path / "out"), MaskFiles(tmp_path / "out").of_block("")
    for name, keep_OI in masks.items():
        weight = tensors[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16 and not weight[~keep_OI].any()
        assert int(((weight != 0).reshape(-1, 4).sum(1) > 2).sum()) == 0
