"""Reading ahead and writing beside the next block: the same bytes, faults told, order kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmprune.walk.rewriting
from llmprune import api
from llmprune.base.errors import CheckpointError, TooLarge
from llmprune.base.timeline import Timeline
from llmprune.checkpoint.source import SINGLE
from llmprune.engine import planning
from llmprune.engine.cost import Estimate, Shape, estimate
from llmprune.engine.records import Records
from llmprune.recipe import build
from llmprune.walk.ahead import Ahead
from llmprune.walk.rewriting import open_rewriting

pytestmark = pytest.mark.usefixtures("quick_gate")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, make_model: Any, pico: Any) -> Path:
    """A pico Llama in bfloat16, which is computed with in float32."""
    folder = tmp_path_factory.mktemp("halves")
    make_model("llama").to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((pico("llama") / name).read_bytes())
    return folder


def prune(model: Path, text: Path, out: Path, **wish: Any) -> Any:
    return api.prune(
        *(str(model),),
        **{"sparsity": 0.5, "calib": text, "num_samples": 4, "seq_len": 16} | wish,
        out=out,
        device="cpu",
        quiet=True,
        settings=["evaluate.perplexity=false"],
    )


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing overlap."""
    decide = planning.estimate
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(decide(*a, **k), overlaps=False)
    )


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_the_bytes_are_those_of_one_thing_after_another(
    method: str, halves: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(halves, text_file, tmp_path / "beside", method=method)
    apart(monkeypatch)
    prune(halves, text_file, tmp_path / "apart", method=method)
    assert weights(tmp_path / "beside") == weights(tmp_path / "apart")


def test_a_full_disk_is_told_at_the_next_block_and_its_block_has_no_record(
    halves: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun = llmprune.walk.rewriting.write_tensors, []

    def full(path: Path, *args: Any, **how: Any) -> None:
        begun.append(path.name)
        if len(begun) == 2:
            raise TooLarge("the disk is full")
        write(path, *args, **how)

    monkeypatch.setattr(llmprune.walk.rewriting, "write_tensors", full)
    with pytest.raises(TooLarge, match="disk is full"):
        prune(halves, text_file, tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert [path.name for path in (partial / "llmprune/records").glob("*.json")] == ["00001.json"]
    assert not (tmp_path / "out").exists()
    assert len(begun) == 2


def test_a_record_is_written_when_shard_and_masks_are_whole(
    halves: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = Records.write, []

    def watched(self: Records, index: int, files: list[Path], content: Any) -> None:
        seen.append((index, [len(load_file(path)) > 0 for path in files]))
        write(self, index, files, content)

    monkeypatch.setattr(Records, "write", watched)
    report = prune(halves, text_file, tmp_path / "out")
    assert seen == [(index, [True, True]) for index in range(len(report.data["blocks"]))]


def test_a_stored_block_is_the_one_that_was_held_and_is_held_once(
    halves: Path, streamed: Open, tmp_path: Path
) -> None:
    source = streamed(halves)
    blocks = open_rewriting(source, source.skeleton, tmp_path, overlaps=True)
    with blocks.open(0) as block:
        blocks.commit(block, set())
    assert list(blocks.held) == [0]
    with blocks.stored(0) as block:
        held = {name: value.clone() for name, value in block.values().items()}
    assert not blocks.held
    with blocks.stored(0) as block:  # from the file now
        for name, value in block.values().items():
            assert torch.equal(held[name], value), name


def test_what_is_computed_with_as_it_lies_in_the_file_is_read_from_there(
    halves: Path, streamed: Open, tmp_path: Path
) -> None:
    source = replace(streamed(halves), dtype=torch.bfloat16)
    blocks = open_rewriting(source, source.skeleton, tmp_path, overlaps=True)
    with blocks.open(0) as block:
        path = blocks.commit(block, set())
    assert not blocks.held
    with blocks.stored(0):
        assert path is not None
        assert path.exists()


def test_a_damaged_shard_that_is_read_ahead_is_told_where_it_is_opened(
    halves: Path, streamed: Open, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((halves / "config.json").read_bytes())
    save_file(load_file(halves / SINGLE), tmp_path / SINGLE, metadata={"format": "pt"})
    source = streamed(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"nothing")
    ahead = Ahead(source, Timeline())
    ahead.begin(1)
    assert ahead.take(0) is None  # another block than the one that was read
    ahead.begin(1)
    with pytest.raises(CheckpointError, match=SINGLE):
        ahead.take(1)


def test_a_limit_without_room_for_a_shard_more_turns_it_off_and_leaves_the_rest() -> None:
    shape = Shape(
        **{"num_blocks": 4, "block_params": 100_000_000, "linear_params": 100_000_000},
        **{"largest_linear": 25_000_000, "entrance_params": 1000, "exit_params": 1000},
        **{"hidden_size": 4096, "widest": 8192, "eager_heads": 0, "vocab_size": 1000},
        **{"stored_bytes": 800_000_000, "largest_shard": 200_000_000},
    )

    def at_most(limit: int) -> Estimate:
        wish = {"model": "demo", "steps": [{"prune": {"sparsity": 0.5}}]}
        return estimate(
            shape,
            recipe=build(wish | {"max_memory": {"cpu": limit}}),
            device=torch.device("cpu"),
            **{"itemsize": 4, "num_samples": 4, "seq_len": 64, "eval_tokens": 0, "rate": 1e9},
            **{"forward": True, "removed_bytes": 0, "converted_params": 0},
        )

    ample = at_most(10**11)
    tight = at_most(ample.host_peak - 1)
    assert (ample.overlaps, tight.overlaps) == (True, False)
    assert ample.host_peak - tight.host_peak <= shape.largest_shard
    assert (ample.place, ample.micro_batch) == (tight.place, tight.micro_batch)


def test_the_plan_says_whether_it_overlaps(
    halves: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = {"sparsity": 0.5, "calib": str(text_file), "num_samples": 4, "seq_len": 16}
    assert "written beside the next block" in str(api.plan(str(halves), **wish, device="cpu"))
    apart(monkeypatch)
    assert "nothing ahead" in str(api.plan(str(halves), **wish, device="cpu"))


def test_a_profile_is_written_where_it_is_asked_for(
    halves: Path, text_file: Path, tmp_path: Path
) -> None:
    from llmprune.cli import main

    line = ["--model", str(halves), "--sparsity", "0.5", "--calib", str(text_file), "--quiet"]
    line += ["--num-samples", "4", "--seq-len", "16", "--no-eval", "--device", "cpu", "--profile"]
    with pytest.raises(SystemExit) as left:
        main([*line, "--out", str(tmp_path / "out")])
    assert left.value.code == 0
    own = tmp_path / "out/llmprune"
    names = {e["name"] for e in json.loads((own / "profile.json").read_text())["traceEvents"]}
    assert {"read", "observe", "solve", "write shard", "hash and record", "gate"} <= names
    profile = json.loads((own / "report.json").read_text())["profile"]
    assert sum(profile["seconds"]["main"].values()) <= profile["wall"] + 0.01
