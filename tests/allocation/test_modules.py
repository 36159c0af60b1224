"""Linears ranked module by module: which belong together, and that it changes what goes."""

from __future__ import annotations

import torch
from torch import Tensor

from llmprune.allocation.modules import module_of
from llmprune.arch.table import FAMILIES
from tests.reference import formulas


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
    scores = {
        name: torch.tensor(formulas.layer_adaptive(weight.tolist()))
        for name, weight in weights.items()
    }
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
