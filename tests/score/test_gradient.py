"""Scores from gradients: the vectors of their formulas, and in what they differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.mask.rank import keep_highest
from llmprune.score import SCORES
from llmprune.stats import STATISTICS
from llmprune.stats.gradients import GradientMoment
from llmprune.stats.types import Stats
from tests.reference import gradients as reference

WEIGHT = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.2, -0.1, 4.0, 1.0]])
GRADIENTS = (
    torch.tensor([[0.1, -0.2, 0.0, 0.4], [0.5, 0.1, -0.1, 0.2]]),
    torch.tensor([[-0.1, -0.2, 0.2, 0.4], [-0.3, 0.1, -0.1, -0.2]]),
)
NORMS = torch.tensor([1.0, 10.0, 2.0, 4.0], dtype=torch.float64)


def stats_of(gradients: tuple[Tensor, ...], **others: Tensor) -> Stats:
    """Return all moments of some gradients, beside other statistics."""
    values = dict(others)
    for name in ("grad_sum", "grad_abs", "grad_sq"):
        moment = STATISTICS[name].accumulator()
        assert isinstance(moment, GradientMoment)
        for gradient in gradients:
            moment.update(gradient)
        values |= moment.result().values
    return Stats(num_tokens=9, num_sequences=len(gradients), values=values)


def rows(score_OI: Tensor, num_kept: int) -> list[list[int]]:
    """Return the columns that are kept in each row."""
    pruned = torch.full((len(score_OI),), score_OI.shape[1] - num_kept)
    return [row.nonzero().flatten().tolist() for row in keep_highest(score_OI, pruned)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("snip", [[0.0, 0.2, 0.2, 0.2], [0.02, 0.01, 0.4, 0.0]]),
        ("taylor", [[0.3, 0.2, 0.2, 0.2], [0.08, 0.01, 0.4, 0.2]]),
        ("fisher", [[0.045, 0.02, 0.04, 0.02], [0.0034, 0.00005, 0.08, 0.02]]),
    ],
)
def test_vectors_of_the_loss(name: str, expected: list[list[float]]) -> None:
    score = SCORES[name].fn(WEIGHT, stats_of(GRADIENTS))
    torch.testing.assert_close(score, torch.tensor(expected), rtol=0, atol=1e-7)


def test_only_snip_lets_opposite_gradients_cancel() -> None:
    stats = stats_of(GRADIENTS)
    score = {name: float(SCORES[name].fn(WEIGHT, stats)[0, 0]) for name in ("snip", "taylor")}
    assert score["snip"] == pytest.approx(0, abs=1e-8)
    assert score["taylor"] == pytest.approx(0.3)


def test_fisher_is_not_the_square_of_taylor() -> None:
    """A gradient that comes once and large counts for more than one that is always small."""
    weight = torch.ones(1, 2)
    stats = stats_of(tuple(torch.tensor(g) for g in ([[1.0, 3.0]], [[1.0, 0.0]], [[1.5, 0.0]])))
    assert rows(SCORES["taylor"].fn(weight, stats), 1) == [[0]]
    assert rows(SCORES["fisher"].fn(weight, stats), 1) == [[1]]


@given(seed=st.integers(0, 10**6), num=st.integers(1, 4))
def test_scores_of_the_loss_as_their_formulas_read(seed: int, num: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    gradients = tuple(torch.randn(num, 3, 4, generator=generator))
    expected = reference.scores(weight.tolist(), [each.tolist() for each in gradients])
    for name, wanted in expected.items():
        found = SCORES[name].fn(weight, stats_of(gradients))
        torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-6)


GN = torch.tensor([[0.02, 0.001, 0.05, 0.1], [0.3, 0.0, 0.001, 0.01]])


@pytest.mark.parametrize(("name", "statistic"), [("gblm", "grad_sq"), ("gblm-l1", "grad_abs")])
def test_gblm_on_its_fixture(name: str, statistic: str) -> None:
    """Input norms are means over sequences, gradient norms are sums over them."""
    moment = GN**2 if statistic == "grad_sq" else GN
    for num in (1, 8):
        values = {"col_sq": NORMS**2 * num, statistic: moment}
        score = SCORES[name].fn(WEIGHT, Stats(num_tokens=9, num_sequences=num, values=values))
        expected = torch.tensor([[9.0, 10.1, 14.0, 7.0], [6.2, 1.0, 8.4, 5.0]])
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)
        assert rows(score, 2) == [[1, 2], [0, 2]]
    wanda = SCORES["wanda"].fn(WEIGHT, Stats(num_tokens=9, values={"col_sq": NORMS**2}))
    assert rows(wanda, 2) == [[1, 2], [2, 3]]  # without gradients row 1 keeps another weight


def test_the_two_norms_of_gblm_differ_where_gradients_do() -> None:
    """Four gradients of 1 and one of 3: 4 against 3 in sum, 2 against 3 in length."""
    often, once = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    stats = stats_of((often, often, often, often, once), col_sq=torch.ones(2))
    weight = torch.ones(1, 2)
    assert rows(SCORES["gblm"].fn(weight, stats), 1) == [[1]]
    assert rows(SCORES["gblm-l1"].fn(weight, stats), 1) == [[0]]


def test_wanda_plus_plus_on_its_fixture() -> None:
    """The norm of an input is over all tokens, that of a gradient a mean over sequences."""
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    region = torch.tensor([[0.5, 0.0, 0.01, 0.2]])
    for num in (1, 4):
        values = {"col_sq": NORMS**2, "region_sq": region**2 * num}
        stats = Stats(num_tokens=9, num_sequences=num, values=values)
        score = SCORES["wanda++"].fn(weight, stats)
        torch.testing.assert_close(score, torch.tensor([[153.0, 10.0, 6.0, 12.0]]))
        assert rows(score, 2) == [[0, 3]]
        assert rows(SCORES["wanda"].fn(weight, stats), 2) == [[1, 2]]


@pytest.mark.parametrize("name", ["gblm", "gblm-l1", "wanda++"])
def test_without_gradients_these_rank_as_wanda(name: str) -> None:
    """Alpha is a keyword of theirs, as the rows say."""
    assert SCORES[name].options == {"alpha": 100.0}
    zero = torch.zeros_like(WEIGHT)
    values = {"col_sq": NORMS**2, "grad_sq": GN, "grad_abs": GN, "region_sq": GN}
    wanda = SCORES["wanda"].fn(WEIGHT, Stats(num_tokens=9, values=values))
    for stats, alpha in (
        (Stats(num_tokens=9, num_sequences=1, values=values), 0.0),
        (Stats(num_tokens=9, num_sequences=1, values={**dict.fromkeys(values, zero),
                                                      "col_sq": NORMS**2}), 100.0),
    ):  # fmt: skip
        torch.testing.assert_close(SCORES[name].fn(WEIGHT, stats, alpha=alpha), wanda)


@pytest.mark.parametrize("name", ["snip", "taylor", "fisher", "gblm", "gblm-l1", "wanda++"])
def test_an_unknown_number_of_sequences_is_refused(name: str) -> None:
    values = {"col_sq": NORMS**2, "grad_sum": GN, "grad_sq": GN, "grad_abs": GN, "region_sq": GN}
    with pytest.raises(ValueError, match="unknown number of sequences"):
        SCORES[name].fn(WEIGHT, Stats(num_tokens=9, values={**values}))


@pytest.mark.parametrize("name", ["snip", "taylor", "fisher", "gblm", "gblm-l1", "wanda++"])
def test_a_transposed_weight_scores_as_its_copy(name: str) -> None:
    stored = WEIGHT.T.contiguous()
    values = {"col_sq": NORMS**2, "grad_sum": GN, "grad_sq": GN, "grad_abs": GN, "region_sq": GN}
    stats = Stats(num_tokens=9, num_sequences=2, values=values)
    assert torch.equal(SCORES[name].fn(stored.T, stats), SCORES[name].fn(WEIGHT, stats))
