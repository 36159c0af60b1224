"""Faults that come from outside: damaged files, full disks, odd clocks, two runs in a folder."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import torch as safetensors_torch

from eval.faults import fuzz
from llmprune import api
from llmprune.base.errors import CheckpointError, LlmpruneError, RecipeError, TooLarge
from llmprune.base.progress import Progress
from llmprune.checkpoint.source import read_header
from llmprune.engine.records import Records, check_same_run
from llmprune.recipe.dialect import load

pytestmark = pytest.mark.usefixtures("quick_gate")
STILL = ["evaluate.perplexity=false"]


def prune(source: Path, out: Path) -> Any:
    return api.prune(
        source, sparsity=0.5, method="magnitude", out=out, device="cpu", quiet=True, settings=STILL
    )


@pytest.fixture(scope="module")
def source(pico: Any) -> Path:
    """A pico Llama in several shards; never write into it."""
    return Path(pico("llama", sharded=True))


def test_a_bit_that_flipped_in_a_finished_result_is_noticed(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out")
    prune(source, tmp_path / "out")  # the same again: nothing to do
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name}.* checksum differs.*--overwrite"):
        prune(source, tmp_path / "out")


def test_what_a_killed_run_left_half_written_does_not_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(source, out)
    page = out / "llmprune" / "report.html"
    page.rename(page.with_name(".report.html.tmp"))
    (tmp_path / ".out.replaced-123").mkdir()
    prune(source, out)
    assert page.exists()
    assert not list(tmp_path.rglob(".*"))


def test_a_disk_that_is_full_at_any_write_leaves_what_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(source, tmp_path / "expected")
    save, full = safetensors_torch.save_file, False

    def fail(tensors: Any, path: str, **options: Any) -> None:
        if full and next(count) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **options)

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    failed = 0
    for nth in range(1, 20, 2):
        full, count = True, itertools.count(1)
        out = tmp_path / f"out{nth}"
        try:
            prune(source, out)
            break
        except TooLarge as error:
            assert "disk is full" in str(error)
            assert not out.exists()
            failed += 1
        full = False
        prune(source, out)
        for path in sorted((tmp_path / "expected").glob("*")):
            assert path.is_dir() or path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert failed >= 2


def test_a_clock_that_jumps_back_changes_no_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(source, tmp_path / "expected")
    times = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(times))
    prune(source, tmp_path / "out")
    for path in sorted((tmp_path / "expected").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_two_runs_in_one_folder(source: Path, tmp_path: Path) -> None:
    with (
        Records(out=tmp_path / "out").lock(),
        pytest.raises(CheckpointError, match=r"another run is writing .*Wait for it"),
    ):
        prune(source, tmp_path / "out")
    prune(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["config", "index", "header", "recipe", "tokenizer", "text"])
def test_damaged_files_are_refused_or_understood(kind: str, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "pico.txt"
    text.write_text("A few words that are read. " * 40)
    for seed in range(2):
        case = fuzz.Case(kind, False, seed)
        came, said = fuzz.judge(case, source, text, tmp_path / "case")
        assert came in ("done", "refused"), said


@pytest.mark.parametrize(
    "row", [{"dtype": "F32", "shape": [1], "data_offsets": []}, [], 3, {"shape": "x"}]
)
def test_a_header_of_odd_rows(row: Any, tmp_path: Path) -> None:
    header = json.dumps({"a": row}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        read_header(path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "head_dim", "intermediate_size"])
def test_a_config_that_asks_for_more_than_its_weights_is_refused_before_anything_is_built(
    key: str, source: Path, tmp_path: Path
) -> None:
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {key: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(LlmpruneError, match=f"{key} 1000000000"):
        api.plan(str(tmp_path), sparsity=0.5, method="magnitude", device="cpu")
    assert time.process_time() - began < 5


def test_a_recipe_of_brackets_alone_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="more than 100 brackets"):
        load("a: " + "[" * 5000)


def test_an_upgrade_is_refused_with_what_to_install() -> None:
    old = {"versions": {"torch": "2.9.0", "safetensors": "1"}, "seed": 0}
    new = {"versions": {"torch": "2.10.0", "safetensors": "1"}, "seed": 0}
    with pytest.raises(RecipeError) as refused:
        check_same_run(old, new, "out.partial holds the beginning")
    assert "versions.torch: '2.9.0' then, '2.10.0' now" in str(refused.value)
    assert str(refused.value).endswith("pip install torch==2.9.0")
    with pytest.raises(RecipeError) as other:
        check_same_run(old, old | {"seed": 1}, "out.partial holds the beginning")
    assert "pip" not in str(other.value)


def test_what_is_left_follows_from_all_steps_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("llmprune.base.progress.time.monotonic", lambda: now)
    with Progress("quiet").stage("cut", total=10) as stage:
        assert stage.left() is None
        stage.advance(whole=True)  # found done: says nothing
        assert stage.left() is None
        now = 50.0  # the first also pays for what comes once
        stage.advance()
        assert stage.left() == 50.0 * 8
        now = 60.0
        stage.advance()
        assert stage.left() == 10.0 * 7
        now = 80.0
        stage.advance()
        assert stage.left() == 15.0 * 6


def test_a_display_that_nobody_reads_does_not_end_the_run() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        progress = Progress("json", pipe)
        progress.note("hello")
        assert progress.mode == "json"
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # for what is still buffered


def test_standard_output_that_was_closed_before_the_start() -> None:
    code = "import sys; sys.stdout = None; from llmprune import cli; cli.main(['methods'])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
