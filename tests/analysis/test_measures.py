"""The numbers of an analysis: hand-checked vectors, and slow versions to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.analysis.alignment import CrossGram, alignment_finding
from llmprune.analysis.concentrations import concentration, concentration_finding
from llmprune.analysis.halfway import POINTS, Blend, barrier, between_finding, why_not
from llmprune.analysis.influences import influence_finding
from llmprune.analysis.noise import RATES, losses, noise_finding, noised
from llmprune.analysis.outstanding import outlier_finding
from llmprune.analysis.positions import position_finding, smoothed
from llmprune.analysis.predictions import Predictions, predict
from llmprune.analysis.reach import bias_of, paths, reach_finding, reach_of
from llmprune.analysis.worsened import extra_by_kind, share_of_worst, worst_finding, worst_places
from llmprune.arch.types import Coupling, Span
from llmprune.evaluation.perplexity import loss_of_blocks
from llmprune.walk.forward import embed, walk
from llmprune.walk.resident import in_memory


def slow_cka(x_TD: torch.Tensor, y_TE: torch.Tensor) -> float:
    """Return CKA by its definition, from the T x T matrices of centred hidden states."""
    num = len(x_TD)
    centre = torch.eye(num, dtype=torch.float64) - 1 / num
    kernels = [centre @ (h @ h.T) @ centre for h in (x_TD.double(), y_TE.double())]
    both, one, two = (
        float((a * b).sum())
        for a, b in (kernels, (kernels[0], kernels[0]), (kernels[1], kernels[1]))
    )
    return both / math.sqrt(one * two)


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_cka_in_pieces_is_cka_by_its_definition(seed: int, wide: int, other: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(12, wide, generator=draw) + 3
    y_TE = torch.randn(12, other, generator=draw)
    sums = CrossGram()
    for a, b in zip(x_TD.split(5), y_TE.split(5), strict=True):
        sums.add(a[None], b[None])
    assert sums.cka() == pytest.approx(slow_cka(x_TD, y_TE), abs=1e-9)


def test_cka_of_a_turned_and_scaled_copy_is_one() -> None:
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(20, 4, generator=draw)
    turn_DD = torch.linalg.qr(torch.randn(4, 4, generator=draw)).Q
    sums = CrossGram()
    sums.add(x_TD, 3 * x_TD @ turn_DD + 1)
    assert sums.cka() == pytest.approx(1, abs=1e-6)
    still = CrossGram()
    still.add(x_TD, torch.ones(20, 2))
    assert still.cka() == 0


def test_cka_says_where_it_fell() -> None:
    found = alignment_finding([(0, 0.99, True), (1, 0.7, True), (2, 0.8, True)])
    assert "after block 1" in found.means[0] and "in block 1" in found.means[1]
    assert "0.800 again" in found.means[2]
    assert (
        "block 1, which was removed"
        in alignment_finding([(0, 1.0, True), (1, 0.5, False)]).means[1]
    )


def test_the_pq_index_of_what_is_left() -> None:
    weight_OI = torch.tensor([[4.0, 1.0, 1.0, 0.0, 2.0]])
    assert concentration(0, "q", weight_OI, torch.ones(1, 5, dtype=torch.bool)).pq == pytest.approx(
        0.237230, abs=1e-6
    )
    left = concentration(0, "q", weight_OI)  # 1 - 8 / (4^0.5 * 22^0.5)
    assert (left.pq, left.num_left) == (pytest.approx(1 - 8 / math.sqrt(88)), 4)


def test_the_pq_index_says_whether_removal_follows_it() -> None:
    dense = [
        concentration(0, "q", torch.tensor([[9.0, 1.0, 1.0, 1.0]])),
        concentration(1, "q", torch.tensor([[1.0, 1.0, 1.0, 1.0]])),
    ]
    followed = [
        concentration(0, "q", torch.tensor([[9.0, 0.0, 0.0, 1.0]])),
        concentration(1, "q", torch.tensor([[1.0, 1.0, 1.0, 1.0]])),
    ]
    assert "follows this: 50%" in concentration_finding(followed, dense).means[1]
    assert "does not follow" in concentration_finding(dense, dense).means[1]
    assert concentration_finding([], []).is_empty


def test_blocks_that_differ_little_in_outliers_suit_equal_shares() -> None:
    assert "owl" in outlier_finding({0: 0.04, 1: 0.01}, {}).means[1]
    assert "equal shares" in outlier_finding({0: 0.011, 1: 0.01}, {}).means[1]
    assert outlier_finding({0: None}, {}).is_empty


def test_influence_names_what_went() -> None:
    found = influence_finding({0: 0.5, 2: 0.1}, {0: 0.4, 1: 0.2, 2: 0.1})
    assert "block 2 changes least" in found.means[0]
    assert "block 0 most: it does more" in found.means[1]
    assert "block 1 did most (0.200)" in found.means[2]


def test_slips_at_a_low_rate_are_those_at_a_high_one() -> None:
    text = "some words of a text, which goes on for a while" * 20
    assert noised(text, 0.0, 5) == text
    low, high = noised(text, 0.05, 5), noised(text, 0.2, 5)
    assert low == noised(text, 0.05, 5) != noised(text, 0.05, 6)
    assert text != low != high
    few = sum(noised(c, 0.05, seed) != c for seed in range(400) for c in "a")
    assert all(
        noised("a", 0.2, seed) == noised("a", 0.05, seed)
        for seed in range(400)
        if noised("a", 0.05, seed) != "a"
    )
    assert 5 <= few <= 40


def test_noise_compares_the_two_models() -> None:
    assert "brittle" in noise_finding([2.0, 3.0, 4.0, 5.0], [1.0, 1.5, 2.0, 2.5]).means[1]
    assert "lost more" in noise_finding([2.0, 3.0, 4.0, 9.0], [1.0, 1.5, 2.0, 2.5]).means[1]
    assert len(noise_finding([2.0] * len(RATES), None).means) == 1


@pytest.fixture(scope="session")
def pair(pico: Callable[..., Path], streamed: Callable[..., Any], make_model: Any) -> Any:
    """Two models of one shape, the second with a third of each matrix zero."""
    dense = make_model("llama").eval()
    pruned = make_model("llama").eval()
    with torch.no_grad():
        for name, value in pruned.named_parameters():
            if value.dim() > 1 and "layers" in name:
                value.view(-1)[::3] = 0
    return dense, pruned


def test_predictions_are_those_of_the_models(pair: Any, tokens: torch.Tensor) -> None:
    dense, pruned = pair
    with in_memory(dense) as one, in_memory(pruned) as two:
        streams = (embed(one, tokens, 4), embed(two, tokens, 4))
        walk(one, streams[0])
        walk(two, streams[1])
        found = predict(one, two, streams, tokens, 4)
    with torch.no_grad():
        p, q = (side(tokens).logits[:, :-1].log_softmax(-1) for side in (dense, pruned))
    assert torch.allclose(found.kl_NP, (p.exp() * (p - q)).sum(-1), atol=1e-5)
    wanted = tokens[:, 1:, None]
    assert torch.allclose(found.pruned_loss_NP, -q.gather(-1, wanted)[..., 0], atol=1e-5)
    assert torch.equal(found.dense_best_NP, p.argmax(-1))
    position = position_finding(found)
    assert position.rows[3][1] == pytest.approx(float(found.kl_NP[:, 3].double().mean()))


def predictions(dense: list[float], pruned: list[float], kl: list[float]) -> Predictions:
    one = torch.zeros(1, len(kl), dtype=torch.int64)
    return Predictions(
        kl_NP=torch.tensor([kl]),
        dense_loss_NP=torch.tensor([dense]),
        pruned_loss_NP=torch.tensor([pruned]),
        dense_best_NP=one,
        pruned_best_NP=one,
    )


def test_drift_with_length_is_named() -> None:
    flat = [1.0] * 16
    assert "does not drift" in position_finding(predictions(flat, flat, flat)).means[1]
    late = [1.0] * 12 + [2.0] * 4
    assert "2.00 times" in position_finding(predictions(flat, flat, late)).means[1]
    early = [1.0] * 4 + [2.0] * 4 + [1.0] * 8
    assert "More context" in position_finding(predictions(flat, flat, early)).means[1]
    assert [x for x, _ in smoothed([1.0] * 5, 2)] == [1.5, 4.0]


def test_the_worst_tokens_come_with_what_stood_before(tokenizer: Any) -> None:
    ids_NT = torch.tensor([tokenizer("ab. c", add_special_tokens=False)["input_ids"]])
    found = predictions([1.0] * 4, [1.0, 4.0, 1.5, 0.0], [0.0] * 4)
    finding = worst_finding(found, ids_NT, tokenizer)
    assert finding.rows[0][:3] == (0, 2, 3.0)
    assert finding.rows[0][4] == "." and str(finding.rows[0][3]).replace(" ", "") == "ab"
    extra_NP = found.pruned_loss_NP - found.dense_loss_NP
    assert worst_places(extra_NP, 2) == [(0, 1), (0, 2)]
    assert share_of_worst(extra_NP) == pytest.approx(3 / 3.5)
    kinds = extra_by_kind(extra_NP, ids_NT, lambda token: tokenizer.convert_ids_to_tokens(token))
    assert kinds[0] == ("punctuation", 3.0, 1)


def test_values_of_grouped_heads_are_found() -> None:
    """Two groups of one query head, width 2: rows are q0 k0 v0 q1 k1 v1 of a fused linear."""
    heads = Coupling(
        name="heads",
        num_units=2,
        spans=(Span(linear="qkv", axis="out", width=6), Span(linear="o", axis="in", width=2)),
    )
    rows = torch.ones(12, dtype=torch.bool)
    rows[[5, 10]] = False  # the second value of group 0, the first of group 1
    columns = torch.tensor([True, True, False, True])
    lives = {"qkv": (rows, columns), "o": (rows, columns)}
    assert paths(heads, lives.__getitem__) == ("values", 4, 2, 1, 2)


def test_a_row_without_weights_lives_by_its_bias(pair: Any) -> None:
    with in_memory(pair[1]) as blocks, blocks.open(0) as block:
        down = next(name for name in block.anatomy.linears if name.endswith("down_proj"))
        masks = {
            name: torch.ones(linear.shape, dtype=torch.bool)
            for name, linear in block.anatomy.linears.items()
        }
        masks[down][:, 3] = False
        gate = down.replace("down", "gate")
        masks[gate][5] = False
        dead, reach = reach_of(block, masks)
        assert bias_of(block, gate) is None
        biased = SimpleNamespace(
            index=0,
            anatomy=block.anatomy,
            weight=block.weight,
            biases_of=lambda names: {
                f"{name}.bias": torch.ones(block.anatomy.linears[name].shape[0]) for name in names
            },
        )
        _, alive = reach_of(biased, masks)  # type: ignore[arg-type]
    channels = next(row for row in reach if row.kind == "ffn-channels")
    assert (channels.num_unwritten, channels.num_unread, channels.num_dead) == (1, 1, 2)
    assert sum(each.dead_rows for each in dead) == sum(each.dead_columns for each in dead) == 1
    assert next(row for row in alive if row.kind == "ffn-channels").num_unwritten == 0
    said = reach_finding(dead, reach)
    assert any(text.startswith("2 of ") and "--pattern ffn-channels" in text for text in said.means)


def test_the_loss_between_two_models_is_that_of_blended_weights(
    pair: Any, tokens: torch.Tensor, make_model: Any
) -> None:
    middle = make_model("llama").eval()
    with torch.no_grad():
        for value, one, two in zip(
            middle.parameters(), pair[0].parameters(), pair[1].parameters(), strict=True
        ):
            value.copy_((one + two) / 2)
        logits = middle(tokens).logits[:, :-1].float().flatten(0, 1)
    asked = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    before = [value.clone() for value in pair[0].parameters()]
    with in_memory(pair[0]) as one, in_memory(pair[1]) as two:
        assert why_not(one, two) is None
        nats, _ = loss_of_blocks(Blend(one=_Copied(one), other=two, t=0.5), tokens)
    assert nats == pytest.approx(float(asked), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, pair[0].parameters(), strict=True))


class _Copied:
    """A model in memory whose parts come back as they were, as streamed ones do."""

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.blocks, name)

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def open(self, index: int) -> Iterator[Any]:
        with self.blocks.open(index) as block, _kept(block.module):
            yield block

    @contextmanager
    def trunk(self, *, head: bool) -> Iterator[Any]:
        with self.blocks.trunk(head=head) as model, _kept(model):
            yield model


@contextmanager
def _kept(module: Any) -> Iterator[None]:
    before = [(param, param.data) for param in module.parameters()]
    yield
    for param, data in before:
        param.data = data


def test_models_of_unequal_shape_have_no_line_between_them(make_model: Any) -> None:
    with in_memory(make_model("llama")) as one, in_memory(make_model("gpt2")) as two:
        assert "only one of the two" in str(why_not(one, two))


def test_a_barrier_is_named() -> None:
    flat = between_finding([1.0, 1.0, 0.9, 1.0, 1.0], 1.0, names=("a", "b"))
    assert "one basin" in flat.means[0] and "averaging the two helps" in flat.means[0]
    high = between_finding([1.0, 2.0, 3.0, 2.0, 1.0], 0.5, names=("a", "b"))
    assert "different solutions" in high.means[0] and "both removed 50%" in high.means[1]
    assert barrier([1.0, 2.0, 3.0, 2.0, 1.0]) == (2.0, POINTS[2])


def test_losses_of_windows_add_up_to_those_of_perplexity(pair: Any, tokens: torch.Tensor) -> None:
    with in_memory(pair[0]) as blocks:
        assert float(losses(blocks, tokens, 4).sum()) == pytest.approx(
            loss_of_blocks(blocks, tokens)[0], rel=1e-6
        )
