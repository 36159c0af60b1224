"""A recovery that is really killed while it trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import api

STILL = ["evaluate.perplexity=false"]
PLACES = {
    "between two steps": """
from llmprune.recovery import loop
def die(self, number, optimizer, step=loop._Run.step):
    found = step(self, number, optimizer)
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
loop._Run.step = die
""",
    "in the middle of writing a state": """
from llmprune.recovery import saved
def die(path, content, write=saved.write_json):
    if content["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)
saved.write_json = die
""",
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recover(pruned: Path, text: Path, out: Path) -> Any:
    return api.recover(
        pruned, data=str(text), steps=6, batch=2, seq_len=16, rank=2, out=out, device="cpu",
        quiet=True, settings=[*STILL, "recover.save_every=2"],
    )  # fmt: skip


def killed(pruned: Path, text: Path, out: Path, how: str) -> subprocess.Popen[str]:
    """Start the same recovery by the command line, where it will be killed."""
    code = f"import os, signal, sys{how}from llmprune import cli\ncli.main(sys.argv[1:])"
    wish = ["recover", str(pruned), "--data", str(text), "--steps", "6", "--batch", "2"]
    wish += ["--seq-len", "16", "--rank", "2", "--no-eval", "--device", "cpu", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *wish, "--set", "recover.save_every=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing is killed like this here")
def test_a_recovery_killed_while_it_trains_resumes_to_the_same_bytes(
    pico: Any, text_file: Path, tmp_path: Path, quick_gate: None, one_thread: None
) -> None:
    pruned = tmp_path / "pruned"
    api.prune(
        pico("llama"), sparsity=0.5, method="magnitude", out=pruned, device="cpu", quiet=True,
        settings=STILL,
    )  # fmt: skip
    outs = {place: tmp_path / f"out{number}" for number, place in enumerate(PLACES)}
    running = {place: killed(pruned, text_file, outs[place], PLACES[place]) for place in PLACES}
    recover(pruned, text_file, tmp_path / "peace")
    expected = weights(tmp_path / "peace")
    for (place, out), last in zip(outs.items(), ("00000004", "00000002"), strict=True):
        said, _ = running[place].communicate(timeout=120)
        assert running[place].returncode == -signal.SIGKILL, said
        partial = out.with_name(f"{out.name}.partial")
        states = sorted(path.stem for path in partial.rglob("saved/*.json"))
        assert states[-1] == last and not out.exists(), place
        recover(pruned, text_file, out)
        assert weights(out) == expected, place
