"""Recovery as people start it: from the command line, in several processes, with wrong inputs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import Tensor

from llmprune import api, cli
from llmprune.delivery.masks import MaskFiles
from tests.conftest import gate_here

STILL = ["evaluate.perplexity=false"]


@pytest.fixture(scope="module")
def pruned(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned pico model; never write into it."""
    out = tmp_path_factory.mktemp("recover") / "in"
    with gate_here():
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


def by_torchrun(arguments: list[str], home: Path) -> Callable[[], tuple[bool, str]]:
    """Start the command in two processes as people do; return what waits for their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "llmprune"]
    started = subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def end() -> tuple[bool, str]:
        said, _ = started.communicate(timeout=300)
        return not started.returncode, said

    return end


def by_fork(arguments: list[str], home: Path) -> Callable[[], tuple[bool, str]]:
    """Fork two processes with what torchrun would tell them: all is imported already."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        told = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in ("0", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        if not (child := os.fork()):
            os.environ |= {**told, "RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            _in_child(arguments, home / f"said-{rank}")
        children.append(child)

    def end() -> tuple[bool, str]:
        well = [_ends_well(child) for child in children]
        return all(well), "".join((home / f"said-{rank}").read_text() for rank in "01")

    return end


def _ends_well(child: int, seconds: float = 240) -> bool:
    """Wait for a child, but not for ever."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _in_child(arguments: list[str], said: Path) -> None:
    """Carry out the command in a forked process, and end it."""
    code = 1
    try:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        torch.set_num_threads(1)  # the parent's pool of threads does not survive a fork
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent's is of one process
        GradientState._reset_state()
        cli.main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(
            by_fork, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
        ),
        pytest.param(by_torchrun, marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_does(
    start: Callable[..., Callable[[], tuple[bool, str]]],
    pruned: Path,
    tmp_path: Path,
    text_file: Path,
    quick_gate: None,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ("--set", "recover.micro_batch=2", "--set", "recover.save_every=2", "--quiet")
    end = start(words(pruned, two, text_file, *asked), tmp_path)
    report = api.recover(
        pruned, data=str(text_file), steps=4, batch=4, seq_len=16, rank=4, out=one, quiet=True,
        device="cpu", settings=[*STILL, "recover.micro_batch=2"],
    )  # fmt: skip
    well, said = end()
    assert well, said
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
    push = ("--set", "push.repo=me/small", "--set", "push.private=true")
    pushed = command(*words(pruned, out, text_file, "--dry-run", *push))
    assert pushed.out == f"{planned.out}then     push: repo me/small, private True\n"
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
