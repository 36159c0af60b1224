"""Text from the Hub is asked for once: a resumed run has it, and a finished result its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune import api
from llmprune.api import make_recipe
from llmprune.base.progress import Progress
from llmprune.calibration.mix import Windows, window_record
from llmprune.calibration.windows import token_hash
from llmprune.engine import calibrating
from llmprune.engine.calibrating import RunText, leaked_share, run_text
from llmprune.engine.opening import Opened, open_plan
from llmprune.engine.records import Records


@pytest.fixture
def wish(pico: Any, tmp_path: Path) -> dict[str, Any]:
    usual = {"sparsity": 0.5, "calib": "c4", "num_samples": 2, "seq_len": 8, "device": "cpu"}
    return {"model": str(pico("llama")), "out": tmp_path / "out", **usual}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the Hub; record what is asked of it."""
    calls: list[str] = []

    def read(recipe: Any, tokenizer: Any, *, seq_len: int) -> Windows:
        calls.append(str(recipe.calibration.data))
        tokens = torch.full((2, seq_len), len(calls))
        record = window_record("c4", tokens)
        return Windows(tokens=tokens, record=record, is_remote=recipe.calibration.data == "c4")

    monkeypatch.setattr(calibrating, "read_windows", read)
    return calls


def text_of(opened: Opened, records: Records, **others: Any) -> RunText:
    options = {"before": None, "finished": False, **others}
    return run_text(opened, records, Progress("quiet"), **options)


def test_a_resumed_run_takes_the_windows_that_were_kept(
    wish: dict[str, Any], asked: list[str], tmp_path: Path
) -> None:
    opened, records = open_plan(make_recipe(**wish)), Records(out=tmp_path / "out")
    first = text_of(opened, records)
    first.keep(records)
    again = text_of(opened, records, before=first.fixes)
    assert asked == ["c4"]
    assert first.tokens is not None and again.tokens is not None
    assert torch.equal(again.tokens, first.tokens)
    assert again.fixes == first.fixes
    assert first.hash == token_hash(first.tokens)
    other = open_plan(make_recipe(**wish | {"num_samples": 3}))
    assert text_of(other, records, before=first.fixes).hash != first.hash
    assert asked == ["c4", "c4"]


@pytest.mark.parametrize("damage", ["cut", "another", "no tokens", "gone"])
def test_kept_windows_that_are_damaged_are_read_anew(
    damage: str, wish: dict[str, Any], asked: list[str], tmp_path: Path
) -> None:
    opened, records = open_plan(make_recipe(**wish)), Records(out=tmp_path / "out")
    first = text_of(opened, records)
    first.keep(records)
    (path,) = records.partial.rglob("tokens.safetensors")
    if damage == "cut":
        path.write_bytes(b"cut")
    elif damage == "another":
        save_file({"tokens": torch.zeros(2, 8, dtype=torch.long)}, path)
    elif damage == "no tokens":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.unlink()
    again = text_of(opened, records, before=first.fixes)
    assert asked == ["c4", "c4"]
    assert again.tokens is not None and again.hash == token_hash(again.tokens)
    again.keep(records)
    assert torch.equal(load_file(path)["tokens"], again.tokens)


def test_a_finished_result_needs_the_hash_only(
    wish: dict[str, Any], asked: list[str], tmp_path: Path
) -> None:
    opened, records = open_plan(make_recipe(**wish)), Records(out=tmp_path / "out")
    first = text_of(opened, records)
    done = text_of(opened, records, before=first.fixes, finished=True)
    assert (done.tokens, done.hash, done.record) == (None, first.hash, first.record)
    assert asked == ["c4"]


def test_files_are_read_again_and_never_kept(
    wish: dict[str, Any], asked: list[str], text_file: Path, tmp_path: Path
) -> None:
    opened = open_plan(make_recipe(**wish | {"calib": str(text_file)}))
    records = Records(out=tmp_path / "out")
    first = text_of(opened, records)
    first.keep(records)
    assert not records.partial.exists()
    text_of(opened, records, before=first.fixes)
    assert len(asked) == 2


def test_a_method_that_needs_no_text_reads_none(
    wish: dict[str, Any], asked: list[str], tmp_path: Path
) -> None:
    opened = open_plan(make_recipe(**wish | {"method": "magnitude"}))
    assert text_of(opened, Records(out=tmp_path / "out")) == RunText()
    assert asked == []
    assert "c4" not in repr(opened.plan)


def test_the_plan_names_the_texts(wish: dict[str, Any], asked: list[str]) -> None:
    plan = open_plan(make_recipe(**wish, settings=["evaluate.perplexity=true"])).plan
    assert "calibration on c4 (on the Hub), perplexity on wikitext2 (on the Hub)" in repr(plan)
    assert asked == []


def test_text_seen_before_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("quiet")
    text = torch.arange(6400).view(100, 64)
    assert leaked_share(text, text[:50] + 6400, progress) == 0
    assert progress.warnings == []
    assert leaked_share(text[:2], text, progress) == 0.02
    assert "2.0 % of the evaluation text" in capsys.readouterr().err
    assert leaked_share(text[:, :31], text, progress) is None  # shorter than what is compared
    assert leaked_share(None, text, progress) is leaked_share(text, None, progress) is None


def test_a_mix_may_be_given_to_the_api_as_mappings(
    make_model: Any, tokenizer: Any, text_file: Path
) -> None:
    model = make_model("llama")
    mix = [{"data": str(text_file), "weight": 3}, {"data": "demo"}]
    wish = {"sparsity": 0.5, "num_samples": 4, "seq_len": 16, "quiet": True}
    report = api.prune(model, calib=mix, tokenizer=tokenizer, **wish)
    record = report.data["calibration"]
    assert [text["num_windows"] for text in record["texts"]] == [3, 1]
    assert record["data"] == f"{text_file}:3,demo:1"
    texts = api.prune(make_model("llama"), calib=["a b c " * 40], tokenizer=tokenizer, **wish)
    assert texts.data["calibration"]["data"] == "texts"
    given = api.prune(make_model("llama"), calib=torch.ones(2, 8, dtype=torch.long), **wish)
    assert given.data["calibration"]["num_windows"] == 2
