"""Scores by relative distortion: the published formula, and who is ranked against whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.arch.table import FAMILIES
from llmprune.score import SCORES
from llmprune.score.distortion import module_of
from llmprune.stats.types import Stats
from tests.reference import formulas

NOTHING = Stats(num_tokens=0, values={})


def dimap(weight_OI: Tensor) -> Tensor:
    return SCORES["dimap"].fn(weight_OI, NOTHING)


def test_the_vector_worked_out_by_hand() -> None:
    """Squares 9, 1 over their sums from the largest down: 9/9 and 1/10; ties share one sum."""
    torch.testing.assert_close(dimap(torch.tensor([[3.0, -1.0]])), torch.tensor([[1.0, 0.1]]))
    found = dimap(torch.tensor([[10.0], [1.0], [-10.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5], [1 / 201], [0.5]]))
    assert not bool(dimap(torch.zeros(2, 3)).any())


@given(values=st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 3.0, -7.0]), min_size=1, max_size=12))
def test_the_formula_weight_by_weight(values: list[float]) -> None:
    found = dimap(torch.tensor([values])).flatten()
    torch.testing.assert_close(found, torch.tensor(formulas.layer_adaptive(values)))


def test_pieces_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    whole = dimap(weight)
    monkeypatch.setattr("llmprune.score.distortion._PIECE", 7)
    assert torch.equal(dimap(weight), whole)
    assert torch.equal(dimap(weight.T), whole.T)


def lowest(scores: dict[str, Tensor], num: int) -> dict[str, int]:
    """Return how many of the `num` lowest scores each linear has."""
    owner = [name for name, score in scores.items() for _ in range(score.numel())]
    order = torch.cat([score.flatten() for score in scores.values()]).argsort(stable=True)
    return {name: sum(owner[i] == name for i in order[:num].tolist()) for name in scores}


def test_ranked_within_modules_it_removes_other_weights_than_magnitude_and_lamp() -> None:
    """LAMP is the same number, ranked over the whole model; magnitudes follow the scale."""
    q0, q1, up0, up1 = (f"{block}.{linear}" for linear in ("self_attn.q_proj", "mlp.up_proj")
                        for block in (0, 1))  # fmt: skip
    weights = {
        q0: torch.tensor([4.0, 1.0, 1.0, 1.0]),
        q1: torch.tensor([40.0, 30.0, 20.0, 10.0]),
        up0: torch.tensor([9.0, 0.3, 0.2, 0.1]),
        up1: torch.tensor([5.0, 5.0, 5.0, 5.0]),
    }
    scores = {name: dimap(weight[None]) for name, weight in weights.items()}
    found: dict[str, int] = {}
    for module in ("attention_in", "ffn"):
        own = {n: s for n, s in scores.items() if module_of(n.partition(".")[2]) == module}
        found |= lowest(own, 4)  # half of each module
    magnitude = {name: weight.abs() for name, weight in weights.items()}
    assert found == {q0: 3, q1: 1, up0: 3, up1: 1}
    assert lowest(scores, 8) == {q0: 3, q1: 2, up0: 3, up1: 0}
    assert lowest(magnitude, 8) == {q0: 4, q1: 0, up0: 3, up1: 1}


def test_every_linear_of_the_family_table_has_its_module() -> None:
    found: dict[str, set[str]] = {}
    for family in FAMILIES:
        for tap in family.taps:
            for reader in tap.readers:
                found.setdefault(module_of(reader), set()).add(reader.split(".")[-1])
    assert found["attention_out"] == {"o_proj", "out_proj", "dense", "c_proj"}
    assert {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "q"} <= found[
        "attention_in"
    ]
    assert not found["attention_in"] & {"up_proj", "gate_proj", "down_proj", "fc1", "c_fc"}
    assert {"up_proj", "gate_proj", "down_proj", "fc1", "fc2", "c_fc", "c_proj"} <= found["ffn"]
