"""Scores of whole units: the published vectors, their slow versions, and what units may expect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.arch.types import Axis, Span
from llmprune.base.errors import NumericalError, UnknownName
from llmprune.mask.pattern import pool
from llmprune.score import SCORES, UNIT_SCORES
from llmprune.score.members import Member, reader_of
from llmprune.score.reduction import Reduction, normalised, reduce_scores
from llmprune.score.unit_curvature import damped_inverse
from llmprune.score.variance import fluctuations
from llmprune.stats import STATISTICS
from llmprune.stats.types import Stats
from tests.reference import formulas, second_order, unit_scores

NOTHING = Stats(num_tokens=0, values={})
AT_TAP = ("col_sq", "col_mean", "col_var", "col_abs", "gram")

OF_LINEARS = [  # the others judge what is known of a whole block, or were trained
    name
    for name, row in UNIT_SCORES.items()
    if not row.trained
    and all(STATISTICS[need].observe in ("tap", "backward") for need in row.needs)
]


def statistics(weight: Tensor, inputs: Tensor, gradients: Tensor) -> Stats:
    """Return all statistics of a linear that reads sequences (B, T, I); gradients are (N, O, I)."""
    values: dict[str, Tensor] = {}
    for name in AT_TAP:
        seen = STATISTICS[name].accumulator()
        seen.update(inputs)
        values |= seen.result().values
    values["grad_sum"], values["grad_abs"] = gradients.sum(0), gradients.abs().sum(0)
    values["grad_sq"] = gradients.square().sum(0)
    num_tokens = inputs.shape[0] * inputs.shape[1]
    return Stats(num_tokens=num_tokens, values=values, num_sequences=len(gradients))


def member(axis: Axis, weight: Tensor, seed: int = 0, width: int = 1, offset: int = 0) -> Member:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 7, weight.shape[1], generator=generator, dtype=weight.dtype)
    gradients = torch.randn(4, *weight.shape, generator=generator, dtype=weight.dtype)
    span = Span(linear=f"{axis}{seed}", axis=axis, width=width, offset=offset)
    return Member(span, weight, statistics(weight, inputs, gradients))


def ffn(seed: int, channels: int = 5, hidden: int = 4) -> list[Member]:
    """Gate and up in one fused linear, and down."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(2 * channels, hidden, generator=generator, dtype=torch.float64)
    down = torch.randn(hidden, channels, generator=generator, dtype=torch.float64)
    gate = member("out", fused, seed)
    up = gate._replace(span=replace(gate.span, offset=channels))
    return [gate, up, member("in", down, seed + 1)]


def kv_groups(seed: int, groups: int = 3, queries: int = 2, width: int = 2) -> list[Member]:
    """Rows of q, k and v in one fused linear, and columns of o; a hidden width of 4."""
    generator = torch.Generator().manual_seed(seed)
    wide = queries * width
    rows = groups * (wide + 2 * width)
    fused = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    out = torch.randn(4, groups * wide, generator=generator, dtype=torch.float64)
    q = member("out", fused, seed, width=wide)
    k = q._replace(span=replace(q.span, width=width, offset=groups * wide))
    v = q._replace(span=replace(q.span, width=width, offset=groups * (wide + width)))
    return [q, k, v, member("in", out, seed + 1, width=wide)]


def reader(
    weight: list[list[float]], width: int = 1, num_tokens: int = 1, **values: Tensor
) -> list[Member]:
    stats = Stats(num_tokens=num_tokens, values=values)
    span = Span(linear="down", axis="in", width=width)
    return [Member(span, torch.tensor(weight, dtype=torch.float64), stats)]


def of_inputs(weight: list[list[float]], inputs: list[list[float]], width: int = 1) -> list[Member]:
    """Return a reader that has read these tokens, one sequence."""
    weight_OI = torch.tensor(weight, dtype=torch.float64)
    seen = torch.tensor([inputs], dtype=torch.float64)
    stats = statistics(weight_OI, seen, torch.zeros(1, *weight_OI.shape))
    return [Member(Span(linear="o", axis="in", width=width), weight_OI, stats)]


