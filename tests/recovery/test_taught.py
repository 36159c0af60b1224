"""The dense model teaches where it is there and nothing else was asked; why not is said."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmprune import api
from llmprune.base.errors import CheckpointError, UnknownName
from llmprune.recipe import recovery_recipe
from llmprune.recovery import taught
from llmprune.recovery.planning import RecoverPlan, open_recovery
from tests.conftest import gate_here

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def dense(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(pico("llama"), tmp_path_factory.mktemp("dense") / "model"))


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    wish: dict[str, Any] = {"sparsity": 0.5, "method": "magnitude", "quiet": True}
    with gate_here():
        api.prune(str(dense), out=out, settings=["evaluate.perplexity=false"], **wish)
    return out


def plan(folder: Path, **wish: Any) -> RecoverPlan:
    own = {"steps": 2, "batch": 2, "seq_len": 16, **wish}
    return open_recovery(recovery_recipe(str(folder), own, {"device": "cpu"}))


def test_what_was_pruned_is_taught_by_what_it_was(pruned: Path) -> None:
    found = plan(pruned)
    assert found.wish.distill == "kl" and "teacher" in str(found)
    assert plan(pruned, distill="none").wish.distill is None
    assert "teacher" not in str(plan(pruned, distill="none"))
    assert plan(pruned, distill="kl+hidden").wish.distill == "kl+hidden"
    with pytest.raises(UnknownName, match=r"recover\.distill: 'kll'"):
        plan(pruned, distill="kll")


def test_nothing_teaches_a_dense_model_or_one_that_is_being_pruned(dense: Path) -> None:
    assert "none: the model was not pruned" in str(plan(dense, method="lora"))
    found = plan(dense, prune={"sparsity": 0.5, "method": "magnitude"})
    assert found.wish.distill is None and "the model was not pruned" in str(found)


def test_a_teacher_that_is_gone_changed_or_too_long_is_done_without(
    dense: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taught.shutil, "disk_usage", lambda path: Usage(1, 1, 1000))
    assert "of disk are free" in str(plan(pruned))
    monkeypatch.undo()
    hidden = dense.with_name("elsewhere")
    dense.rename(hidden)
    try:
        found = plan(pruned)
        assert found.wish.distill is None and "is not where it was" in str(found)
        with pytest.raises(CheckpointError, match=r"type --set recover\.distill=none"):
            taught.open_teacher(
                *(plan(pruned, distill="kl").wish, found.source, found.recipe, found.blocks),
                masked=True, device=found.device, dtype=found.dtype,
            )  # fmt: skip
    finally:
        hidden.rename(dense)


def test_a_copy_with_other_times_is_the_same_model(dense: Path, pruned: Path) -> None:
    for path in dense.glob("*.safetensors"):
        path.touch()
    assert plan(pruned).wish.distill == "kl"
