"""A shard cut short while it is mapped: the system ends the process, and no byte is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune import api

CUT = """
import glob, os, sys
from llmprune import cli
from llmprune.engine import cutting
def observe(block, *given, really=cutting.observe, **more):
    if block.index == 1:
        for shard in glob.glob(os.path.join(sys.argv[2], "*.safetensors")):
            os.truncate(shard, 0)
    return really(block, *given, **more)
cutting.observe = observe
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="mapped files end no process here")
def test_a_shard_cut_short_while_it_is_mapped_loses_nothing(
    pico: Any, text_file: Path, tmp_path: Path, quick_gate: None
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(pico("llama", sharded=True), source)
    shards = {path: (path.read_bytes(), path.stat()) for path in source.glob("*.safetensors")}
    wish = ["--sparsity", "0.5", "--calib", str(text_file), "--num-samples", "4", "--seq-len", "16"]
    wish += ["--no-eval", "--device", "cpu", "--out", str(out)]
    running = subprocess.Popen(
        [sys.executable, "-c", CUT, "--model", str(source), *wish],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = running.communicate(timeout=120)
    assert running.returncode == -signal.SIGBUS, said
    assert not out.exists()
    for path, (content, before) in shards.items():
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def prune(folder: Path) -> dict[str, bytes]:
        api.prune(
            source, sparsity=0.5, calib=str(text_file), num_samples=4, seq_len=16, out=folder,
            device="cpu", quiet=True, settings=["evaluate.perplexity=false"],
        )  # fmt: skip
        return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}

    assert prune(out) == prune(tmp_path / "peace")
