"""Runs at the edge of what is there: experts without tokens, little room, another text."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune import api
from llmprune.base.errors import RecipeError
from llmprune.engine import cutting, planning
from llmprune.engine.cost import Shape, estimate
from llmprune.engine.folder import processor
from llmprune.engine.opening import open_plan
from llmprune.solver import SOLVERS

Pico = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.mark.parametrize("refine", ["swaps", "dsnot"])
def test_experts_without_tokens_are_pruned_by_magnitude_and_nothing_is_exchanged(
    make_model: Callable[..., Any], refine: str
) -> None:
    model, tokens = make_model("mixtral"), torch.tensor([[3, 5]])
    report = api.prune(
        model, method="magnitude", sparsity=0.5, calib=tokens, quiet=True,
        settings=[f"prune.refine={refine}"],
    )  # fmt: skip
    rows = [row for block in report.data["blocks"] for row in block["sites"]]
    unseen = [row for row in rows if not row["tokens"]]
    assert unseen and all("no token reached it" in row["fallback"] for row in unseen)
    assert all(row["removed"] == row["weights"] // 2 for row in rows)


def test_statistics_of_one_round_are_gone_before_the_next_begins(
    make_model: Callable[..., Any], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe = cutting.observe
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(*args: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in seen))
        found = observe(*args, **options)
        seen.extend(weakref.ref(stats["gram"]) for stats in found.stats.values())
        return found

    monkeypatch.setattr(cutting, "observe", watch)
    monkeypatch.setattr(
        planning, "estimate", lambda *a, **k: replace(estimate(*a, **k), statistics_bytes=600)
    )
    api.prune(make_model("llama"), method="sparsegpt", sparsity=0.5, calib=tokens, quiet=True)
    assert len(alive) >= 8 and set(alive) == {0}


def test_sparsities_of_a_search_are_walked_together(pico: Pico) -> None:
    recipe = api.make_recipe(str(pico("llama")), method="wanda", target={"ppl": "+10%"}, out="no")
    cost = open_plan(recipe).plan.estimate
    assert (cost.probe_at_once, cost.num_candidates, cost.num_reads) == (8, 25, 5)


def test_a_target_on_another_text_is_another_run(
    pico: Pico, tokens: Tensor, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")

    def prune(text: Path) -> Any:
        return api.prune(
            str(pico("llama")), method="magnitude", target={"ppl": "+300%"}, calib=tokens,
            out=tmp_path / "out", device="cpu", dtype="float32", quiet=True,
            settings=[f"evaluate.data={text}", "evaluate.num_windows=2", "calibration.seq_len=24"],
        )  # fmt: skip

    found = prune(text_file).data["sparsity"]
    assert prune(text_file).data["sparsity"] == found
    with pytest.raises(RecipeError, match=r"evaluate\.data"):
        prune(other)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_precision_of_products_is_told_however_it_was_set(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    matmul.fp32_precision = precision
    try:
        told = processor(torch.device("cuda"))
    finally:
        matmul.fp32_precision = before
    assert told == f"GPU, {'TF32' if precision == 'tf32' else 'float32'} products"


def test_an_estimate_knows_what_solvers_take_and_what_rounds_hold_back(pico: Pico) -> None:
    shape = Shape(
        num_blocks=2, block_params=200 * 10**6, linear_params=200 * 10**6,
        largest_linear=45 * 10**6, entrance_params=10, exit_params=10, hidden_size=4096,
        widest=11008, eager_heads=0, vocab_size=64, stored_bytes=10**7, largest_shard=10**7,
    )  # fmt: skip

    def peak(solver: str, gram_bytes: int = 650 * 10**6, memory: str = "900GB") -> int:
        recipe = api.make_recipe(
            str(pico("llama")), sparsity=0.5, out="no", max_memory={"cpu": memory}
        )
        cost = estimate(
            shape, recipe=recipe, device=torch.device("cpu"), itemsize=4, num_samples=1,
            seq_len=24, eval_tokens=0, forward=True, removed_bytes=0, converted_params=0,
            rate=1e9, statistics_bytes=gram_bytes, workspace=SOLVERS[solver].workspace,
        )  # fmt: skip
        return cost.host_peak

    gram = 4 * 11008**2
    assert peak("columnwise") >= peak("zero") + 2 * gram
    assert peak("columnwise") < peak("least-squares") < peak("alps")
    grams = 20 * 10**9  # experts: with little room they are learnt in rounds
    assert peak("zero", grams, "24GB") < peak("zero", grams)
    block = 800 * 10**6
    assert peak("zero", grams, "24GB") > 6 * 10**9 + 2 * block