def score(name: str, members: Sequence[Member], num_units: int, **options: float) -> Tensor:
    row = UNIT_SCORES[name]
    found = row.fn(members, num_units, **{**row.options, **options})
    assert isinstance(found, Tensor)
    return found


def close(found: Tensor, expected: Sequence[float], atol: float = 1e-9) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-9, atol=atol)


# What every row of the table keeps.


@pytest.mark.parametrize("name", OF_LINEARS)
def test_a_score_changes_nothing_and_its_needs_are_enough(name: str) -> None:
    row = UNIT_SCORES[name]
    assert set(row.needs) <= set(STATISTICS)
    for members, num_units in ((ffn(1), 5), (kv_groups(2), 3)):
        weights = [each.weight_OI.clone() for each in members]
        known = [{key: v.clone() for key, v in each.stats.values.items()} for each in members]
        frugal = []
        for each in members:
            needs = row.needs if row.everywhere or each.reads_units else ()
            values = {need: each.stats[need] for need in needs}
            frugal.append(each._replace(stats=replace(each.stats, values=values)))
        found = score(name, frugal, num_units)
        assert found.shape == (num_units,) and bool(found.isfinite().all())
        assert torch.equal(found, score(name, members, num_units))
        for each, weight, values in zip(members, weights, known, strict=True):
            assert torch.equal(each.weight_OI, weight)
            assert all(torch.equal(each.stats[key], value) for key, value in values.items())


