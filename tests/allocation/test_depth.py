"""Which halves and blocks go: hand vectors, every subset on toys, budgets, rounds, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.additive import least_sum
from llmprune.allocation.depth import as_scored
from llmprune.allocation.types import Candidate, Measured, Request
from llmprune.arch.types import Site, Span
from llmprune.base.errors import RecipeError
from tests.reference import units

DEPTH = ("lowest", "ld-pruner", "laptop", "finercut", "finercut-angular", "sleb")
MEASURED = ("finercut", "finercut-angular", "finercut-norm", "finercut-js", "sleb")


def halves(*sizes: int, kind: str = "attention", blocks: Sequence[int] | None = None) -> list[Site]:
    return [
        Site(
            name=f"s{index}",
            block=blocks[index] if blocks else index,
            spans=(),
            num_units=1,
            unit_cost=size,
            kind=kind,
        )
        for index, size in enumerate(sizes)
    ]


def block(index: int, *, attention: int = 4, ffn: int = 12) -> list[Site]:
    """Return a block, and both of its halves."""
    linears = {"attention": ("q", "o"), "ffn": ("up", "down"), "block": ("q", "o", "up", "down")}
    sizes = {"attention": attention, "ffn": ffn, "block": attention + ffn}
    return [
        Site(
            name=f"{index}.{kind}",
            block=index,
            spans=tuple(Span(linear=name, axis="all") for name in linears[kind]),
            num_units=1,
            unit_cost=size,
            kind=kind,
        )
        for kind, size in sizes.items()
    ]


class Toy:
    """A probe that says any distance of a set of sites that went; remembers what it was asked."""

    def __init__(self, **functions: Callable[[frozenset[str]], float]) -> None:
        self.functions, self.rounds = functions, list[list[frozenset[str]]]()

    def __call__(self, candidates: Sequence[Candidate]) -> list[Measured]:
        assert all(set(each.shares.values()) <= {Fraction(1)} for each in candidates)
        self.rounds.append([frozenset(each.shares) for each in candidates])
        return [self.answer(frozenset(each.shares)) for each in candidates]

    def answer(self, gone: frozenset[str]) -> Measured:
        said = {
            name: torch.full((2,), function(gone), dtype=torch.float64)
            for name, function in self.functions.items()
        }
        kl, loss = (said.pop(name, torch.zeros(2)) for name in ("kl", "loss"))
        return Measured(kl, loss, said)


def summed(costs: Mapping[str, float]) -> Callable[[frozenset[str]], float]:
    return lambda gone: math.fsum(costs[name] for name in gone)


def ask(
    name: str,
    where: Sequence[Site],
    target: str | Fraction,
    probe: Toy | None = None,
    scores: Mapping[str, float] | None = None,
    facts: dict[str, float] | None = None,
    **options: float,
) -> list[str]:
    """Return what goes; checks the budget and the rounds."""
    row = ALLOCATIONS[name]
    request = Request(
        sites=where,
        target=Fraction(target),
        profiles={key: torch.tensor([value]) for key, value in (scores or {}).items()},
        options={**row.options, "first": 0, "last": 0, **options},
        probe=probe,
        facts=facts if facts is not None else {},
    )
    shares = row.fn(request)
    assert list(shares) == [site.name for site in where]
    assert set(shares.values()) <= {0, 1}
    total = sum(site.num_weights for site in where)
    assert sum(s.unit_cost for s in where if shares[s.name]) >= request.target * total
    if probe is not None:
        assert row.rounds is not None
        bounds = [row.rounds(len(where), request.options)]
        if row.rounds_for is not None:
            bounds.append(row.rounds_for(request))
        for planned in bounds:
            assert len(probe.rounds) <= len(planned)
            for asked, most in zip(probe.rounds, planned, strict=False):
                assert 0 < len(asked) <= most
    return [key for key, share in shares.items() if share]


def test_the_lowest_go_in_one_shot() -> None:
    where = halves(*[5] * 6, kind="block")
    scores = {f"s{i}": value for i, value in enumerate([0.1, 0.5, 0.29289, 0.2, 0.4, 0.0])}
    assert ask("lowest", where, "0.5", scores=scores) == ["s0", "s3", "s5"]
    assert ask("lowest", where, "0.4", scores=scores) == ["s0", "s3", "s5"]  # 12 of 30 take three
    assert ask("lowest", where, "1/3", scores=scores) == ["s0", "s5"]
    assert ask("lowest", where, "0", scores=scores) == []
    assert ask("lowest", where, "1/3", scores=scores, first=1, last=1) == ["s2", "s3"]
    assert ALLOCATIONS["lowest"].options == {"first": 1, "last": 1}
    lost = {**scores, "s0": math.nan}
    assert ask("lowest", where, "1/3", scores=lost) == ["s3", "s5"]


def test_the_published_order_of_blocks() -> None:
    """Nine of 32 blocks of Llama-2-7B: the order of the paper, as scores."""
    order = [27, 26, 25, 28, 24, 29, 23, 21, 22]
    scores = {f"s{i}": 1.0 + i for i in range(32)} | {f"s{b}": i / 9 for i, b in enumerate(order)}
    where = halves(*[7] * 32, kind="block")
    found = ask("lowest", where, Fraction(9, 32), scores=scores, first=1, last=1)
    assert found == [f"s{b}" for b in sorted(order)]


def test_what_would_overshoot_is_passed_over() -> None:
    """Of 40, 10 are asked: 4 and then no 12, though it is lower; another 4, and 4 once more."""
    where = halves(4, 12, 4, 12, 4, 4)
    scores = {f"s{i}": value for i, value in enumerate([0.0, 0.1, 0.5, 0.6, 0.4, 0.9])}
    assert ask("lowest", where, "0.25", scores=scores) == ["s0", "s2", "s4"]
    assert ask("lowest", where, "0.3", scores=scores) == ["s0", "s2", "s4"]
    assert ask("lowest", where, "0.5", scores=scores) == ["s0", "s1", "s4"]


@given(
    sizes=st.lists(st.sampled_from([3, 4, 12]), min_size=1, max_size=6),
    data=st.data(),
)
def test_no_more_goes_than_the_smallest_that_is_left(sizes: list[int], data: st.DataObject) -> None:
    total = sum(sizes)
    asked = data.draw(st.integers(0, total - min(sizes)))
    scores = {f"s{i}": data.draw(st.sampled_from([0.0, 1.0, 2.0, 3.0])) for i in range(len(sizes))}
    gone = ask("lowest", halves(*sizes), Fraction(asked, total), scores=scores)
    removed = sum(size for i, size in enumerate(sizes) if f"s{i}" in gone)
    left = [size for i, size in enumerate(sizes) if f"s{i}" not in gone]
    assert asked <= removed and (not left or removed - asked < max(sizes))
    by_name = {f"s{i}": size for i, size in enumerate(sizes)}
    assert gone == sorted(units.greedy(by_name, asked, lambda names: summed(scores)(names)))


@given(
    sizes=st.lists(st.sampled_from([4, 4, 6, 12]), min_size=2, max_size=5),
    seed=st.integers(0, 99),
    data=st.data(),
)
@pytest.mark.parametrize("name", MEASURED)
def test_every_round_takes_the_best_of_what_is_left(
    name: str, sizes: list[int], seed: int, data: st.DataObject
) -> None:
    draw = torch.Generator().manual_seed(seed)
    table: dict[frozenset[str], float] = {}

    def distance(gone: frozenset[str]) -> float:
        if gone not in table:
            table[gone] = float(torch.rand((), generator=draw))
        return table[gone]

    named = {"finercut": "kl", "sleb": "loss"}.get(name, name.partition("-")[2])
    named = {"angular": "angular", "norm": "norm", "js": "js"}.get(named, named)
    by_name = {f"s{i}": size for i, size in enumerate(sizes)}
    asked = data.draw(st.integers(0, sum(sizes) - min(sizes)))
    where = halves(*sizes)
    found = ask(name, where, Fraction(asked, sum(sizes)), Toy(**{named: distance}))
    assert found == sorted(units.greedy(by_name, asked, distance))
    assert set(ALLOCATIONS[name].distances) == {named} - {"kl", "loss"}


def test_the_sublayer_that_does_nothing_goes_first() -> None:
    """The published toy, x + 1, x + 0, 2 x as a residual: outputs of 1 and -3 without each."""

    def distance(gone: frozenset[str]) -> float:
        total = 0.0
        for x in (1.0, -3.0):
            y, full = x, 2 * (x + 1)
            y = y if "s0" in gone else y + 1
            y = y if "s2" in gone else 2 * y
            total += (y - full) ** 2
        return total

    toy = Toy(kl=distance)
    assert ask("finercut", halves(4, 4, 4), "1/3", toy) == ["s1"]
    assert toy.rounds == [[frozenset({f"s{i}"}) for i in range(3)]]


def test_measuring_again_finds_what_is_harmful_only_together() -> None:
    """Alone a and b are harmless, together fatal: one shot takes both, rounds do not."""

    def kl(gone: frozenset[str]) -> float:
        together = 10.0 if {"s0", "s1"} <= gone else 0.0
        return summed({"s0": 0.1, "s1": 0.2, "s2": 0.5, "s3": 0.9})(gone) + together

    where, facts = halves(4, 4, 4, 4), dict[str, float]()
    toy = Toy(kl=kl)
    assert ask("finercut", where, "0.5", toy, facts=facts) == ["s0", "s2"]
    assert [len(each) for each in toy.rounds] == [4, 3]
    assert facts == {"kl": pytest.approx(0.6)}
    alone = {f"s{i}": kl(frozenset({f"s{i}"})) for i in range(4)}
    assert ask("lowest", where, "0.5", scores=alone) == ["s0", "s1"]
    facts = {}
    assert ask("laptop", where, "0.5", Toy(kl=kl), facts=facts) == ["s0", "s1"]
    assert facts["additivity"] == pytest.approx(10.3 / 0.3)


def test_distances_may_disagree() -> None:
    toy = Toy(
        kl=summed({"s0": 1.0, "s1": 2.0, "s2": 3.0}),
        angular=summed({"s0": 3.0, "s1": 1.0, "s2": 2.0}),
        norm=summed({"s0": 2.0, "s1": 3.0, "s2": 1.0}),
        js=summed({"s0": 2.0, "s1": 1.0, "s2": 1.5}),
        loss=summed({"s0": 0.0, "s1": 0.5, "s2": -1.0}),
    )
    found = {name: ask(name, halves(4, 4, 4), "1/3", Toy(**toy.functions)) for name in MEASURED}
    assert found == {
        "finercut": ["s0"],
        "finercut-angular": ["s1"],
        "finercut-norm": ["s2"],
        "finercut-js": ["s1"],
        "sleb": ["s2"],
    }


def test_a_pool_goes_on_with_the_best_of_the_first_round() -> None:
    """Twice the asked size: four of eight stay, and among them the fourth is best at the end."""
    costs = {f"s{i}": 1.0 + i for i in range(8)}

    def kl(gone: frozenset[str]) -> float:
        return summed(costs)(gone) - (20.0 if len(gone) > 1 and "s7" in gone else 0.0)

    where = halves(*[4] * 8)
    toy = Toy(kl=kl)
    assert ask("finercut", where, "0.25", toy, pool=2) == ["s0", "s1"]
    assert [len(each) for each in toy.rounds] == [8, 3]
    assert ask("finercut", where, "0.25", Toy(kl=kl)) == ["s0", "s7"]
    with pytest.raises(RecipeError, match=r"^prune\.options\.pool: 0\.5 .* prune\.options\.pool=2"):
        ask("finercut", where, "0.25", toy, pool=0.5)


def test_rounds_are_known_before_they_are_walked() -> None:
    row = ALLOCATIONS["finercut"]
    assert row.rounds is not None and row.rounds_for is not None
    where = halves(*[4] * 10)
    assert row.rounds(10, row.options) == list(range(10, 0, -1))
    for target, options, expected in (
        ("0.3", {}, [10, 9, 8]),
        ("0.21", {}, [10, 9, 8]),
        ("0.3", {"first": 1, "last": 2}, [7, 6, 5]),
        ("0.3", {"pool": 2}, [10, 5, 4]),
        ("0", {}, []),
    ):
        numbers: dict[str, float] = {**row.options, **options}
        request = Request(sites=where, target=Fraction(target), options=numbers)
        assert row.rounds_for(request) == expected
        toy = Toy(kl=summed({f"s{i}": float(i) for i in range(10)}))
        ask("finercut", where, target, toy, **options)
        assert [len(each) for each in toy.rounds] == expected


def test_one_that_is_left_alone_is_not_measured() -> None:
    toy, facts = Toy(kl=summed({"s0": 2.0, "s1": 1.0, "s2": 3.0})), dict[str, float]()
    assert ask("finercut", halves(4, 4, 2), "0.2", toy, facts=facts) == ["s2"]
    assert not toy.rounds and not facts
    assert ask("finercut", halves(4, 4, 2), "0.6", toy, facts=facts) == ["s1", "s2"]
    assert [len(each) for each in toy.rounds] == [3] and not facts  # then s2 alone fits in 2


def test_distances_that_are_no_number_go_last() -> None:
    kl = {"s0": math.nan, "s1": 5.0, "s2": math.inf}
    for name in ("finercut", "laptop"):
        assert ask(name, halves(4, 4, 4), "1/3", Toy(kl=summed(kl))) == ["s1"]
    toy = Toy(shift=summed(kl))
    assert ask("ld-pruner", halves(4, 4, 4), "1/3", toy) == ["s1"]
    assert len(ask("laptop", halves(4, 4, 4), "0.6", Toy(kl=summed(kl)))) >= 2


def test_the_least_sum_on_the_published_vector() -> None:
    """Costs 1, 2, 4 and sizes 2, 3, 4, of which 5 are asked: the first two, at 3."""
    where, facts = halves(2, 3, 4), dict[str, float]()
    toy = Toy(kl=summed({"s0": 1.0, "s1": 2.0, "s2": 4.0}))
    assert ask("laptop", where, Fraction(5, 9), toy, facts=facts) == ["s0", "s1"]
    assert facts == {"kl_together": 3.0, "kl_alone": 3.0, "additivity": 1.0}
    assert toy.rounds[1] == [frozenset({"s0", "s1"})]


def test_a_sum_is_not_a_ranking() -> None:
    """Two cheap small ones hold what one dear large one does; of 8 asked the large one is best."""
    where, costs = halves(4, 4, 8, 16), {"s0": 1.0, "s1": 2.0, "s2": 2.5, "s3": 9.0}
    assert ask("laptop", where, "0.25", Toy(kl=summed(costs))) == ["s2"]
    assert ask("lowest", where, "0.25", scores=costs) == ["s0", "s1"]
    assert ask("finercut", where, "0.25", Toy(kl=summed(costs))) == ["s0", "s1"]


@given(
    items=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(1, 9)), min_size=1, max_size=7
    ),
    data=st.data(),
)
def test_no_subset_costs_less(items: list[tuple[float, int]], data: st.DataObject) -> None:
    costs, sizes = zip(*items, strict=True)
    size = data.draw(st.integers(0, sum(sizes)))
    taken = least_sum([[item] for item in items], size)
    chosen = [index for index, choice in enumerate(taken) if choice]
    assert sum(sizes[index] for index in chosen) >= size
    cost = math.fsum(costs[index] for index in chosen)
    assert cost == pytest.approx(units.least_sum(costs, sizes, size))


def test_grains_never_take_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(1.0, 1001), (1.0, 999), (2.5, 2003), (4.0, 3001)]
    assert least_sum([[item] for item in items], 3000) == [1, 0, 1, 0]
    monkeypatch.setattr("llmprune.allocation.additive._GRAINS", 10)
    for size in (1, 1000, 1500, 3000, 3001, 5000, 7004):
        taken = least_sum([[item] for item in items], size)
        assert sum(item[1] for item, each in zip(items, taken, strict=True) if each) >= size


def test_an_operator_goes_by_the_shift_of_the_latent_alone() -> None:
    toy = Toy(kl=summed({"s0": 1, "s1": 2, "s2": 3}), shift=summed({"s0": 3, "s1": 2, "s2": 1}))
    assert ask("ld-pruner", halves(4, 4, 4), "2/3", toy) == ["s1", "s2"]
    assert len(toy.rounds) == 1 and ALLOCATIONS["ld-pruner"].distances == ("shift",)


@pytest.mark.parametrize("name", DEPTH)
def test_a_block_takes_its_halves_with_it(name: str) -> None:
    """Of two blocks of 16, 16 are asked: block 0, though its halves stand beside it."""
    where = block(0) + block(1)
    costs = {f"{i}.{kind}": 1.0 + 2 * i for i in (0, 1) for kind in ("attention", "ffn", "block")}

    def distance(gone: frozenset[str]) -> float:
        return sum(costs[each] for each in gone)

    toy = Toy(**dict.fromkeys(("kl", "shift", "angular", "loss"), distance))
    target, scores = Fraction(16, 64), costs | {"0.block": 0.5}
    costs["0.block"] = 0.5
    needs_probe = "probe" in ALLOCATIONS[name].needs
    found = ask(name, where, target, toy if needs_probe else None, scores)
    assert found == ["0.block"]


def test_halves_that_went_are_not_counted_again() -> None:
    where = block(0) + block(1)
    scores = {s.name: 9.0 for s in where} | {"0.attention": 0.0, "0.block": 1.0, "1.ffn": 2.0}
    found = ask("lowest", where, Fraction(16, 64), scores=scores)
    assert found == ["0.block"]  # 4, then 12 more with the block
    kl = {s.name: 9.0 for s in where} | {"0.attention": 1.0, "1.ffn": 1.0}
    assert ask("laptop", where, Fraction(16, 64), Toy(kl=summed(kl))) == ["0.attention", "1.ffn"]


def test_what_cannot_go_is_refused_before_anything_is_walked() -> None:
    toy = Toy(kl=lambda gone: 0.0, shift=lambda gone: 0.0)
    where = halves(4, 4, 4, 4, kind="block")
    for name in ("finercut", "laptop", "ld-pruner"):
        with pytest.raises(
            RecipeError, match=r"^prune\.sparsity: 0\.8 .* most 0\.75 can.* 0\.75\.$"
        ):
            ask(name, where, "0.8", toy)
        with pytest.raises(RecipeError, match=r"most 0\.5 can.*options\.first=0 .*options\.last=0"):
            ask(name, where, "0.75", toy, first=1, last=1)
        with pytest.raises(RecipeError, match=r"^prune\.options\.first: -1 is out of range"):
            ask(name, where, "0.5", toy, first=-1)
    assert not toy.rounds


def test_scores_are_handed_on() -> None:
    scores: Tensor = torch.tensor([0.3])
    assert as_scored(scores) is scores


SEARCHED: dict[str, Any] = {"generations": 6, "offspring": 12}
NO_OPTIONS: dict[str, Any] = {}


@given(
    sizes=st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=7),
    target=st.fractions(Fraction(1, 10), Fraction(7, 10)),
    seed=st.integers(0, 99),
)
def test_a_search_over_halves_is_never_worse_than_greedy_where_costs_add_up(
    sizes: list[int], target: Fraction, seed: int
) -> None:
    assume(target * sum(sizes) <= sum(sizes) - max(sizes))  # one stays in any case
    generator = torch.Generator().manual_seed(seed)
    costs = {f"s{i}": float(torch.rand((), generator=generator)) for i in range(len(sizes))}
    total = summed(costs)
    found, greedy = (
        ask(name, halves(*sizes), str(target), Toy(kl=total), **options)
        for name, options in (("evopress-halves", SEARCHED), ("finercut", NO_OPTIONS))
    )
    gone = sum(size for index, size in enumerate(sizes) if f"s{index}" in found)
    assert gone >= target * sum(sizes)
    assert total(frozenset(found)) <= total(frozenset(greedy)) + 1e-12


def test_a_search_over_halves_finds_what_goes_well_together() -> None:
    """Alone s0 and s1 cost least; s2 and s3 cost nothing where both are gone, which greedy misses.

    Greedy takes s0, and then s1: 0.2. The pair costs 0.
    """
    alone = {"s0": 0.1, "s1": 0.1, "s2": 0.5, "s3": 0.5}

    def kl(gone: frozenset[str]) -> float:
        return 0.0 if gone == {"s2", "s3"} else math.fsum(alone[name] for name in gone)

    assert ask("finercut", halves(4, 4, 4, 4), "1/2", Toy(kl=kl)) == ["s0", "s1"]
    toy = Toy(kl=kl)
    assert ask("evopress-halves", halves(4, 4, 4, 4), "1/2", toy, **SEARCHED) == ["s2", "s3"]
    tried = [gone for round_ in toy.rounds[1:] for gone in round_]
    assert len(tried) == len({*tried}), "no set is measured twice"


def test_a_search_over_halves_is_the_same_again() -> None:
    costs = {f"s{index}": (index * 7 % 5) / 5 for index in range(6)}
    toys = [Toy(kl=summed(costs)), Toy(kl=summed(costs))]
    first, again = (
        ask("evopress-halves", halves(4, 8, 4, 12, 8, 4), "2/5", toy, **SEARCHED) for toy in toys
    )
    assert first == again and toys[0].rounds == toys[1].rounds


def test_a_search_over_blocks_and_their_halves_counts_none_twice() -> None:
    sites = [site for index in range(3) for site in block(index)]
    costs = {site.name: 0.1 * site.unit_cost + 0.01 * site.block for site in sites}
    found = ask("evopress-halves", sites, "1/4", Toy(kl=summed(costs)), **SEARCHED)
    for index in range(3):
        here = {name for name in found if name.startswith(f"{index}.")}
        assert f"{index}.block" not in here or len(here) == 1
