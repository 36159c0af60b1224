"""Disks that do not read, and that fill where no block is written: gate and packed results."""

from __future__ import annotations

import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval.faults.disk import fill, points
from eval.faults.kills import Run
from llmprune import api, cli, steps
from llmprune.base.errors import CheckpointError, TooLarge, WontLoad
from llmprune.checkpoint.source import open_folder, read_json
from llmprune.delivery import gate
from llmprune.delivery.packed_model import pack_model


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("SafetensorError: I/O error: No space left on device (os error 28)", TooLarge, "full"),
        ("ValueError: odd", WontLoad, "does not load with from_pretrained: ValueError: odd"),
    ],
)
def test_a_disk_that_fills_under_the_gate_says_nothing_against_the_result(
    said: str, error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_run_stock", lambda scratch, job: said)
    with pytest.raises(error, match=words):
        gate._agree_with_stock(tmp_path, tmp_path / "scratch", {}, 1)


def test_a_disk_that_does_not_read_a_shard_is_named(
    pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(shutil.copytree(pico("llama"), tmp_path / "model"))
    expected, opened = source.fingerprint(), Path.open

    class Broken(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 5000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(-1 if size is None else size)

    def broken(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        shard = self.suffix == ".safetensors"
        return Broken(str(self)) if shard else opened(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors .*Input/output error"):
            source.fingerprint()
    assert source.fingerprint() == expected


def test_a_disk_that_does_not_read_a_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # reading it fails for root as well
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*permissions"):
        read_json(tmp_path / "config.json")


def test_a_shard_cut_short_after_it_was_opened_is_refused_before_it_is_mapped(
    pico: Any, tmp_path: Path
) -> None:
    source = open_folder(shutil.copytree(pico("llama"), tmp_path / "model"))
    name = "model.norm.weight"
    assert name in source.get([name])
    (shard,) = source.folder.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        source.get([name])


@pytest.mark.parametrize("name", ["report.json", "tokenizer.json"])
def test_a_disk_that_fills_while_a_result_is_packed_leaves_nothing(
    name: str, pico: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_gate: None
) -> None:
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    api.prune(
        pico("llama"), sparsity=0.5, method="magnitude", out=pruned, device="cpu", quiet=True,
        settings=["evaluate.perplexity=false"],
    )  # fmt: skip
    copy = shutil.copyfile

    def full(path: Path, target: Path, **options: Any) -> Any:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(path, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(TooLarge, match=r"disk is full: .*out could not be written"):
            pack_model(pruned, out)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    pack_model(pruned, out)
    assert (out / "llmprune" / "report.json").exists()


def test_a_ballast_leaves_the_room_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, written, real = 300_000, 0, os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal written
        if written + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(data)
        return real(descriptor, data)

    monkeypatch.setattr("eval.faults.disk.os.write", write)
    fill(tmp_path / "ballast", 65536)
    assert (tmp_path / "ballast").stat().st_size == 4 * 65536 - 65536


def test_operations_are_spread_from_the_first_to_the_last() -> None:
    assert points(Run([], {}, 1.0, 10, {}), 4) == [1, 4, 7, 10]
    assert points(Run([], {}, 1.0, 3, {}), 20) == [1, 2, 3]
    assert points(Run([], {}, 1.0, 10, {}), 1) == [1]


def test_a_full_disk_that_nobody_expected_is_told_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "here"))

    monkeypatch.setattr(steps, "run_streamed", full)
    with pytest.raises(SystemExit) as left:
        cli.main(["--model", "demo", "--sparsity", "0.5", "--out", str(tmp_path / "out")])
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"error: the disk is full: {tmp_path / 'here'} could not be")
    assert not any("Traceback" in line for line in said)
