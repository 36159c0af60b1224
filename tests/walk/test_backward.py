"""Gradients block by block are those of the whole model, with one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.base.errors import NumericalError
from llmprune.stats.types import Stats
from llmprune.walk.backward import backward_survey, recorded, seed_with_loss
from llmprune.walk.resident import Resident, in_memory
from llmprune.walk.streamed import Streamed
from tests.reference.gradients import Moments, whole_model

Pico = Callable[..., Path]
Open = Callable[..., Streamed]
MakeModel = Callable[..., Any]

NEEDS = ("grad_sum", "grad_abs", "grad_sq")


def names_of(blocks: Any) -> Callable[[int], list[str]]:
    return lambda index: list(blocks.anatomy(index).linears)


def survey(blocks: Any, tokens_NT: Tensor, **options: Any) -> dict[int, dict[str, Stats]]:
    return dict(backward_survey(blocks, tokens_NT, NEEDS, names_of(blocks), **options))


def worst(found: Mapping[int, Mapping[str, Stats]], expected: Moments) -> float:
    """Return the largest difference of any moment, over the largest value of that moment."""
    differences = []
    for (index, linear), moments in expected.items():
        for name, value in moments.items():
            ours = found[index][linear][name].to(value)
            assert ours.shape == value.shape
            differences.append(float((ours - value).abs().max() / value.abs().max()))
    return max(differences)


@pytest.fixture
def resident(make_model: MakeModel) -> Iterator[Callable[..., Resident]]:
    """Open a pico model in memory, in the dtype asked for."""
    opened: list[Any] = []

    def open_model(model_type: str, dtype: torch.dtype = torch.float32) -> Resident:
        context = in_memory(make_model(model_type).to(dtype))
        opened.append(context)
        return context.__enter__()

    yield open_model
    for context in opened:
        context.__exit__(None, None, None)


def test_moments_are_those_of_the_whole_model(
    pico: Pico, streamed: Open, resident: Callable[..., Resident], tokens: Tensor, model_type: str
) -> None:
    expected = whole_model(resident(model_type), tokens[:3])
    found = survey(streamed(pico(model_type)), tokens[:3])
    assert {(index, linear) for index, each in found.items() for linear in each} == set(expected)
    assert all(each.num_sequences == 3 for stats in found.values() for each in stats.values())
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_they_are_so_to_the_last_digits_of_float64(
    resident: Callable[..., Resident], tokens: Tensor, model_type: str
) -> None:
    blocks = resident(model_type, torch.float64)
    assert worst(survey(blocks, tokens[:2], chunk=5), whole_model(blocks, tokens[:2])) < 1e-11


def test_a_square_is_that_of_a_single_sequence(pico: Pico, streamed: Open, tokens: Tensor) -> None:
    """The square of a sum of gradients, which a batch would give, is another number."""
    stats = survey(streamed(pico("llama")), tokens[:4])[0]["mlp.up_proj"]
    of_the_sum = stats["grad_sum"] ** 2 / 4
    assert (stats["grad_sq"] >= of_the_sum * (1 - 1e-4)).all()
    assert float(of_the_sum.sum() / stats["grad_sq"].sum()) < 0.9


def test_blocks_come_last_first_and_none_is_open_then(
    pico: Pico, streamed: Open, tokens: Tensor
) -> None:
    blocks = streamed(pico("llama"))
    order = []
    for index, _ in backward_survey(blocks, tokens[:2], NEEDS, names_of(blocks)):
        assert all(value.is_meta for value in blocks.model.parameters())
        order.append(index)
    assert order == list(reversed(range(len(blocks))))


def test_only_what_is_asked_for_is_looked_at(
    pico: Pico, streamed: Open, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = streamed(pico("llama"))
    whole = survey(blocks, tokens[:2])
    opened: list[int] = []
    real = Streamed.open

    def note(self: Streamed, index: int) -> Any:
        opened.append(index)
        return real(self, index)

    monkeypatch.setattr(Streamed, "open", note)
    wanted: dict[int, list[str]] = {0: [], 1: ["mlp.up_proj"]}
    found = dict(backward_survey(blocks, tokens[:2], ["grad_sq"], wanted.__getitem__))
    assert opened == [0, 1, 1]  # block 0 is not computed again: nothing in it is asked for
    assert {index: list(each) for index, each in found.items()} == {1: ["mlp.up_proj"]}
    assert list(found[1]["mlp.up_proj"].values) == ["grad_sq"]
    assert torch.equal(found[1]["mlp.up_proj"]["grad_sq"], whole[1]["mlp.up_proj"]["grad_sq"])


def same(left: Mapping[str, Stats], right: Mapping[str, Stats]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[linear][name])
        for linear, stats in left.items()
        for name, value in stats.values.items()
    )


def test_sums_go_on_from_earlier_sequences_to_the_same_bits(
    pico: Pico, streamed: Open, tokens: Tensor, model_type: str
) -> None:
    blocks = streamed(pico(model_type))
    whole = survey(blocks, tokens[:5])
    found = survey(blocks, tokens[:2])
    found = survey(blocks, tokens[2:3], before=found.__getitem__, start=2)
    found = survey(blocks, tokens[3:5], before=found.__getitem__, start=3)
    assert all(same(found[index], whole[index]) for index in whole)


def test_sequences_that_are_in_already_are_passed_on_and_not_added_again(
    pico: Pico, streamed: Open, tokens: Tensor
) -> None:
    blocks = streamed(pico("mixtral"))
    whole, first = survey(blocks, tokens[:4]), survey(blocks, tokens[:3])
    known = {0: {}, 1: first[1]}  # block 0 was not reached
    found = survey(blocks, tokens[:4], before=known.__getitem__)
    assert all(same(found[index], whole[index]) for index in whole)


def test_positions_per_piece_change_only_roundings(
    pico: Pico, streamed: Open, tokens: Tensor
) -> None:
    blocks = streamed(pico("gpt2"))
    whole = survey(blocks, tokens[:1])
    for chunk in (1, 7, 23, 100):
        found = survey(blocks, tokens[:1], chunk=chunk)
        for linear, stats in whole[0].items():
            within = 1e-5 * float(stats["grad_sum"].abs().max())
            torch.testing.assert_close(
                found[0][linear]["grad_sum"], stats["grad_sum"], rtol=0, atol=within
            )


def test_inputs_on_disk_give_the_same_bits_and_leave_nothing(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = streamed(pico("llama"))
    whole = survey(blocks, tokens[:3])
    found = survey(blocks, tokens[:3], place="disk", folder=tmp_path / "inputs")
    assert all(same(found[index], whole[index]) for index in whole)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        for _ in backward_survey(
            blocks, tokens, NEEDS, names_of(blocks), place="disk", folder=tmp_path / "inputs"
        ):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_losses_are_those_of_the_model(
    pico: Pico, streamed: Open, stock: Any, tokens: Tensor
) -> None:
    folder = pico("llama")
    blocks = streamed(folder)
    with recorded(blocks, tokens[:3]) as tape:
        losses = seed_with_loss(blocks, tape, tokens[:3], chunk=5)
        assert not bool(tape.hidden[-1].get(0, blocks.device)[:, -1].any())  # it predicts nothing
    model = stock(folder)
    for ids, loss in zip(tokens[:3], losses, strict=True):
        expected = float(model(input_ids=ids[None], labels=ids[None]).loss.detach())
        assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_a_model_in_memory_is_left_as_it_was(make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    with in_memory(model) as blocks, torch.no_grad():
        survey(blocks, tokens[:1])
    assert {name: value.requires_grad for name, value in model.named_parameters()} == trained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())


def test_an_expert_without_tokens_has_gradients_of_zero(
    resident: Callable[..., Resident], tokens: Tensor
) -> None:
    found = survey(resident("mixtral"), tokens[:1, :2])
    experts = [each for linear, each in found[0].items() if "experts" in linear]
    idle = [each for each in experts if not bool(each["grad_abs"].any())]
    assert 0 < len(idle) < len(experts)
    assert all(each.num_sequences == 1 for each in experts)


@pytest.mark.parametrize(("quiet", "headroom"), [(1.0, 4), (1e-4, 4), (1.0, 15)])
def test_float16_neither_loses_small_gradients_nor_overflows(
    resident: Callable[..., Resident],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    quiet: float,
    headroom: int,
) -> None:
    """Quiet gradients are below what float16 holds; near its largest number, sums overflow."""
    monkeypatch.setattr("llmprune.walk.backward._HEADROOM", headroom)

    def found(dtype: torch.dtype) -> dict[int, dict[str, Stats]]:
        blocks = resident("llama", dtype)
        blocks.model.model.norm.weight.data *= quiet
        return survey(blocks, tokens[:2])

    half, exact = found(torch.float16), found(torch.float32)
    for index, stats in exact.items():
        for linear, each in stats.items():
            difference = half[index][linear]["grad_sum"] - each["grad_sum"]
            assert float(difference.norm() / each["grad_sum"].norm()) < 0.05, (index, linear)


def test_bfloat16_gradients_are_summed_in_float32(
    resident: Callable[..., Resident], tokens: Tensor
) -> None:
    found = survey(resident("llama", torch.bfloat16), tokens[:2])
    exact = survey(resident("llama"), tokens[:2])
    for index, stats in exact.items():
        for linear, each in stats.items():
            ours = found[index][linear]["grad_sq"]
            assert ours.dtype == torch.float32
            assert float((ours - each["grad_sq"]).norm() / each["grad_sq"].norm()) < 0.3


def test_a_gradient_that_is_not_finite_is_told_with_its_place(
    resident: Callable[..., Resident], tokens: Tensor
) -> None:
    blocks = resident("llama")
    blocks.model.model.norm.weight.data.fill_(1e38)
    with pytest.raises(NumericalError, match=r"by model\.layers\.1\.\S+ \(grad_sq\)"):
        survey(blocks, tokens[:1])
    blocks.model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(NumericalError, match=r"what block 1 returns.*--dtype bfloat16"):
        survey(blocks, tokens[:1])
    blocks = resident("llama")
    real = blocks.modules[1].forward

    def steep(hidden: Tensor, *args: Any, **options: Any) -> Tensor:
        """Add the root of 0, which is finite and has no finite slope."""
        output: Tensor = real(hidden, *args, **options)
        return output + (hidden - hidden.detach()).sqrt()

    blocks.modules[1].forward = steep
    with pytest.raises(NumericalError, match="what block 1 is given"):
        survey(blocks, tokens[:1])


def test_a_sequence_of_one_token_has_no_loss(pico: Pico, streamed: Open, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="one token"):
        survey(streamed(pico("llama")), tokens[:, :1])