@pytest.mark.parametrize("name", OF_LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_less_precision_score_in_float32(name: str, dtype: torch.dtype) -> None:
    exact = kv_groups(3)
    rounded = [each._replace(weight_OI=each.weight_OI.to(dtype)) for each in exact]
    found = score(name, rounded, 3)
    assert found.dtype == torch.float32
    again = [each._replace(weight_OI=each.weight_OI.double()) for each in rounded]
    torch.testing.assert_close(found.double(), score(name, again, 3).double(), rtol=1e-4, atol=1e-5)


def moved(each: Member, order_U: Tensor, num_units: int) -> Member:
    """Return a member whose units lie in another order, with its statistics."""
    span = each.span
    place = each.place(num_units)
    width = span.width
    lines = torch.arange(each.weight_OI.shape[0 if span.axis == "out" else 1])
    lines[place] = span.offset + (order_U[:, None] * width + torch.arange(width)).flatten()
    dim = 0 if span.axis == "out" else 1
    values = {}
    for name, value in each.stats.values.items():
        if name.startswith("grad"):
            values[name] = value.index_select(dim, lines)
        elif span.axis == "in":
            value = value.index_select(0, lines)
            values[name] = value.index_select(1, lines) if name == "gram" else value
        else:
            values[name] = value
    weight_OI = each.weight_OI.index_select(dim, lines)
    return Member(span, weight_OI, replace(each.stats, values=values))


@pytest.mark.parametrize("name", OF_LINEARS)
@given(seed=st.integers(0, 10**6), attention=st.booleans())
@settings(max_examples=25)
def test_permuting_units_permutes_scores(name: str, seed: int, attention: bool) -> None:
    num_units = 3 if attention else 5
    members = kv_groups(seed) if attention else ffn(seed)
    order_U = torch.randperm(num_units, generator=torch.Generator().manual_seed(seed))
    before = score(name, members, num_units)
    after = score(name, [moved(each, order_U, num_units) for each in members], num_units)
    torch.testing.assert_close(after, before[order_U], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    [
        "flap",
        "flap-published",
        "flap-wifn",
        "cfsp",
        "taylor-vector",
        "taylor-1",
        "taylor-2",
        "taylor-mix",
        "obs-units",
        "dimap-units",
    ],
)
@given(seed=st.integers(0, 10**6), attention=st.booleans())
@settings(max_examples=15)
def test_a_unit_of_zero_weights_scores_lowest(name: str, seed: int, attention: bool) -> None:
    num_units, dead = (3, 2) if attention else (5, 3)
    members = kv_groups(seed) if attention else ffn(seed)
    for each in members:
        span = each.span
        start = span.offset + dead * span.width
        lines = slice(start, start + span.width)
        each.weight_OI[(lines,) if span.axis == "out" else (slice(None), lines)] = 0
    found = score(name, members, num_units)
    others = torch.cat([found[:dead], found[dead + 1 :]])
    assert bool(found[dead] < others.min())


def test_scores_of_activations_alone_do_not_see_weights() -> None:
    """That of CFSP too: its shares of weights add up to one for every channel."""
    members = ffn(0)
    other = [each._replace(weight_OI=each.weight_OI.exp()) for each in members]
    for name in ("cfsp", "minitron", "flap-ifv"):
        assert torch.equal(score(name, members, 5), score(name, other, 5))


# Members and reductions.


def test_members_of_a_fused_linear_own_their_part() -> None:
    q, k, v, o = kv_groups(0)
    assert torch.equal(q.by_unit(q.weight_OI, 3)[1], q.weight_OI[4:8].flatten())
    assert torch.equal(k.by_unit(k.weight_OI, 3)[1], k.weight_OI[14:16].flatten())
    assert torch.equal(v.by_unit(v.weight_OI, 3)[2], v.weight_OI[22:24].flatten())
    assert torch.equal(o.by_unit(o.weight_OI, 3)[1], o.weight_OI[:, 4:8].T.flatten())
    assert reader_of([q, k, v, o]) is o


def test_units_that_a_linear_has_no_room_for_are_refused() -> None:
    """Six rows would otherwise pass as two units of four, three of each."""
    short = Member(Span(linear="q", axis="out", width=4), torch.zeros(6, 2), NOTHING)
    with pytest.raises(ValueError, match=r"2 units of width 4 reach to 8 .* of q, which has 6"):
        short.by_unit(short.weight_OI, 2)


def test_units_that_nothing_reads_have_no_reader() -> None:
    whole = Member(Span(linear="expert", axis="all"), torch.zeros(2, 2), NOTHING)
    with pytest.raises(ValueError, match=r"no linear reads these units as columns: expert \(all\)"):
        reader_of([whole])


@pytest.mark.parametrize("how", ["l2", "mean"])
@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_the_reader_of_channels_counts_as_its_pooled_columns_to_the_bit(
    name: str, how: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    down = member("in", torch.randn(33, 129, generator=generator))
    gate = member("out", torch.randn(129, 33, generator=generator))
    scores = [SCORES[name].fn(each.weight_OI, each.stats) for each in (gate, down)]
    found = reduce_scores([gate, down], scores, 129, "reader", how)  # type: ignore[arg-type]
    assert torch.equal(found, pool(scores[1], how))  # type: ignore[arg-type]


def test_magnitude_and_wanda_of_structures_on_their_fixture() -> None:
    members = reader([[3.0, 0.0], [4.0, 1.0]], col_sq=torch.tensor([1.0, 100.0]).double())
    (each,) = members
    magnitude = [SCORES["magnitude"].fn(each.weight_OI, each.stats)]
    wanda = [SCORES["wanda"].fn(each.weight_OI, each.stats)]
    close(reduce_scores(members, magnitude, 2, "reader", "l2"), [5.0, 1.0])
    close(reduce_scores(members, wanda, 2, "reader", "mean"), [3.5, 5.0])


def test_a_head_is_the_sum_of_its_columns() -> None:
    members = reader([[3.0, 0.0, 1.0, 0.0], [4.0, 1.0, 0.0, 2.0]], width=2)
    scores = [members[0].weight_OI]
    close(reduce_scores(members, scores, 2, "reader", "l2"), [6.0, 3.0])
    close(reduce_scores(members, scores, 2, "reader", "mean"), [4.0, 1.5])


@pytest.mark.parametrize(
    ("how", "expected"),
    [("sum", [8.0, 16.0]), ("mean", [4.0, 8.0]), ("max", [6.0, 15.0]), ("reader", [6.0, 1.0])],
)
def test_reductions_by_hand(how: Reduction, expected: list[float]) -> None:
    """The rows 0 and 1 of a row span have the sums 2 and 15, the columns 6 and 1."""
    up = Member(Span(linear="up", axis="out"), torch.tensor([[1.0, 1.0], [7.0, 8.0]]), NOTHING)
    down = Member(Span(linear="down", axis="in"), torch.tensor([[6.0, 1.0]]), NOTHING)
    found = reduce_scores([up, down], [up.weight_OI, down.weight_OI], 2, how)
    close(found, expected)


@given(seed=st.integers(0, 10**6))
def test_the_sum_over_members_is_that_over_all_weights_of_a_unit(seed: int) -> None:
    members = kv_groups(seed)
    scores = [each.weight_OI.abs() for each in members]
    expected = [
        sum(
            float(sum(w for (w,) in line))
            for each, s in zip(members, scores, strict=True)
            for line in unit_scores.lines_of(
                each.span.axis, each.span.width, each.span.offset, unit, [s.tolist()]
            )
        )
        for unit in range(3)
    ]
    close(reduce_scores(members, scores, 3, "sum"), expected)


def test_whole_linears_count_for_the_unit_they_belong_to() -> None:
    """Two experts of two linears each, and a row of the router for both."""
    spans = [Span(linear=f"e{unit}.{n}", axis="all", unit=unit) for unit in (0, 1) for n in "ab"]
    values = [1.0, 2.0, 3.0, 4.0]
    members = [
        Member(span, torch.full((2, 2), value), NOTHING)
        for span, value in zip(spans, values, strict=True)
    ]
    router = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    members.append(Member(Span(linear="router", axis="out"), router, NOTHING))
    scores = [each.weight_OI for each in members]
    close(reduce_scores(members, scores, 2, "sum"), [13.0, 29.0])
    close(reduce_scores(members, scores, 2, "mean"), [13 / 3, 29 / 3], atol=1e-5)
    close(reduce_scores(members, scores, 2, "max"), [8.0, 16.0])


def test_normalised_scores_of_two_sites_compare() -> None:
    close(normalised(torch.tensor([1.0, 3.0])), [0.5, 1.5])
    close(normalised(torch.tensor([1.0, 3.0]), "sum"), [0.25, 0.75])
    close(normalised(torch.tensor([1.0, 4.0]), "max"), [0.25, 1.0])
    close(normalised(torch.zeros(2)), [0.0, 0.0])


# FLAP.

T_FLAP_INPUTS = [[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, 2.0, 3.0], [2.0, 2.0, 1.0]]
T_FLAP_WEIGHT = [[1.0, 2.0, 1.0], [0.0, 1.0, -1.0]]


def test_flap_on_its_fixture() -> None:
    members = of_inputs(T_FLAP_WEIGHT, T_FLAP_INPUTS)
    close(fluctuations(members[0].weight_OI, members[0].stats), [2 / 3, 0.0, 4.0])
    close(score("flap", members, 3), [-0.41478, -0.72587, 1.14065], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "metric", "squared"),
    [
        ("flap", "wifv", False),
        ("flap-published", "wifv", True),
        ("flap-ifv", "ifv", False),
        ("flap-wifn", "wifn", False),
    ],
)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 2, 3]))
@settings(max_examples=25)
def test_flap_as_its_formula_reads(
    name: str, metric: str, squared: bool, seed: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 6, generator=generator).double().tolist()
    inputs = torch.randn(9, 6, generator=generator).double().tolist()
    found = score(name, of_inputs(weight, inputs, width), 6 // width)
    squared = squared and width > 1
    close(found, unit_scores.flap(weight, inputs, width, metric=metric, squared=squared), atol=1e-7)


def test_flap_of_inputs_that_do_not_vary_is_zero() -> None:
    members = of_inputs([[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [1.0, 2.0]])
    assert score("flap", members, 2).tolist() == [0.0, 0.0]
    assert score("flap", of_inputs([[1.0, 2.0]], [[1.0, 2.0]]), 2).tolist() == [0.0, 0.0]


def test_flap_differs_from_its_variants() -> None:
    """A column that is constant but heavy, one that varies but is light, and one of both."""
    variances, squares = torch.tensor([1.0, 0.5, 0.6]), torch.tensor([4.0, 100.0, 1.0])
    members = reader(
        [[1.0, 1.5, 1.5]], num_tokens=4, col_var=variances.double(), col_sq=squares.double()
    )
    orders = {
        name: score(name, members, 3).argsort().tolist()
        for name in ("flap", "flap-ifv", "flap-wifn")
    }
    assert orders == {"flap": [0, 1, 2], "flap-ifv": [1, 2, 0], "flap-wifn": [2, 0, 1]}


def test_the_published_square_changes_the_order_of_heads_only() -> None:
    """One column of 3 beats two of 2 only when squared."""
    variances = torch.tensor([3.0, 0.5, 2.0, 2.0]).double()
    heads = reader([[1.0, 1.0, 1.0, 1.0]], width=2, num_tokens=4, col_var=variances)
    assert score("flap", heads, 2).argmax() == 1
    assert score("flap-published", heads, 2).argmax() == 0
    channels = reader([[1.0, 1.0, 1.0, 1.0]], num_tokens=4, col_var=variances)
    assert torch.equal(score("flap", channels, 4), score("flap-published", channels, 4))


# Activations.


@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.0, 1.0, 2.0]), empty=st.booleans())
def test_cfsp_as_its_formula_reads(seed: int, beta: float, empty: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(5, 4, generator=generator).double() for _ in range(2))
    down = torch.randn(4, 5, generator=generator).double()
    if empty:
        down[:, 2], gate[3] = 0, 0
    inputs = torch.randn(6, 5, generator=generator).double().tolist()
    members = of_inputs(down.tolist(), inputs)
    members += [Member(Span(linear="x", axis="out"), each, NOTHING) for each in (gate, up)]
    for gamma in (1.0, 0.5):
        expected = unit_scores.cfsp(
            down.tolist(), [gate.tolist(), up.tolist()], inputs, beta=beta, gamma=gamma
        )
        close(score("cfsp", members, 5, gamma=gamma), expected)


