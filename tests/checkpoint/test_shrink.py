"""Cut out and put back, every entry of a parameter is where it was, and zeros where it is gone."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.arch.types import Coupling, Linear, Span
from llmprune.checkpoint.shrink import axes_of, linear_axes, put_back, take


class Units(NamedTuple):
    """A coupling of one linear that writes its units and one that reads them, and some to keep."""

    coupling: Coupling
    linears: dict[str, Linear]
    kept: list[int]
    width: int
    offset: int

    def owned(self) -> list[int]:
        """Return the entries of the axis that kept units own, and those that no unit owns."""
        num = self.coupling.num_units * self.width
        length = self.linears["write"].shape[0]
        own = [
            self.offset + unit * self.width + part
            for unit in self.kept
            for part in range(self.width)
        ]
        return [*range(self.offset), *own, *range(self.offset + num, length)]


@st.composite
def units(draw: Any) -> Units:
    num_units, width = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    offset, beyond = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    kept = sorted(draw(st.sets(st.integers(0, num_units - 1), min_size=1)))
    length = offset + num_units * width + beyond
    place: dict[str, Any] = {"width": width, "offset": offset}
    coupling = Coupling(
        name="x",
        num_units=num_units,
        spans=(Span(linear="write", axis="out", **place), Span(linear="read", axis="in", **place)),
    )
    linears = {
        "write": Linear(name="write", param="write.weight", shape=(length, 2)),
        "read": Linear(name="read", param="read.weight", shape=(3, length)),
    }
    return Units(coupling, linears, kept, width, offset)


@given(units())
def test_units_own_their_entries_and_all_others_stay(found: Units) -> None:
    kept = [(found.coupling, torch.tensor(found.kept))]
    axes = linear_axes(kept, found.linears)
    assert axes.keys() == {("write", 0), ("read", 1)}
    assert axes["write", 0].tolist() == axes["read", 1].tolist() == found.owned()


@given(units(), st.integers(0, 3))
def test_what_is_filled_up_computes_what_silent_units_do(found: Units, extra: int) -> None:
    generator = torch.Generator().manual_seed(0)
    write, read, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((found.linears["write"].shape), (found.linears["read"].shape), (4, 2))
    )
    widths = {"x": min(found.coupling.num_units, len(found.kept) + extra)}
    kept = [(found.coupling, torch.tensor(found.kept))]
    axes = linear_axes(kept, found.linears, widths)
    small = take(read, 1, axes["read", 1]), take(write, 0, axes["write", 0])
    assert len(small[1]) == len(found.owned()) + (widths["x"] - len(found.kept)) * found.width
    gone = [i for i in range(len(write)) if i not in found.owned()]
    read[:, gone] = 0
    torch.testing.assert_close(x @ small[1].T @ small[0].T, x @ write.T @ read.T)


@given(units(), st.integers(0, 3))
def test_put_back_is_the_parameter_with_zeros(found: Units, extra: int) -> None:
    value = torch.arange(1.0, 1 + 2 * found.linears["write"].shape[0]).view(-1, 2)
    kept, widths = [(found.coupling, torch.tensor(found.kept))], {"x": len(found.kept) + extra}
    index_N = linear_axes(kept, found.linears, widths)["write", 0]
    back = put_back(take(value, 0, index_N), 0, index_N, len(value))
    expected = torch.zeros_like(value)
    expected[found.owned()] = value[found.owned()]
    assert torch.equal(back, expected)


@given(units(), st.data())
def test_cut_twice_is_cut_once(found: Units, data: st.DataObject) -> None:
    """A smaller choice within a choice names the same entries as that choice from the start."""
    again = sorted(data.draw(st.sets(st.sampled_from(range(len(found.kept))), min_size=1)))
    value = torch.randn(found.linears["read"].shape, generator=torch.Generator().manual_seed(0))
    once = linear_axes(
        [(found.coupling, torch.tensor([found.kept[i] for i in again]))], found.linears
    )["read", 1]
    first = linear_axes([(found.coupling, torch.tensor(found.kept))], found.linears)["read", 1]
    smaller = take(value, 1, first)
    span = Span(linear="read", axis="in", width=found.width, offset=found.offset)
    coupling = Coupling(name="x", num_units=len(found.kept), spans=(span,))
    linear = Linear(name="read", param="read.weight", shape=(3, smaller.shape[1]))
    second = linear_axes([(coupling, torch.tensor(again))], {"read": linear})["read", 1]
    assert torch.equal(take(smaller, 1, second), take(value, 1, once))


@given(units(), st.integers(1, 4))
def test_adapters_are_cut_as_what_they_adapt(found: Units, rank: int) -> None:
    """(W + B A)[Ko][:, Ki] = W[Ko][:, Ki] + B[Ko] A[:, Ki]: the rank stays, and so does alpha."""
    length = found.linears["write"].shape[0]
    generator = torch.Generator().manual_seed(0)
    weight, b, a = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((length, length), (length, rank), (rank, length))
    )
    kept = [(found.coupling, torch.tensor(found.kept))]
    axes = linear_axes(kept, found.linears)
    out, inner = axes["write", 0], axes["read", 1]

    def cut(matrix: Tensor) -> Tensor:
        return take(take(matrix, 0, out), 1, inner)

    torch.testing.assert_close(
        cut(weight + b @ a), cut(weight) + take(b, 0, out) @ take(a, 1, inner)
    )


def test_rows_of_fused_linears_move_together_with_their_bias() -> None:
    """Gate and up in one parameter: channel j is rows j and F + j, whatever way it is stored."""
    spans = [Span(linear=name, axis="out") for name in ("gate", "up")]
    coupling = Coupling(name="x", num_units=3, spans=tuple(spans))
    for transposed, axis in ((False, 0), (True, 1)):
        linears = {
            name: Linear(
                name=name, param="both.weight", shape=(3, 2), part=part, num_parts=2,
                transposed=transposed,
            )
            for part, name in enumerate(("gate", "up"))
        }  # fmt: skip
        shapes = {"both.weight": (2, 6) if transposed else (6, 2), "both.bias": (6,)}
        axes = axes_of([(coupling, torch.tensor([0, 2]))], linears, shapes)
        assert {key: index.tolist() for key, index in axes.items()} == {
            ("both.weight", axis): [0, 2, 3, 5], ("both.bias", 0): [0, 2, 3, 5],
        }  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_taken_is_a_tensor_of_its_own(axis: int) -> None:
    value = torch.arange(12.0).view(4, 3)
    taken = take(value, axis, torch.tensor([1, -1, 0]))
    taken.fill_(7)
    assert taken.is_contiguous() and torch.equal(value, torch.arange(12.0).view(4, 3))
