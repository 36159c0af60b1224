"""Units that shrink to nothing: worked examples, a slow version, and what models compute then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.arch.types import Coupling, Span
from llmprune.recovery.doomed import (
    gate_reader,
    gates,
    march,
    march_factor,
    pull_on_doomed,
    unit_norms,
)
from llmprune.walk.resident import in_memory

SCALES = Coupling(name="scales", spans=(Span(linear="norm", axis="out"),), num_units=2)
# Two key/value heads of 3 values, each with two query heads; the query lies behind two other rows.
HEADS = Coupling(
    name="heads",
    spans=(
        Span(linear="q", axis="out", width=6, offset=2),
        Span(linear="k", axis="out", width=3),
        Span(linear="v", axis="out", width=3),
        Span(linear="o", axis="in", width=6),
    ),
    num_units=2,
)
SHAPES = {"q": (14, 5), "k": (6, 5), "v": (6, 5), "o": (5, 12)}
EXPERTS = Coupling(
    name="experts",
    spans=tuple(Span(linear=f"{e}.{part}", axis="all", unit=e) for e in range(3) for part in "ab"),
    num_units=3,
)
KEEP = torch.tensor([True, False])


def weights_of(shapes: dict[str, tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def owners(name: str) -> Tensor:
    """Return which key/value head of `HEADS` owns each weight of a linear, -1 where none does."""
    rows, columns = SHAPES[name]
    if name == "o":
        return (torch.arange(columns) // 6).expand(rows, columns)
    row_O = torch.arange(rows)
    head_O = torch.where(row_O < 2, -1, (row_O - 2) // 6) if name == "q" else row_O // 3
    return head_O[:, None].expand(rows, columns)


def slowly_pulled(
    weights: dict[str, Tensor], keep: list[bool], strength: float, below: float
) -> dict[str, Tensor]:
    """Add up the squares of each unit weight by weight, then write weight by weight."""
    square = [0.0, 0.0]
    places = [
        (name, row, column, unit)
        for name in weights
        for row, line in enumerate(owners(name).tolist())
        for column, unit in enumerate(line)
        if unit >= 0
    ]
    for name, row, column, unit in places:
        square[unit] += float(weights[name][row, column]) ** 2
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for name, row, column, unit in places:
        if not keep[unit]:
            norm = square[unit] ** 0.5
            factor = strength if norm < below else strength / norm
            found[name][row, column] = factor * float(weights[name][row, column])
    return found


def test_only_the_scale_that_goes_is_pulled_by_its_sign() -> None:
    added = pull_on_doomed(SCALES, {"norm": torch.tensor([[0.5], [-0.2]])}, KEEP, 0.1)
    torch.testing.assert_close(added["norm"], torch.tensor([[0.0], [-0.1]]))


def test_close_to_zero_the_smooth_pull_is_in_proportion() -> None:
    weights = {"norm": torch.tensor([[0.5], [-0.2]])}
    none = torch.tensor([False, False])
    added = pull_on_doomed(SCALES, weights, none, 0.1, smooth_below=0.3)
    torch.testing.assert_close(added["norm"], torch.tensor([[0.1], [-0.02]]))
    gone = pull_on_doomed(SCALES, {"norm": torch.zeros(2, 1)}, none, 0.1)
    assert torch.equal(gone["norm"], torch.zeros(2, 1))


@given(
    seed=st.integers(0, 10**6),
    keep=st.lists(st.booleans(), min_size=2, max_size=2),
    below=st.sampled_from([0.0, 11.0]),
)
def test_a_unit_is_pulled_as_a_whole_over_all_its_linears(
    seed: int, keep: list[bool], below: float
) -> None:
    weights = weights_of(SHAPES, seed)
    found = pull_on_doomed(HEADS, weights, torch.tensor(keep), 0.3, below)
    expected = slowly_pulled(weights, keep, 0.3, below)
    assert found.keys() == expected.keys()
    for name, added in found.items():
        torch.testing.assert_close(added, expected[name])
    norms = unit_norms(HEADS, found)
    for unit, stays in enumerate(keep):
        if stays:
            assert float(norms[unit]) == 0
        elif below == 0:
            assert float(norms[unit]) == pytest.approx(0.3)


def test_the_pull_is_the_gradient_of_the_sum_of_norms() -> None:
    weights = {name: w.double().requires_grad_() for name, w in weights_of(SHAPES, 3).items()}
    parts = [weights["q"][8:14], weights["k"][3:], weights["v"][3:], weights["o"][:, 6:]]
    penalty = 0.3 * torch.cat([part.flatten() for part in parts]).norm()
    found = pull_on_doomed(HEADS, weights, KEEP, 0.3)
    for name, slope in zip(weights, torch.autograd.grad(penalty, [*weights.values()]), strict=True):
        torch.testing.assert_close(found[name], slope)
        assert not found[name].requires_grad


def test_doomed_weights_march_to_zero_on_a_line() -> None:
    factors = [march_factor(step, 4) for step in range(6)]
    assert factors == pytest.approx([0.75, 2 / 3, 0.5, 0, 0, 0])
    weights = weights_of(SHAPES)
    start = {name: weight.clone() for name, weight in weights.items()}
    for step, left in enumerate((0.75, 0.5, 0.25, 0.0)):
        march(HEADS, weights, KEEP, march_factor(step, 4))
        for name, weight in weights.items():
            expected = torch.where(owners(name) == 1, left * start[name], start[name])
            torch.testing.assert_close(weight, expected)
            assert torch.equal(weight[owners(name) != 1], start[name][owners(name) != 1])
    assert unit_norms(HEADS, weights)[1] == 0


def test_whole_linears_go_with_the_unit_that_owns_them() -> None:
    names = {f"{e}.{part}": (2, 3) for e in range(3) for part in "ab"}
    weights, keep = weights_of(names), torch.tensor([True, False, True])
    start = {name: weight.clone() for name, weight in weights.items()}
    norm = torch.cat([weights["1.a"].flatten(), weights["1.b"].flatten()]).norm()
    torch.testing.assert_close(unit_norms(EXPERTS, weights)[1], norm)
    added = pull_on_doomed(EXPERTS, weights, keep, 2.0)
    torch.testing.assert_close(added["1.b"], 2 * weights["1.b"] / norm)
    assert not any(bool(added[name].any()) for name in names if name[0] != "1")
    march(EXPERTS, weights, keep, 0.5)
    for name, weight in weights.items():
        assert torch.equal(weight, start[name] * (0.5 if name[0] == "1" else 1.0))
    with pytest.raises(ValueError, match="use march"):
        gates(EXPERTS, keep, 3, 0.5)


def test_gates_close_on_a_line_at_the_columns_of_doomed_units() -> None:
    for progress, left in ((-0.5, 1.0), (0.0, 1.0), (0.25, 0.75), (1.0, 0.0), (2.0, 0.0)):
        expected = torch.tensor([1.0] * 6 + [left] * 6 + [1.0])
        assert torch.equal(gates(HEADS, KEEP, 13, progress), expected)


def test_a_gate_before_a_reader_is_a_factor_on_its_columns() -> None:
    weights = weights_of({"reader": (5, 12), "bias": (1, 5), "x": (4, 12)})
    reader, x_TI = torch.nn.Linear(12, 5), weights["x"]
    reader.weight.data, reader.bias.data = weights["reader"], weights["bias"][0]
    gate_I = gates(HEADS, KEEP, 12, 0.25)
    bare = reader(x_TI)
    handle = gate_reader(reader, gate_I)
    expected = torch.nn.functional.linear(x_TI, reader.weight * gate_I, reader.bias)
    torch.testing.assert_close(reader(x_TI), expected)
    gate_I.copy_(gates(HEADS, KEEP, 12, 1.0))
    cut = torch.nn.functional.linear(x_TI[:, :6], reader.weight[:, :6], reader.bias)
    torch.testing.assert_close(reader(x_TI), cut)
    handle.remove()
    assert torch.equal(reader(x_TI), bare)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "heads"),
        ("llama", "query-heads"),
        ("llama", "ffn-channels"),
        ("gpt2", "heads"),
        ("gpt2", "ffn-channels"),
    ],
)
def test_in_a_model_closed_gates_march_and_cut_are_one(
    model_type: str, name: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(model_type).double()
    tokens = torch.arange(12)[None]
    with in_memory(model) as blocks, blocks.open(0) as block, torch.no_grad():
        coupling = block.anatomy.coupling(name)
        assert coupling is not None and coupling.reader is not None
        weights = {span.linear: block.weight(span.linear) for span in coupling.spans}
        keep_U = torch.arange(coupling.num_units) != 1
        columns = weights[coupling.reader].shape[1]
        dense = model(tokens).logits
        gate_I = gates(coupling, keep_U, columns, 1.0).double()
        handle = gate_reader(block.module.get_submodule(coupling.reader), gate_I)
        closed = model(tokens).logits
        assert float((closed - dense).abs().max()) > 1e-3
        # Whatever the unit has, nothing of it passes the gate, and all else is as it was.
        march(coupling, weights, keep_U, 7.0)
        torch.testing.assert_close(model(tokens).logits, closed)
        handle.remove()
        march(coupling, weights, keep_U, 0.0)
        torch.testing.assert_close(model(tokens).logits, closed)
        march(coupling, weights, ~keep_U, 0.9)
        assert float((model(tokens).logits - closed).abs().max()) > 1e-3


def test_who_passes_what_does_not_fit_is_told() -> None:
    weights = weights_of(SHAPES)
    with pytest.raises(ValueError, match="heads has 2 units"):
        march(HEADS, weights, torch.tensor([True, False, True]), 0.5)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        pull_on_doomed(HEADS, weights, KEEP.float())
    with pytest.raises(ValueError, match="owns a part of v"):
        march(HEADS, {name: w for name, w in weights.items() if name != "v"}, KEEP, 0.5)
    with pytest.raises(ValueError, match="reach to 12 on the axis 'in' of o, which has 6"):
        unit_norms(HEADS, {**weights, "o": weights["o"][:, :6]})