def test_cfsp_ranks_differently_from_wanda_of_structures() -> None:
    members = reader([[10.0, 1.0]], num_tokens=1, col_sq=torch.tensor([1.0, 4.0]).double())
    wanda = [SCORES["wanda"].fn(members[0].weight_OI, members[0].stats)]
    assert reduce_scores(members, wanda, 2, "reader", "mean").argmax() == 0
    assert score("cfsp", members, 2).argmax() == 1


def test_minitron_on_its_fixture() -> None:
    inputs = torch.tensor([[[-3.0, 0.0], [3.0, 0.0]], [[4.0, 2.0], [-4.0, 0.0]]])
    weight = torch.zeros(2, 2)
    stats = statistics(weight, inputs, torch.zeros(1, 2, 2))
    close(score("minitron", [Member(Span(linear="o", axis="in"), weight, stats)], 2), [5.0, 1.0])


@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 2]))
def test_minitron_as_its_formula_reads(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 5, 4, generator=generator).double()
    weight = torch.zeros(2, 4).double()
    stats = statistics(weight, inputs, torch.zeros(1, 2, 4))
    members = [Member(Span(linear="o", axis="in", width=width), weight, stats)]
    close(score("minitron", members, 4 // width), unit_scores.minitron(inputs.tolist(), width))


def test_minitron_ranks_differently_from_the_norm() -> None:
    """A column that is large once in a while has the larger norm, and the smaller mean."""
    members = of_inputs([[1.0, 1.0]], [[5.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    assert score("cfsp", members, 2).argmax() == 0
    assert score("minitron", members, 2).argmax() == 1


# Gradients.


def of_gradients(
    weight: list[list[float]], *gradients: list[list[float]], axis: Axis = "out"
) -> list[Member]:
    each = torch.tensor(gradients, dtype=torch.float64)
    values = {"grad_sum": each.sum(0), "grad_sq": each.square().sum(0)}
    stats = Stats(num_tokens=0, values=values, num_sequences=len(gradients))
    return [Member(Span(linear="up", axis=axis), torch.tensor(weight).double(), stats)]


T_LLMP_WEIGHT = [[1.0, -2.0], [0.5, 1.0]]
T_LLMP_GRADIENT = [[0.2, 0.1], [-0.4, 0.2]]


def test_llm_pruner_on_its_fixture() -> None:
    members = of_gradients(T_LLMP_WEIGHT, T_LLMP_GRADIENT)
    close(score("taylor-1", members, 2), [0.4, 0.4])
    close(score("taylor-vector", members, 2), [0.0, 0.0])
    close(score("taylor-2", members, 2), [0.08, 0.08])  # .04 + 4 * .01, and .25 * .16 + .04
    close(score("taylor-mix", members, 2), [0.18 + 0.22, 0.22 + 0.18])


@pytest.mark.parametrize("name", ["taylor-vector", "taylor-1", "taylor-2", "taylor-mix"])
@given(seed=st.integers(0, 10**6), attention=st.booleans())
@settings(max_examples=25)
def test_llm_pruner_as_its_formulas_read(name: str, seed: int, attention: bool) -> None:
    members, num_units = (kv_groups(seed), 3) if attention else (ffn(seed), 5)
    plain = [
        (
            each.span.axis,
            each.span.width,
            each.span.offset,
            each.weight_OI.tolist(),
            each.stats["grad_sum"].tolist(),
            each.stats["grad_sq"].tolist(),
        )
        for each in members
    ]
    close(score(name, members, num_units), unit_scores.llm_pruner(plain, num_units, 4)[name])


def test_columns_are_lines_of_the_vector_too() -> None:
    """The sums along columns are 0 and 0.3; along rows they would be 0.1 and 0.2."""
    members = of_gradients([[1.0, 1.0], [1.0, 1.0]], [[0.2, -0.1], [-0.2, 0.4]], axis="in")
    close(score("taylor-vector", members, 2), [0.0, 0.3])


def test_gradients_of_opposite_sign_leave_curvature_alone() -> None:
    """Two sequences that pull apart: no slope, but all the more curvature."""
    members = of_gradients([[1.0], [1.0]], [[3.0], [1.0]], [[-3.0], [1.0]])
    assert score("taylor-1", members, 2).tolist() == [0.0, 1.0]
    assert score("taylor-2", members, 2).tolist() == [9.0, 1.0]


def test_the_mix_differs_from_both_of_its_orders() -> None:
    """Slope and half the curvature cancel in the first unit."""
    members = of_gradients([[1.0], [1.0]], [[2.0], [1.0]])
    close(score("taylor-mix", members, 2), [0.0, 0.5])
    assert score("taylor-1", members, 2).argmax() == score("taylor-2", members, 2).argmax() == 0


def test_an_unknown_number_of_sequences_is_a_mistake() -> None:
    (each,) = of_gradients(T_LLMP_WEIGHT, T_LLMP_GRADIENT)
    lost = each._replace(stats=replace(each.stats, num_sequences=0))
    with pytest.raises(ValueError, match="grad_sum of up is over an unknown number of sequences"):
        score("taylor-1", [lost], 2)


def test_hesso_by_hand() -> None:
    """Units (3, 4) and (0, 1) with gradients (1, 0) and (0, -2): norms 5 and 1, cosines .6 and -1,
    slopes 3 and -2."""
    members = of_gradients([[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -2.0]])
    norm, slope, square = 26**0.5, 13**0.5, (4.5**2 + 2**2) ** 0.5
    expected = [
        0.2 * (5 / norm + 5 / norm + 1.6 / 1.6 + 3 / slope + 4.5 / square),
        0.2 * (1 / norm + 1 / norm + 0.0 / 1.6 + 2 / slope + 2.0 / square),
    ]
    close(score("hesso", members, 2), expected)


@given(seed=st.integers(0, 10**6), attention=st.booleans())
def test_hesso_as_its_formula_reads(seed: int, attention: bool) -> None:
    members, num_units = (kv_groups(seed), 3) if attention else (ffn(seed), 5)
    plain = [
        (
            each.span.axis,
            each.span.width,
            each.span.offset,
            each.weight_OI.tolist(),
            each.stats["grad_sum"].tolist(),
        )
        for each in members
    ]
    close(score("hesso", members, num_units), unit_scores.hesso(plain, num_units, 4))


def test_hesso_sees_what_a_slope_does_not() -> None:
    """No gradient at all: the slope is 0 for both, magnitudes are not."""
    members = of_gradients([[1.0], [2.0]], [[0.0], [0.0]])
    assert score("taylor-1", members, 2).tolist() == [0.0, 0.0]
    found = score("hesso", members, 2)
    assert found[0] < found[1]


# Curvature and magnitude.


def test_obs_units_on_its_fixture() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    members = reader([[1.0, 2.0], [3.0, 1.0]], gram=gram)
    close(score("obs-units", members, 2, damping=0.0), [15.0, 7.5])


@given(seed=st.integers(0, 10**6), width=st.sampled_from([1, 2, 3]), dead=st.booleans())
def test_obs_units_is_the_error_of_the_best_fit_without_the_unit(
    seed: int, width: int, dead: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 6, generator=generator).double()
    inputs = torch.randn(20, 6, generator=generator).double()
    gram = inputs.T @ inputs
    hessian = second_order.damped(gram, 0.01)
    expected = [
        unit_scores.cost_of_removal(weight, hessian, range(at, at + width))
        for at in range(0, 6, width)
    ]
    members = reader(weight.tolist(), width=width, gram=gram)
    close(score("obs-units", members, 6 // width), expected)
    if dead and width == 1:
        gram[2], gram[:, 2] = 0, 0
        assert score("obs-units", reader(weight.tolist(), gram=gram), 6)[2] == 0


def test_obs_units_differs_from_wanda_where_inputs_correlate() -> None:
    """The first two inputs are nearly one, so either can stand for both; the third is alone."""
    base = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double()
    inputs = torch.cat([2 * base, 2 * base, torch.zeros(50, 1)], dim=1) + 0.1 * noise
    inputs[:, 2] = noise[:, 2]
    members = of_inputs([[1.0, 1.0, 1.0]], inputs.tolist())
    wanda = [SCORES["wanda"].fn(members[0].weight_OI, members[0].stats)]
    assert reduce_scores(members, wanda, 3, "reader", "mean").argmin() == 2
    assert score("obs-units", members, 3).argmax() == 2


def test_an_inverse_gets_the_damping_it_needs_or_a_reason() -> None:
    singular = torch.ones(3, 3)
    assert bool(damped_inverse(singular, 0.0).isfinite().all())
    with pytest.raises(
        NumericalError, match=r"3 inputs has no inverse with damping 0\.01, 0\.1, 1"
    ):
        damped_inverse(torch.full((3, 3), torch.nan), 0.01)


@given(values=st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_dimap_of_units_is_its_formula_of_their_norms(values: list[int]) -> None:
    """Equal units score alike, and the largest scores 1 over how many there are."""
    up = Member(Span(linear="up", axis="out"), torch.tensor(values).double()[:, None], NOTHING)
    found = score("dimap-units", [up], len(values))
    close(found, formulas.layer_adaptive([float(value) for value in values]))


def test_dimap_of_units_compares_sites_that_magnitudes_do_not() -> None:
    """By magnitude the small site goes whole; by its share of its site, its largest stays."""
    small, large = (
        [Member(Span(linear="up", axis="out"), torch.tensor([[a], [b]]), NOTHING)]
        for a, b in ((0.1, 0.3), (2.0, 3.0))
    )
    close(score("dimap-units", small, 2), [0.1, 1.0], atol=1e-6)
    close(score("dimap-units", large, 2), [4 / 13, 1.0], atol=1e-6)


def test_a_name_that_no_row_has_is_told() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'flap'"):
        UNIT_SCORES["flaap"]
