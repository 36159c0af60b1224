"""Budgets across kinds of units: one ranking, equal widths, one pool; by hand, by enumeration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.allocation import ALLOCATIONS
from llmprune.allocation.standardised import in_order, standard_scores
from llmprune.allocation.types import Candidate, Measured, Request
from llmprune.allocation.units import asked_cost, legal_counts
from llmprune.allocation.widths import Space
from llmprune.arch.types import Site, Span
from llmprune.base.errors import RecipeError
from tests.reference import units

LINEARS = {
    "heads": (("q", "out"), ("o", "in")),
    "ffn-channels": (("up", "out"), ("down", "in")),
    "attention": (("q", "all"), ("o", "all")),
    "ffn": (("up", "all"), ("down", "all")),
    "block": (("q", "all"), ("o", "all"), ("up", "all"), ("down", "all")),
}


def site(kind: str, block: int, num: int, cost: int, num_groups: int = 1) -> Site:
    return Site(
        name=f"{block}.{kind}",
        block=block,
        spans=tuple(Span(linear=linear, axis=axis) for linear, axis in LINEARS[kind]),  # type: ignore[arg-type]
        num_units=num,
        unit_cost=cost,
        kind=kind,
        num_groups=num_groups,
    )


def model(blocks: int, *kinds: str, heads: int = 4, channels: int = 16) -> list[Site]:
    """Return sites of blocks in which a head holds 40 weights, a channel 6."""
    sizes = {
        "heads": (heads, 40),
        "ffn-channels": (channels, 6),
        "attention": (1, 40 * heads),
        "ffn": (1, 6 * channels),
        "block": (1, 40 * heads + 6 * channels),
    }
    return [site(kind, block, *sizes[kind]) for block in range(blocks) for kind in kinds]


class Toy:
    """A probe whose KL is any function of shares by site; remembers what it was asked."""

    def __init__(self, kl: Callable[[Mapping[str, float]], float]) -> None:
        self.kl, self.rounds = kl, list[list[dict[str, Fraction]]]()

    def __call__(self, candidates: Sequence[Candidate]) -> list[Measured]:
        self.rounds.append([dict(each.shares) for each in candidates])
        values = [
            self.kl({name: float(share) for name, share in each.shares.items()})
            for each in candidates
        ]
        return [Measured(torch.full((2,), value).double(), torch.zeros(2)) for value in values]


def ask(
    name: str,
    where: Sequence[Site],
    target: str | Fraction,
    probe: Toy | None = None,
    profiles: Mapping[str, Sequence[float]] | None = None,
    ties: Sequence[Sequence[str]] = (),
    multiple: int | None = None,
    **options: float,
) -> dict[str, int]:
    """Return what every site loses, after checks of rounds and of what legal counts are."""
    row = ALLOCATIONS[name]
    request = Request(
        sites=where,
        target=Fraction(target),
        profiles={k: torch.tensor(v, dtype=torch.float64) for k, v in (profiles or {}).items()},
        options={**row.options, **options},
        probe=probe,
        ties=tuple(map(tuple, ties)),
        multiple=multiple,
    )
    shares = row.fn(request)
    assert list(shares) == [each.name for each in where]
    counts = {each.name: shares[each.name] * each.num_units for each in where}
    assert all(count.denominator == 1 for count in counts.values())
    assert all(int(counts[each.name]) in legal_counts(each, multiple) for each in where)
    if probe is not None:
        assert row.rounds is not None
        planned = row.rounds(len(where), request.options)
        assert len(probe.rounds) <= len(planned)
        assert all(len(a) <= most for a, most in zip(probe.rounds, planned, strict=False))
    return {key: int(count) for key, count in counts.items()}


def removed(where: Sequence[Site], counts: Mapping[str, int]) -> int:
    return sum(counts[each.name] * each.unit_cost for each in where)


# What counts are legal.


def test_legal_counts_keep_a_multiple_and_equal_groups() -> None:
    assert legal_counts(site("ffn-channels", 0, 10, 6), None) == list(range(10))
    assert legal_counts(site("ffn-channels", 0, 10, 6), 4) == [0, 2, 6]
    assert legal_counts(site("ffn-channels", 0, 3, 6), 4) == [0]
    assert legal_counts(site("heads", 0, 4, 40), 4) == [0, 1, 2, 3]  # no channels
    assert legal_counts(site("heads", 0, 6, 40, num_groups=2), None) == [0, 2, 4]
    assert legal_counts(site("attention", 0, 1, 40), 4) == [0, 1]


# One ranking of standardised scores.


def test_standard_scores_on_the_published_vector() -> None:
    found = standard_scores(torch.tensor([2 / 3, 0.0, 4.0]))
    assert found.tolist() == pytest.approx([-0.41478, -0.72587, 1.14065], abs=1e-5)
    assert standard_scores(torch.full((4,), 0.1)).tolist() == [0] * 4  # the published code: nan
    assert standard_scores(torch.tensor([3.0])).tolist() == [0]


def test_units_are_ranked_together_and_cut_by_cost() -> None:
    """By z from below: channel, head, channel, channel. 58 of 184 is nearest to 46 and to 52+6."""
    where = [site("heads", 0, 2, 40), site("ffn-channels", 0, 4, 6)]
    z = {"0.heads": [-0.7, 0.7], "0.ffn-channels": [-0.6, -0.9, 0.1, 1.4]}
    found = {
        asked: tuple(ask("standardised", where, Fraction(asked, 104), profiles=z).values())
        for asked in (0, 3, 4, 25, 26, 40, 49, 50, 58)
    }
    assert found == {
        0: (0, 0),
        3: (0, 1),  # as near to 0 as to 6: the more goes
        4: (0, 1),
        25: (0, 1),
        26: (1, 1),  # as near to 6 as to 46
        40: (1, 1),
        49: (1, 2),
        50: (1, 2),
        58: (1, 3),
    }


def test_units_are_not_counted_as_if_they_cost_the_same() -> None:
    """Half of the units would be one head and two channels, 52 weights of 104; half of 2000 as well
    where a head costs 20 channels, but not of a site without heads."""
    where = [site("heads", 0, 2, 40), site("ffn-channels", 0, 4, 6)]
    z = {"0.heads": [0.9, 1.7], "0.ffn-channels": [-0.6, -0.9, 0.1, 1.4]}
    assert ask("standardised", where, "0.5", profiles=z) == {"0.heads": 1, "0.ffn-channels": 3}
    cheap = [site("heads", 0, 2, 6), site("ffn-channels", 0, 4, 6)]
    assert ask("standardised", cheap, "0.5", profiles=z) == {"0.heads": 0, "0.ffn-channels": 3}


@given(
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    percent=st.integers(0, 60),
    seed=st.integers(0, 99),
)
def test_the_cut_is_that_from_above(widths: list[int], percent: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    costs = [(40, 6, 13)[index % 3] for index in range(len(widths))]
    where = [
        Site(name=f"s{i}", block=i, spans=(), num_units=num, unit_cost=cost, kind="heads")
        for i, (num, cost) in enumerate(zip(widths, costs, strict=True))
    ]
    z = {
        each.name: torch.randn(each.num_units, generator=draw, dtype=torch.float64).tolist()
        for each in where
    }
    by_cost = {each.name: each.unit_cost for each in where}
    total = sum(each.num_weights for each in where)
    asked = -(-percent * total // 100)
    if asked > total - sum(costs):
        with pytest.raises(RecipeError, match="cannot be removed in whole units"):
            ask("standardised", where, Fraction(percent, 100), profiles=z)
        return
    found = ask("standardised", where, Fraction(asked, total), profiles=z)
    kept = units.kept_by_score(z, by_cost, Fraction(asked, total))
    assert {name: len(z[name]) - count for name, count in found.items()} == kept


def test_tied_sites_and_grouped_units_are_ranked_by_their_mean() -> None:
    assert in_order(torch.tensor([3.0, 1.0, 2.0, 9.0, 5.0, 7.0]), 2).tolist() == [1, 5, 2, 7, 3, 9]
    where = [site("ffn-channels", 0, 4, 6), site("ffn-channels", 1, 4, 6)]
    z = {"0.ffn-channels": [-2.0, -1.0, 0.0, 1.0], "1.ffn-channels": [0.5, 1.0, 1.5, 2.0]}
    alone = ask("standardised", where, "0.25", profiles=z)
    assert list(alone.values()) == [2, 0]
    tied = ask("standardised", where, "0.25", profiles=z, ties=[list(z)])
    assert list(tied.values()) == [1, 1]
    wide = ask("standardised", where, "0.25", profiles=z, multiple=2)
    assert list(wide.values()) == [2, 0]
    mixed = [site("heads", 0, 4, 6, num_groups=2), where[1]]
    grouped = {"0.heads": [-3.0, -2.9, 1.0, 1.2], **z}
    assert ask("standardised", mixed, "0.25", profiles=grouped)["0.heads"] == 2
    uneven = {"0.heads": [-3.0, 9.0, 9.0, 9.0], **z}  # the lowest goes with one of the other group
    assert ask("standardised", mixed, "0.25", profiles=uneven)["0.heads"] == 0


def test_both_rows_read_the_scores_of_a_method() -> None:
    plain, again = (ALLOCATIONS[name].profile for name in ("standardised", "standardised-units"))
    assert plain is not None and again is not None and plain.level == again.level == "site"
    scores = torch.tensor([1.0, 2.0, 6.0])
    assert plain.fn(scores).tolist() == [1, 2, 6]
    assert again.fn(scores).tolist() == pytest.approx(((scores - 3) / 7**0.5).tolist())


# Equal widths.


def quadratic(**weight: float) -> Callable[[Mapping[str, float]], float]:
    """A KL that is a weighted sum of squared shares, by kind."""
    return lambda shares: sum(
        weight[name.partition(".")[2].replace("-", "_")] * share**2
        for name, share in shares.items()
    )


@given(
    blocks=st.integers(2, 4),
    percent=st.integers(1, 70),
    multiple=st.sampled_from([None, 4]),
    deep=st.booleans(),
)
def test_combinations_are_those_of_which_no_part_suffices(
    blocks: int, percent: int, multiple: int | None, deep: bool
) -> None:
    kinds = ("heads", "ffn-channels", "block") if deep else ("heads", "ffn-channels")
    where = model(blocks, *kinds)
    request = Request(
        sites=where, target=Fraction(percent, 200 if deep else 100), multiple=multiple
    )
    space = Space.of(request, where)
    assert len(space.legal[0]) == (blocks if deep else 1)
    found = list(space.combinations(asked_cost(request)))
    assert len(set(found)) == len(found)

    def cost(levels: tuple[int, ...]) -> int:
        gone, heads, channels = levels
        stay = blocks - gone
        return gone * (4 * 40 + 16 * 6) + stay * (heads * 40 + channels * 6)

    assert set(found) == units.frontier(
        [list(each) for each in space.legal], cost, asked_cost(request)
    )
    for levels in found:
        counts = space.counts(levels)
        assert removed(where, {**dict.fromkeys((s.name for s in where), 0), **counts}) == cost(
            levels
        )


def test_the_best_widths_are_those_of_the_least_divergence() -> None:
    where = model(3, "heads", "ffn-channels")
    cheap_heads = Toy(quadratic(heads=0.1, ffn_channels=5.0))
    found = ask("widths", where, "0.25", cheap_heads)
    assert found == {
        f"{b}.{k}": n for b in range(3) for k, n in (("heads", 2), ("ffn-channels", 0))
    }
    cheap_channels = Toy(quadratic(heads=5.0, ffn_channels=0.1))
    found = ask("widths", where, "0.25", cheap_channels)
    assert {found[f"{b}.heads"] for b in range(3)} == {0}
    assert {found[f"{b}.ffn-channels"] for b in range(3)} == {11}
    between = ask("widths", where, "0.25", Toy(quadratic(heads=1.0, ffn_channels=1.0)), multiple=4)
    assert {found % 4 for name, found in between.items() if "ffn" in name} == {0}
    for counts in (found, between):
        assert removed(where, counts) >= 0.25 * sum(each.num_weights for each in where)


def test_a_second_round_looks_around_the_best() -> None:
    """Of 16 numbers of heads four are tried, then the four around the best of them."""
    where = model(2, "heads", "ffn-channels", heads=16, channels=200)

    def kl(shares: Mapping[str, float]) -> float:
        return (shares.get("0.heads", 0.0) * 16 - 6) ** 2

    toy = Toy(kl)
    found = ask("widths", where, "0.3", toy, candidates=4)
    tried = [
        [int(shares.get("0.heads", Fraction(0)) * 16) for shares in each] for each in toy.rounds
    ]
    assert tried[0][0] == 0 and len(tried[0]) == len(tried[1]) == 4
    assert found["0.heads"] == 6 not in tried[0]
    assert ask("widths", where, "0.3", Toy(kl), candidates=4, rounds=1)["0.heads"] in tried[0]


def test_blocks_go_by_their_scores_and_their_widths_are_not_counted_again() -> None:
    where = model(4, "heads", "ffn-channels", "block")

    def kl(shares: Mapping[str, float]) -> float:
        return sum(0.1 if "block" in name else share for name, share in shares.items())

    target = Fraction(256, 4 * 512)
    scores = {f"{b}.block": [s] for b, s in enumerate([0.0, 0.9, 0.5, 0.1])}
    for profiles, gone in ((None, 2), (scores, 2), ({**scores, "1.block": [0.2]}, 1)):
        found = ask("widths", where, target, Toy(kl), profiles)
        assert {name for name, count in found.items() if count} == {f"{gone}.block"}
    free = ask("widths", where, target, Toy(kl), scores, first=0, last=0)
    assert {name for name, count in free.items() if count} == {"0.block"}
    both = Toy(lambda shares: abs(len([n for n in shares if "heads" in n]) - 3.0))
    found = ask("widths", where, Fraction(376, 4 * 512), both, scores)
    assert found["2.block"] == 1 and found["2.heads"] == found["2.ffn-channels"] == 0
    assert {found[f"{b}.heads"] for b in (0, 1, 3)} == {1}


def test_ties_say_which_sites_are_alike() -> None:
    where = model(2, "heads", "ffn-channels")
    tied = ask(
        "widths", where, "0.2", Toy(quadratic(heads=1, ffn_channels=99)),
        ties=[["0.heads", "1.heads"], ["0.ffn-channels", "1.ffn-channels"]],
    )  # fmt: skip
    assert tied["0.heads"] == tied["1.heads"] == 2
    loose = ask(
        "widths", where, "0.2", Toy(lambda s: s.get("0.heads", 0.0) + 9 * s.get("1.heads", 0.0)),
        ties=[["0.heads"], ["1.heads"], ["0.ffn-channels", "1.ffn-channels"]],
    )  # fmt: skip
    assert loose["1.heads"] == 0


def test_without_a_probe_what_holds_the_least_of_the_scores_goes() -> None:
    where = model(2, "heads", "ffn-channels")
    flat = {each.name: [1.0] * each.num_units for each in where}
    idle_heads = flat | {f"{b}.heads": [0.0, 0.0, 5.0, 5.0] for b in range(2)}
    idle_channels = flat | {f"{b}.ffn-channels": [0.0] * 12 + [5.0] * 4 for b in range(2)}
    assert ask("widths", where, "0.25", profiles=idle_heads)["0.heads"] == 2
    assert ask("widths", where, "0.25", profiles=idle_channels)["0.ffn-channels"] == 11
    even = ask("widths", where, "0.25")
    assert even["0.heads"] == 1 and even["0.ffn-channels"] == 4


# One pool.


def test_what_does_least_for_its_size_goes_first() -> None:
    """A head of 40 weights at 0.4, a channel of 6 at 0.12: the head is half as dear by weight."""
    where = model(1, "heads", "ffn-channels")

    def kl(shares: Mapping[str, float]) -> float:
        return 0.4 * 4 * shares.get("0.heads", 0) + 0.12 * 16 * shares.get("0.ffn-channels", 0)

    found = ask("greedy-units", where, Fraction(40, 256), Toy(kl), chunks=16)
    assert found == {"0.heads": 1, "0.ffn-channels": 0}
    dearer = Toy(lambda shares: kl(shares) + 8 * shares.get("0.heads", 0))
    found = ask("greedy-units", where, Fraction(40, 256), dearer, chunks=16)
    assert found == {"0.heads": 0, "0.ffn-channels": 7}


def test_the_pool_is_measured_again() -> None:
    """The second head is fatal after the first: one shot would take both."""
    where = model(2, "heads")

    def kl(shares: Mapping[str, float]) -> float:
        first, second = (shares.get(f"{b}.heads", 0.0) * 4 for b in range(2))
        return first + 1.1 * second + 10 * max(0, first - 1)

    two = Fraction(80, 320)
    assert ask("greedy-units", where, two, Toy(kl)) == {"0.heads": 1, "1.heads": 1}
    once = ask("greedy-units", where, Fraction(120, 320), Toy(kl), rounds=1)
    assert once == {"0.heads": 2, "1.heads": 1}  # what one round leaves is taken in its order
    assert ask("greedy-units", where, Fraction(120, 320), Toy(kl)) == {"0.heads": 1, "1.heads": 2}


def test_a_half_that_does_nothing_goes_whole_and_covers_its_units() -> None:
    where = model(2, "heads", "ffn-channels", "attention", "ffn")
    dear = {"heads": 40.0, "attention": 44.0, "ffn-channels": 50.0, "ffn": 99.0}

    def kl(shares: Mapping[str, float]) -> float:
        return sum(
            (0.001 if name == "1.attention" else dear[name.partition(".")[2]]) * share
            for name, share in shares.items()
        )

    target = Fraction(160, sum(each.num_weights for each in where))
    toy = Toy(kl)
    found = ask("greedy-units", where, target, toy)
    assert {name for name, count in found.items() if count} == {"1.attention"}
    more = Fraction(200, sum(each.num_weights for each in where))
    found = ask("greedy-units", where, more, toy := Toy(kl))
    assert found["1.attention"] == 1 and found["1.heads"] == 0 and removed(where, found) == 200
    assert not any("1.heads" in shares for shares in toy.rounds[-1] if "1.attention" in shares)


@given(
    percent=st.integers(0, 90),
    seed=st.integers(0, 30),
    rounds=st.integers(1, 5),
    multiple=st.sampled_from([None, 4]),
    tied=st.booleans(),
)
def test_a_pool_meets_the_asked_size_by_less_than_a_step(
    percent: int, seed: int, rounds: int, multiple: int | None, tied: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    where = model(3, "heads", "ffn-channels", "attention")
    weight = {each.name: float(torch.rand((), generator=draw)) for each in where}
    toy = Toy(lambda shares: sum(weight[name] * share**2 for name, share in shares.items()))
    ties = [[f"{b}.ffn-channels" for b in range(3)]] if tied else []
    removable = 3 * (160 + (15 if multiple is None else 12) * 6)
    asked = percent * removable // 100
    total = sum(each.num_weights for each in where)
    found = ask(
        "greedy-units", where, Fraction(asked, total), toy,
        ties=ties, multiple=multiple, rounds=rounds,
    )  # fmt: skip
    assert 0 <= removed(where, found) - asked < 160
    if tied:
        assert len({found[f"{b}.ffn-channels"] for b in range(3)}) == 1
    for b in range(3):
        assert not (found[f"{b}.attention"] and found[f"{b}.heads"])


@pytest.mark.parametrize("name", ["standardised", "widths", "greedy-units"])
def test_more_than_units_hold_is_refused(name: str) -> None:
    where = model(2, "heads", "ffn-channels")
    flat = {each.name: [1.0] * each.num_units for each in where}
    toy = None if name == "standardised" else Toy(lambda shares: 0.0)
    with pytest.raises(RecipeError, match=r"^prune\.sparsity: 0\.9 cannot .* most 0\.820312 can"):
        ask(name, where, "0.9", toy, flat)
    with pytest.raises(RecipeError, match=r"most 0\.75 can.*--sparsity 0\.75"):
        ask(name, where, "0.8", toy, flat, multiple=4)
    assert toy is None or not toy.rounds
