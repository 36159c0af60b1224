"""Text that a model wrote is kept across runs, by all that decides it; damage is written anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import api
from llmprune.base.places import cache_folder
from llmprune.base.progress import Progress
from llmprune.calibration.mix import Windows, window_record
from llmprune.calibration.on_policy import written_windows
from llmprune.calibration.written import keep_text, kept_text, text_key
from llmprune.engine import calibrating
from llmprune.engine.calibrating import opened_windows
from llmprune.engine.opening import open_plan


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "written"


@pytest.fixture
def wrote(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by each time that a model writes."""
    times: list[int] = []

    def write(*args: Any, **rest: Any) -> Windows:
        times.append(1)
        return written_windows(*args, **rest)

    monkeypatch.setattr(calibrating, "written_windows", write)
    return times


def test_a_second_run_reads_what_the_first_one_wrote(
    pico: Callable[..., Path],
    cache: Path,
    wrote: list[int],
    tmp_path: Path,
    quick_gate: None,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why is it\nOnce\n", encoding="utf-8")
    wish: dict[str, Any] = {
        **{"sparsity": 0.5, "calib": "on-policy", "num_samples": 3, "seq_len": 16},
        "settings": [f"calibration.prompts={prompts}", "calibration.max_new_tokens=6"],
    }

    def said(*settings: str, seed: int = 0) -> dict[str, Any]:
        asked = {**wish, "settings": [*wish["settings"], *settings], "seed": seed}
        opened = open_plan(api.make_recipe(str(pico("llama")), **asked))
        record = opened_windows(opened, Progress("quiet")).record
        return {"tokens": record["tokens"], **record["on_policy"]}

    first, second = said(), said()
    assert len(wrote) == 1
    assert not first["from_cache"] and second["from_cache"]
    assert {**first, "from_cache": True} == second
    assert sorted(path.stem for path in cache.iterdir()) == [first["kept"]] * 2

    fresh = said("calibration.cache=false")
    assert len(wrote) == 2
    assert "kept" not in fresh and fresh["tokens"] == first["tokens"]

    kept = cache / f"{first['kept']}.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])  # the last token
    assert said() == first
    assert len(wrote) == 3 and kept.read_bytes() == whole

    report = api.prune(pico("llama"), **wish, out=tmp_path / "out", quiet=True).data
    assert len(wrote) == 3
    assert report["calibration"]["on_policy"]["from_cache"]
    assert report["calibration"]["on_policy"]["hash"] == first["hash"]
    assert report["calibration"]["on_policy"]["kept"] == first["kept"]

    other = said(seed=1)
    assert other["kept"] != first["kept"] and not other["from_cache"]
    prompts.write_text("Why is it\nOnce more\n", encoding="utf-8")
    assert said()["kept"] not in (first["kept"], other["kept"])


def test_a_folder_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.arange(6).view(2, 3)
    record = window_record("on-policy", tokens) | {"on_policy": {"hash": "x"}}
    windows = Windows(tokens=tokens, record=record, is_remote=True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "file"))
    key = text_key({"seed": 0})
    assert keep_text(key, windows) is windows
    assert kept_text(key) is None
    monkeypatch.delenv("LLMPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("written") == tmp_path / "llmprune" / "written"
    keep_text(key, windows)
    found = kept_text(key)
    assert found is not None and torch.equal(found.tokens, tokens) and found.is_remote
    (cache_folder("written") / f"{key}.json").write_text("{")
    assert kept_text(key) is None


def test_only_a_writer_has_something_to_keep() -> None:
    with pytest.raises(ValueError, match="'cache' is of text that the model writes itself"):
        api.make_recipe("a/model", sparsity=0.5, settings=["calibration.cache=false"])
