"""Distances between outputs: by hand, by their definitions, and through the blocks of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.allocation.types import Candidate, Measured
from llmprune.api import make_recipe
from llmprune.base.progress import Progress
from llmprune.calibration.replay import head
from llmprune.engine.opening import open_plan
from llmprune.engine.probing import Prober
from llmprune.evaluation import divergence
from llmprune.evaluation.divergence import (
    BY_TOKEN,
    angular,
    distances,
    jensen_shannon,
    relative_norm,
    shift,
)
from llmprune.walk.forward import embed
from llmprune.walk.streamed import Streamed
from tests.reference import units

VALUE = st.floats(-8, 8, width=16)
PAIR = st.integers(2, 7).flatmap(
    lambda num: st.tuples(*[st.lists(VALUE, min_size=num, max_size=num)] * 2)
)
NAMES = (*BY_TOKEN, "shift")


def test_the_angle_of_known_vectors() -> None:
    """The published fixture of block influence: (1,0) to (1,1) is an eighth of a turn."""
    one, turned = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([1.0, -2.0, 1.0])
    assert float(angular(one, turned)) == pytest.approx(0.5)
    plane = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(3)
    assert float(angular(plane[0], plane[0] + plane[1])) == pytest.approx(0.25)
    assert float(angular(one, -one)) == pytest.approx(1.0)
    assert float(angular(one, 3 * one + 5)) == pytest.approx(0.0, abs=1e-6)


def test_small_angles_are_told_apart() -> None:
    """The arccos of a float32 cosine would be 0, or 1e-4, for all of them."""
    one, away = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, 1.0, -2.0]) / math.sqrt(3)
    for size in (1e-5, 3e-5, 1e-4):
        assert float(angular(one, one + size * away)) == pytest.approx(size / math.pi, rel=0.02)


def test_constant_logits_do_no_harm() -> None:
    flat, one = torch.full((3,), 2.0), torch.tensor([1.0, 0.0, -1.0])
    assert float(angular(flat, flat)) == 0 and float(angular(flat, one)) == pytest.approx(0.5)
    assert float(relative_norm(flat, flat)) == 0


def test_the_norm_of_known_vectors() -> None:
    one, two = torch.tensor([3.0, -1.0, -2.0]), torch.tensor([4.0, 1.0, -2.0])
    assert float(relative_norm(one, two)) == pytest.approx(2 / 14)  # (0,1,-1) of (3,-1,-2)
    assert float(relative_norm(one, one + 7)) == pytest.approx(0, abs=1e-10)
    assert float(relative_norm(one, 2 * one)) == pytest.approx(1)  # where the angle is 0


def test_jensen_shannon_of_known_distributions() -> None:
    sure, even = torch.tensor([1.0, 1e-30]).log(), torch.tensor([0.5, 0.5]).log()
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert float(jensen_shannon(sure, even)) == pytest.approx(expected)
    assert float(jensen_shannon(sure, sure.flip(0))) == pytest.approx(math.log(2))
    assert float(jensen_shannon(even, even)) == pytest.approx(0, abs=1e-7)


@given(PAIR)
def test_distances_are_their_definitions(pair: tuple[list[float], list[float]]) -> None:
    one, two = (torch.tensor(each, dtype=torch.float64) for each in pair)
    logs = one.log_softmax(-1), two.log_softmax(-1)
    found = float(jensen_shannon(*logs))
    assert found == pytest.approx(units.jensen_shannon(*pair), abs=1e-12)
    assert found == pytest.approx(float(jensen_shannon(*logs[::-1])), abs=1e-12)
    if min(float((each - each.mean()).norm()) for each in (one, two)) < 1e-3:
        return
    for function, reference in (
        (angular, units.angle),
        (relative_norm, units.squared_difference),
    ):
        expected = reference(*pair)
        assert float(function(one, two)) == pytest.approx(expected, abs=1e-7)
        assert float(function(*logs)) == pytest.approx(expected, abs=1e-7)


def test_a_shift_by_hand() -> None:
    """Two columns over two tokens: means (2, 0) to (5, 4), deviations (1, 0) to (1, 12)."""
    one = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    two = torch.tensor([[4.0, -8.0], [6.0, 16.0]])
    assert shift(one, two).tolist() == [pytest.approx(5 + 12)]
    assert units.shift(one, two) == pytest.approx(17)
    swapped = one.flip(0)
    assert shift(one, swapped).tolist() == [0]  # blind to which token is which


def logits_of(blocks: Streamed, hidden_BTD: Tensor) -> Tensor:
    with torch.no_grad(), blocks.trunk(head=True):
        return head(blocks.model, blocks.modules, hidden_BTD, returns=blocks.family.returns)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("logits", [64, 64 * 2 * 2 * 3, 10**6])
def test_answers_are_means_over_the_tokens_that_predict(
    pico: Callable[..., Path],
    streamed: Callable[..., Streamed],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    logits: int,
) -> None:
    monkeypatch.setattr(divergence, "LOGITS", logits)
    blocks = streamed(pico(model_type))
    draw = torch.Generator().manual_seed(0)
    shape = (2, 9, blocks.model.get_input_embeddings().weight.shape[-1])
    dense = torch.randn(shape, generator=draw)
    others = [dense + size * torch.randn(shape, generator=draw) for size in (0.3, 1.0)]
    ids = torch.randint(0, 64, (2, 9), generator=draw)
    with torch.no_grad(), blocks.trunk(head=True):
        found = distances(blocks, dense, others, ids, NAMES)
        plain = distances(blocks, dense, others, ids)
    one = logits_of(blocks, dense)
    references = {
        "angular": units.angle,
        "norm": units.squared_difference,
        "js": units.jensen_shannon,
    }
    for place, other in enumerate(others):
        assert torch.equal(found[place].kl_B, plain[place].kl_B) and not plain[place].means
        two = logits_of(blocks, other)
        for name, reference in references.items():
            expected = [
                units.mean([reference(one[b, t].tolist(), two[b, t].tolist()) for t in range(8)])
                for b in range(2)
            ]
            assert found[place].means[name].tolist() == pytest.approx(expected, rel=1e-4), name
        moved = [units.shift(dense[b, :8], other[b, :8]) for b in range(2)]
        assert found[place].means["shift"].tolist() == pytest.approx(moved, rel=1e-4)
    assert all(min(found[1].means[n] - found[0].means[n]) > 0 for n in NAMES)


def test_only_what_is_asked_is_computed(
    pico: Callable[..., Path], streamed: Callable[..., Streamed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "BY_TOKEN", {**BY_TOKEN, "js": None})
    monkeypatch.setattr(divergence, "shift", None)
    blocks = streamed(pico("llama"))
    hidden = torch.randn(1, 5, blocks.model.config.hidden_size)
    with torch.no_grad(), blocks.trunk(head=True):
        (found,) = distances(blocks, hidden, [hidden], torch.zeros(1, 5).long(), ["angular"])
    assert list(found.means) == ["angular"] and found.means["angular"].tolist() == [0]


def test_a_probe_answers_and_remembers_what_the_allocation_asks(
    pico: Callable[..., Path], tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_plan(
        make_recipe(
            str(pico("llama")), method="magnitude", sparsity=0.5, out="unused", dtype="float32",
            device="cpu",
        )
    )  # fmt: skip
    site = opened.plan.sites[0].name
    candidates = [Candidate(shares={site: Fraction(1, 2)}), Candidate()]

    def ask(allocation: str) -> list[Measured]:
        prober = Prober(
            plan=replace(opened.plan, allocation=allocation),
            blocks=opened.blocks,
            cutter=opened.plan.masker(),
            tokens_ST=tokens[:5],
            embed=lambda tokens_NT: embed(opened.blocks, tokens_NT, 2),
            progress=Progress("quiet"),
            log=tmp_path / "probes.jsonl",
        )
        return prober(candidates)

    plain, angle, moved = (ask(name) for name in ("uniform", "finercut-angular", "ld-pruner"))
    assert [list(each[0].others) for each in (plain, angle, moved)] == [[], ["angular"], ["shift"]]
    for each in (angle, moved):
        assert torch.equal(each[0].kl_S, plain[0].kl_S)
        (cut_S, dense_S) = (next(iter(answer.others.values())) for answer in each)
        assert len(cut_S) == 5 and float(cut_S.min()) > 0 == float(dense_S.max())
    assert angle[0].distance("angular") == float(angle[0].others["angular"].mean())
    assert moved[0].distance("kl") == plain[0].kl and plain[0].distance("loss") > 0
    monkeypatch.setattr(Prober, "_walk", None)
    again = ask("finercut-angular")
    assert torch.equal(again[0].others["angular"], angle[0].others["angular"])
