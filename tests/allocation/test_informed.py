"""Allocations that look at shapes, weights and activations: the published vectors, and edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.concentration import num_removable, num_retained, pq_index
from llmprune.allocation.fitting import fitted
from llmprune.allocation.outliers import outlier_share
from llmprune.allocation.projector import project
from llmprune.allocation.spectrum import hill, tail_exponent
from llmprune.allocation.types import Evidence, Request
from llmprune.arch.types import Site
from llmprune.base.errors import RecipeError
from llmprune.mask.counts import round_half_up
from llmprune.score.activation import wanda
from llmprune.stats.types import Stats
from tests.reference import spectra

NOTHING = Stats(num_tokens=0, values={})


def sites(*units: int, blocks: Sequence[int] | None = None) -> list[Site]:
    return [
        Site(
            name=f"s{index}",
            block=blocks[index] if blocks else index,
            spans=(),
            num_units=num,
            unit_cost=1,
        )
        for index, num in enumerate(units)
    ]


def ask(
    name: str,
    where: Sequence[Site],
    target: str,
    profiles: Mapping[str, Tensor] | None = None,
    **options: float,
) -> list[float]:
    row = ALLOCATIONS[name]
    request = Request(
        sites=where,
        target=Fraction(target),
        profiles=profiles or {},
        options={**row.options, **options},
    )
    shares = row.fn(request)
    assert list(shares) == [site.name for site in where]
    removed = sum(shares[site.name] * site.num_weights for site in where)
    assert removed == round_half_up(request.target * sum(site.num_weights for site in where))
    return [float(share) for share in shares.values()]


def profiles_of(*values: float | list[float]) -> dict[str, Tensor]:
    return {
        f"s{index}": torch.tensor(each if isinstance(each, list) else [each], dtype=torch.float64)
        for index, each in enumerate(values)
    }


def test_one_offset_meets_the_target_up_to_a_limit() -> None:
    """The published vector: .56, 1.04, .8 moved by .03, the second stopped at .95."""
    where = sites(100, 100, 200)
    wished = {"s0": 0.56, "s1": 1.04, "s2": 0.8}
    found = fitted(Request(sites=where, target=Fraction("0.8")), wished, at_most=0.95)
    assert [float(share) for share in found.values()] == [0.59, 0.95, 0.83]
    shares = {name: Fraction(str(value)) for name, value in wished.items()}
    counts = project(
        shares,
        {site.name: site.num_units for site in where},
        dict.fromkeys(shares, 1),
        budget=Fraction("0.8"),
        at_most=dict.fromkeys(shares, Fraction("0.95")),
    )
    assert list(counts.values()) == [59, 95, 166]


def test_limits_below_and_above_hold_and_a_budget_outside_of_them_is_refused() -> None:
    units = {"a": 10, "b": 10, "c": 10}
    shares, costs = dict.fromkeys(units, Fraction(1, 2)), dict.fromkeys(units, 1)
    least, most = {"a": Fraction("0.75")}, {"b": Fraction("0.15")}

    def ask_for(budget: Fraction) -> dict[str, int]:
        return project(
            shares, units, costs, budget=budget, exact=True, at_least=least, at_most=most
        )

    assert ask_for(Fraction(1, 2)) == {"a": 7, "b": 2, "c": 6}
    assert ask_for(Fraction(7, 30)) == {"a": 7, "b": 0, "c": 0}
    with pytest.raises(RecipeError, match=r"^sparsity: 0\.2 is less than the 0\.233333"):
        ask_for(Fraction(1, 5))
    with pytest.raises(RecipeError, match=r"At most 0\.666667 can.* or what its limit leaves"):
        ask_for(Fraction(9, 10))


@given(
    units=st.lists(st.integers(2, 50), min_size=1, max_size=6),
    target=st.fractions(0, Fraction(9, 10), max_denominator=50),
    limit=st.floats(0, 1),
    data=st.data(),
)
def test_what_is_fitted_is_whole_exact_and_in_the_order_of_the_wishes(
    units: list[int], target: Fraction, limit: float, data: st.DataObject
) -> None:
    where = sites(*units)
    wanted = round_half_up(target * sum(units))
    highest = max(Fraction(limit).limit_denominator(10**9), target)
    if wanted > sum(min(count - 1, ceil(highest * count)) for count in units):
        return  # more than the limit leaves, which is refused
    wish = st.floats(-2, 2) | st.sampled_from([float("nan"), float("inf"), -1e300])
    wished = {site.name: data.draw(wish) for site in where}
    found = fitted(Request(sites=where, target=target), wished, at_most=limit)
    counts = [found[site.name] * site.num_units for site in where]
    assert all(count.denominator == 1 for count in counts) and sum(counts) == wanted
    for site in where:
        assert found[site.name] * site.num_units < highest * site.num_units + 1


def test_erk_on_the_published_shapes() -> None:
    shapes = [(64, 64), (64, 256), (256, 64), (8, 64)]
    where = [
        Site(name=str(i), block=0, spans=(), num_units=o * c, unit_cost=1, shape=(o, c))
        for i, (o, c) in enumerate(shapes)
    ]
    density = [1 - share for share in ask("erk", where, "0.5")]
    assert density == pytest.approx([0.739583, 0.46224, 0.46224, 1], abs=1e-4)
    assert ask("erk", where[:1], "0.5") == [0.5]
    assert ask("erk", where, "0") == [0, 0, 0, 0]


def test_the_first_and_the_last_block_are_spared() -> None:
    where = sites(100, 100, 100, 100)
    assert ask("uniform+", where, "0.5") == [0, 0.67, 0.67, 0.66]
    assert ask("uniform+", where, "0.5", first=0.25, last=0.25) == [0.25, 0.75, 0.75, 0.25]
    with pytest.raises(RecipeError, match="At most"):
        ask("uniform+", where, "0.8")
    with pytest.raises(RecipeError, match=r"^prune\.options\.last: 1\.5 is out of range"):
        ask("uniform+", where, "0.5", last=1.5)


def test_owl_on_the_published_vector() -> None:
    where = sites(50, 50, 100, 100, blocks=[0, 0, 1, 2])
    found = ask("owl", where, "0.7", profiles_of(2.0, 2.0, 6.0, 4.0))
    assert found == [0.78, 0.78, 0.62, 0.7]


def test_owl_weighs_blocks_by_size_and_survives_equal_and_unseen_ones() -> None:
    """With twice the weights in the dense block the others must lose more than .78 and .70."""
    found = ask("owl", sites(100, 200, 100), "0.7", profiles_of(2.0, 6.0, 4.0))
    assert found == [0.8, 0.64, 0.72]
    assert ask("owl", sites(100, 100), "0.7", profiles_of(3.0, 3.0)) == [0.7, 0.7]
    nan = float("nan")
    assert ask("owl", sites(100, 100, 100), "0.7", profiles_of(nan, 1.0, 2.0)) == [0.7, 0.78, 0.62]
    assert ask("owl", sites(100, 100), "0.7", profiles_of(nan, nan)) == [0.7, 0.7]


def test_outliers_are_counted_over_the_linears_of_a_block_that_saw_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    block, scores = {}, []
    for name, shape in {"q": (6, 10), "up": (9, 4)}.items():
        weight = torch.randn(shape, generator=draw) ** 3
        stats = Stats(num_tokens=3, values={"col_sq": torch.rand(shape[1], generator=draw)})
        block[name] = Evidence(weight, stats)
        scores.append(wanda(weight, stats).flatten().double())
    empty = Stats(num_tokens=0, values={"col_sq": torch.zeros(5)})
    block["expert"] = Evidence(torch.randn(70, 5, generator=draw), empty)
    together = torch.cat(scores)
    expected = float((together > 2.0 * together.mean()).double().mean())
    assert 0 < expected < 1
    for piece in (2**20, 3):
        monkeypatch.setattr("llmprune.allocation.outliers.PIECE", piece)
        found = outlier_share(block, outliers=2.0)
        assert [float(value) for value in found.values()] == pytest.approx([expected] * 3)
    alone = outlier_share({"expert": block["expert"]}, outliers=2.0)
    assert alone["expert"].isnan().all()


def test_alpha_on_the_published_vectors() -> None:
    assert hill(np.array([1.0, 2.0, 4.0, 8.0]), 2) == pytest.approx(3.885390)
    where = sites(100, 100, 200, 400, blocks=[0, 0, 1, 2])
    found = ask("alpha", where, "0.7", profiles_of(1.0, 3.0, 4.0, 3.0))
    assert found == [0.49, 0.49, 0.91, 0.7]
    assert ask("alpha", sites(100, 100), "0.8", profiles_of(2.0, 4.0)) == [0.61, 0.99]
    assert ask("alpha", sites(100, 100), "0.5", profiles_of(float("nan"), 2.0)) == [0.5, 0.5]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_the_exponent_is_that_of_the_formula_and_free_of_scale(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:8] *= 4
    found = float(tail_exponent(weight, NOTHING, None))
    assert found == pytest.approx(spectra.exponent(weight.double().numpy()), rel=1e-6)
    assert float(tail_exponent(weight * 1000, NOTHING, None)) == pytest.approx(found, rel=1e-3)


def test_heavier_tails_have_smaller_exponents() -> None:
    values = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)
    heavy, light = ((1 - values) ** -power for power in (0.8, 0.2))
    found = [float(tail_exponent(torch.diag(each), NOTHING, None)) for each in (heavy, light)]
    assert 1 < found[0] < found[1]


def test_degenerate_spectra_have_no_exponent_or_a_number() -> None:
    assert tail_exponent(torch.zeros(4, 4), NOTHING, None).isnan().all()
    assert tail_exponent(torch.ones(4, 4), NOTHING, None).isnan().all()
    assert not tail_exponent(torch.eye(4), NOTHING, None).isnan().any()


def test_pq_on_the_published_vector() -> None:
    weight = torch.tensor([[4.0, 1.0, -1.0, 0.0, 2.0]])
    found = pq_index(weight, NOTHING, None, p=1, q=2)
    assert found.tolist() == pytest.approx([0.237230, 5], abs=1e-6)
    assert num_retained(float(found[0]), 5, p=1, q=2) == 3
    assert num_removable(5, 3, gamma=1, beta=0.9) == 2
    found = pq_index(weight, NOTHING, None, p=0.5, q=1)
    assert found.tolist() == pytest.approx([0.267157, 5], abs=1e-6)
    assert num_retained(float(found[0]), 5, p=0.5, q=1) == 4
    assert num_removable(5, 4, gamma=1, beta=0.9) == 1
    assert num_removable(10, 1, gamma=5, beta=0.9) == 9


def test_the_pq_index_is_free_of_scale_and_counts_what_is_left() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    found = float(pq_index(weight, NOTHING, None, p=0.5, q=1)[0])
    for scale in (1e-30, 1e30):
        assert float(pq_index(weight * scale, NOTHING, None, p=0.5, q=1)[0]) == pytest.approx(found)
    assert pq_index(torch.ones(3, 4), NOTHING, None, p=0.5, q=1).tolist() == [0, 12]
    assert pq_index(torch.zeros(3, 4), NOTHING, None, p=0.5, q=1).tolist() == [0, 12]
    keep = weight.abs() > 1
    left = pq_index(weight * keep, NOTHING, keep, p=0.5, q=1)
    own = pq_index(weight[keep][None], NOTHING, None, p=0.5, q=1)
    assert left.tolist() == pytest.approx(own.tolist())
    with pytest.raises(RecipeError, match=r"^prune\.options\.p: .* but p is 2 and q 1\."):
        pq_index(weight, NOTHING, None, p=2, q=1)


def test_pq_takes_more_where_few_weights_hold_everything() -> None:
    found = ask("pq", sites(100, 100), "0.5", profiles_of([0.6, 100.0], [0.2, 100.0]))
    assert found == [0.7, 0.3]
    half_gone = ask("pq", sites(100, 100), "0.6", profiles_of([0.0, 50.0], [0.0, 100.0]))
    assert half_gone == [0.85, 0.35]


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_options_of_a_survey_are_options_of_the_row(name: str) -> None:
    row = ALLOCATIONS[name]
    assert row.profile is None or set(row.profile.options) <= set(row.options)
    assert ("probe" in row.needs) == (row.rounds is not None)
    if row.rounds is not None:
        assert all(num > 0 for num in row.rounds(42, row.options))
