"""What is trained on: the tokens that are asked for, windows held out, and an order by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.calibration.mix import Loss, Windows, read_windows
from llmprune.calibration.windows import token_hash
from llmprune.engine.calibrating import leaked_share
from llmprune.evaluation.windows import IGNORED, next_tokens
from llmprune.recipe import Recipe, RecoverStep, build
from llmprune.recovery.distillation import normalized_mse, strongest, topk_kl
from llmprune.recovery.examples import Examples, asked_targets, examples_of, read_examples
from llmprune.recovery.objective import next_token_loss
from tests.conftest import pico_tokenizer

TEMPLATE = """{%- for m in messages %}
{{- m.role[0] + ':' + m.content + ('</s>' if m.role == 'assistant' else '\n') }}{% endfor %}
{%- if add_generation_prompt %}{{ 'a:' }}{% endif %}"""
CHAT = {
    "messages": [
        {"role": "user", "content": "what is it that you would like to know of us"},
        {"role": "assistant", "content": "XYZ"},
    ]
}
PLAIN = {"text": "some plain text that nobody says"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = pico_tokenizer()
    found.chat_template = TEMPLATE
    return found


def recipe_of(path: Path, rows: list[dict[str, Any]], **wishes: Any) -> Recipe:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    calibration = {"data": str(path), "num_samples": 99, **wishes}
    steps = [{"prune": {"sparsity": 0.5}}]
    return build({"model": "owner/name", "steps": steps, "calibration": calibration})


def read(
    path: Path, rows: list[dict[str, Any]], tokenizer: Any, loss: Loss, **wishes: Any
) -> tuple[Examples, Windows, Windows]:
    """Return the examples of rows, what is told of them, and the windows of calibration."""
    recipe = recipe_of(path, rows, **wishes)
    examples, found = read_examples(recipe, tokenizer, seq_len=16, loss=loss)
    return examples, found, read_windows(recipe, tokenizer, seq_len=16)


def by_loops(ids_NT: Tensor, asked_NT: Tensor) -> list[list[int]]:
    """Return targets one position after the other."""
    found = []
    for ids, asked in zip(ids_NT.tolist(), asked_NT.tolist(), strict=True):
        row = []
        for place in range(len(ids)):
            last = place + 1 == len(ids)
            row.append(IGNORED if last or not asked[place + 1] else ids[place + 1])
        found.append(row)
    return found


def test_targets_are_next_tokens_that_are_asked_for() -> None:
    ids_NT = torch.tensor([[7, 8, 9, 10]])
    asked_NT = torch.tensor([[True, True, False, True]])
    assert asked_targets(ids_NT, asked_NT).tolist() == [[8, IGNORED, 10, IGNORED]]
    assert asked_targets(ids_NT).tolist() == [[8, 9, 10, IGNORED]]


@given(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=24))
def test_targets_are_those_of_a_loop(pairs: list[tuple[int, bool]]) -> None:
    rows = [pairs, pairs[::-1]]
    ids_NT = torch.tensor([[token for token, _ in row] for row in rows])
    asked_NT = torch.tensor([[asked for _, asked in row] for row in rows])
    assert asked_targets(ids_NT, asked_NT).tolist() == by_loops(ids_NT, asked_NT)
    assert torch.equal(asked_targets(ids_NT, torch.ones_like(asked_NT)), next_tokens(ids_NT))


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_trained_on_as_before(bos: bool, tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.bos_token = "</s>"
    for loss in ("auto", "all"):
        rows = [PLAIN] * 40
        examples, found, windows = read(tmp_path / "a.jsonl", rows, tokenizer, loss, bos=bos)
        assert torch.equal(examples.ids_NT, windows.tokens)
        assert torch.equal(examples.targets_NT, next_tokens(windows.tokens))
        own = dict(found.record)
        assert own.pop("num_asked") == examples.targets_NT[:, :-1].numel()
        assert own == windows.record
        assert not any("leaves out" in notice for notice in found.notices)


@pytest.mark.parametrize("loss", ["auto", "assistant"])
def test_of_chats_only_what_an_assistant_said_is_asked_for(
    loss: Loss, tmp_path: Path, tokenizer: Any
) -> None:
    examples, _, windows = read(tmp_path / "a.jsonl", [CHAT] * 30, tokenizer, loss)
    asked_NT = examples.targets_NT != IGNORED
    assert asked_NT.any(dim=1).all()
    assert torch.equal(examples.targets_NT[asked_NT], next_tokens(examples.ids_NT)[asked_NT])
    said = tokenizer.convert_ids_to_tokens(examples.targets_NT[asked_NT].tolist())
    assert set(said) == {"X", "Y", "Z", "</s>"}
    assert said.count("X") > 10
    answer = torch.tensor(tokenizer("XYZ</s>").input_ids)  # nobody else says any of it
    speaks_N = torch.isin(windows.tokens[:, 1:], answer).any(dim=1)
    assert 0 < speaks_N.sum() < len(speaks_N)
    assert torch.equal(examples.ids_NT, windows.tokens[speaks_N])
    assert torch.equal(asked_NT[:, :-1], torch.isin(examples.ids_NT[:, 1:], answer))


def test_windows_that_ask_for_nothing_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    examples, found, windows = read(tmp_path / "a.jsonl", [CHAT] * 30, tokenizer, "auto")
    left_out, whole = len(windows.tokens) - len(examples.ids_NT), len(windows.tokens)
    (notice,) = [one for one in found.notices if "leaves out" in one]
    assert notice.startswith(f"recover leaves out {left_out} of {whole} windows, in which an")
    assert found.record["num_windows"] == len(examples.ids_NT) == len(found.tokens)
    assert found.record["tokens"] == token_hash(examples.ids_NT)
    assert found.record["num_asked"] == int((examples.targets_NT != IGNORED).sum())


def test_without_the_wish_chats_are_trained_on_whole(tmp_path: Path, tokenizer: Any) -> None:
    examples, _, windows = read(tmp_path / "a.jsonl", [CHAT] * 30, tokenizer, "all")
    assert torch.equal(examples.ids_NT, windows.tokens)
    assert torch.equal(examples.targets_NT, next_tokens(windows.tokens))
    assert RecoverStep().loss == "auto"


def test_a_mix_asks_for_all_of_plain_text_and_the_answers_of_chats(
    tmp_path: Path, tokenizer: Any
) -> None:
    mixed = tmp_path / "plain.jsonl"
    mixed.write_text("".join(json.dumps({"text": "QQ QQ QQ"}) + "\n" for _ in range(99)))
    rows = [CHAT] * 30
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = {"data": f"{mixed}:1,{tmp_path / 'chats.jsonl'}:1", "num_samples": 40}
    steps = [{"prune": {"sparsity": 0.5}}]
    recipe = build({"model": "owner/name", "steps": steps, "calibration": calibration})
    q = tokenizer.convert_tokens_to_ids("Q")
    found = {}
    for loss in ("auto", "assistant"):
        examples, _ = read_examples(recipe, tokenizer, seq_len=16, loss=loss)
        is_plain_N = (examples.ids_NT == q).any(dim=1)
        found[loss] = is_plain_N.sum().item()
        asked_NT = examples.targets_NT != IGNORED
        assert asked_NT[is_plain_N][:, :-1].all()
        assert (asked_NT[~is_plain_N].sum(dim=1) < 15).all()
    assert found == {"auto": 20, "assistant": 0}


@pytest.mark.parametrize("rows", [[PLAIN] * 40, [{"messages": CHAT["messages"][:1]}] * 20])
def test_a_text_in_which_no_assistant_speaks_is_refused(
    rows: Any, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(RecipeError, match=r"^recover\.loss: .* in 0 of \d+ windows.*loss=all\.$"):
        read(tmp_path / "a.jsonl", rows, tokenizer, "assistant")


def test_notices_speak_of_the_training(tmp_path: Path, tokenizer: Any) -> None:
    refused = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
    _, found, _ = read(tmp_path / "a.jsonl", [CHAT, refused] * 5, tokenizer, "all")
    assert len(found.notices) == 2
    assert any(notice.startswith("recover trains on ") for notice in found.notices)
    assert any(notice.startswith("recover leaves out 5 of 10 conv") for notice in found.notices)
    assert not any("calibration" in notice for notice in found.notices)


def test_reading_twice_gives_the_same_examples(tmp_path: Path, tokenizer: Any) -> None:
    rows = [CHAT, CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}] * 10
    one, _, _ = read(tmp_path / "a.jsonl", rows, tokenizer, "auto")
    two, _, _ = read(tmp_path / "b.jsonl", rows, tokenizer, "auto")
    assert torch.equal(one.ids_NT, two.ids_NT) and torch.equal(one.targets_NT, two.targets_NT)
    assert one.num_held == two.num_held == max(1, len(one.ids_NT) // 16)
    assert [one.of_step(step, 4) for step in range(9)] == [two.of_step(s, 4) for s in range(9)]
    assert set(one.held).isdisjoint(index for step in range(9) for index in one.of_step(step, 4))


def test_every_pass_reads_each_window_once() -> None:
    examples = examples_of(torch.arange(40).view(10, 4), seed=1)
    assert len(examples) == 9 and list(examples.held) == [9]
    drawn = [index for step in range(6) for index in examples.of_step(step, 3)]
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == list(range(9))
    assert drawn[:9] != drawn[9:]


def test_a_window_that_asks_for_nothing_costs_nothing() -> None:
    logits_BTV = torch.randn(1, 5, 7, requires_grad=True)
    targets_BT = torch.full((1, 5), IGNORED)
    loss = next_token_loss(logits_BTV, targets_BT)
    loss.backward()
    assert loss == 0 and logits_BTV.grad is not None and not logits_BTV.grad.any()
    hidden = [torch.randn(1, 5, 3)]
    assert normalized_mse(hidden, [hidden[0] + 1], targets_BT) == 0
    assert topk_kl(logits_BTV, strongest(torch.randn(1, 5, 7), 3), targets_BT) == 0


def test_text_seen_in_training_is_warned_of_as_such() -> None:
    progress = Progress("quiet")
    text = torch.arange(640).view(10, 64)
    assert leaked_share(text[:5], text, progress, what="training", flag="--data") == 0.5
    assert leaked_share(text[:5], text, progress) == 0.5
    first, second = progress.warnings
    assert "50.0 % of the evaluation text is in the training text" in first
    assert "Choose another --data, or" in first
    assert "in the calibration text" in second and "Choose another --calib, or" in second
