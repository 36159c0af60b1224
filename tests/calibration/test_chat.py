"""Conversations become text through the template, once and with its special tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizerFast

from llmprune.base.errors import RecipeError
from llmprune.calibration.chat import Chats, messages_of
from llmprune.calibration.documents import open_text
from llmprune.calibration.mix import read_windows
from llmprune.calibration.windows import tokenize_windows
from llmprune.recipe import Portion, build
from tests.conftest import pico_tokenizer

ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
SHARED = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
RENDERED = "<s><u>hello<a>good day</s>"
TEMPLATE = """{{ bos_token }}{% for m in messages %}
{%- if m.role not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}
{{- '<' + m.role[0] + '>' + m.content }}{% endfor %}{{ eos_token }}"""


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    """Return the small tokenizer with a template, whose marks are special tokens."""
    tokenizer = pico_tokenizer()
    marks = [AddedToken(mark, special=True) for mark in ("<s>", "<u>", "<a>")]
    tokenizer.add_special_tokens({"bos_token": marks[0], "additional_special_tokens": marks[1:]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def documents(path: Path, rows: list[dict[str, Any]], tokenizer: Any, **part: str) -> list[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(open_text(Portion(data=str(path), **part)).documents(0, Chats(tokenizer)))


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        (ASKED, ASKED),
        (SHARED, ASKED),
        ({"role": ["user"], "content": ["hello"]}, ASKED[:1]),
        ([{"role": "tool", "content": None}], [{"role": "tool", "content": ""}]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
                }
            ],
            ASKED[:1],
        ),
        (
            [{"role": "assistant", "tool_calls": [1], "name": None}],
            [{"role": "assistant", "content": "", "tool_calls": [1]}],
        ),
        ([], None),
        ("hello", None),
        (["hello"], None),
        ([{"role": "user"}], None),
        ({"role": ["user"], "content": []}, None),
        ({"a": 1}, None),
    ],
)
def test_messages_are_known_in_the_usual_forms(value: object, messages: object) -> None:
    assert messages_of(value) == messages


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("chat", [ASKED, SHARED])
def test_a_column_of_chats_goes_through_the_template(
    column: str, chat: Any, chatty: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": "hello", column: chat}]
    assert documents(tmp_path / "a.jsonl", rows, chatty) == [RENDERED]


def test_a_column_asked_for_may_hold_chats(chatty: Any, tmp_path: Path) -> None:
    rows = [{"text": "plain", "turns": None}, {"text": "plain", "turns": ASKED}]
    assert documents(tmp_path / "a.jsonl", rows, chatty, column="turns") == [RENDERED]


def test_chats_need_a_template(tmp_path: Path) -> None:
    for tokenizer in (pico_tokenizer(), None):
        with pytest.raises(RecipeError, match=r"^calibration\.data: .*messages.*`--calib c4`"):
            documents(tmp_path / "a.jsonl", [{"messages": ASKED}], tokenizer)


def test_conversations_that_the_template_refuses_are_left_out(chatty: Any, tmp_path: Path) -> None:
    refused = [{"role": "critic", "content": "no"}]
    rows = [{"messages": refused}, {"messages": ASKED}]
    assert documents(tmp_path / "a.jsonl", rows, chatty) == [RENDERED]
    with pytest.raises(
        RecipeError, match=r"^calibration\.data: none of .* template: no such role\."
    ):
        documents(tmp_path / "b.jsonl", [{"messages": refused}], chatty)


def test_those_left_out_are_counted_and_the_reason_is_said(chatty: Any, tmp_path: Path) -> None:
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    rows = [{"messages": ASKED}] * 6 + [{"messages": picture}] * 2
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    calibration = {"data": str(path), "num_samples": 4}
    steps = [{"prune": {"sparsity": 0.5}}]
    recipe = build({"model": "owner/name", "steps": steps, "calibration": calibration})
    (notice,) = read_windows(recipe, chatty, seq_len=16).notices
    assert "leaves out 2 of 8 conversations" in notice and "is list, not text" in notice


@pytest.mark.parametrize("template", ["{{ messages[0].content + 3 }}", "{{ 1 / 0 }}", "{% if"])
def test_a_template_that_fails_is_told_from_a_text_that_is_empty(
    template: str, tmp_path: Path
) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(RecipeError, match="can be written with this tokenizer's chat template"):
        documents(tmp_path / "a.jsonl", [{"messages": ASKED}], tokenizer)


def test_a_template_that_refuses_all_does_not_read_all(chatty: Any) -> None:
    chats, refused = Chats(chatty), [{"role": "critic", "content": "no"}]
    for _ in range(99):
        assert chats.text(refused, what="it", key="k") is None
    with pytest.raises(RecipeError, match="none of the first 100 conversations of it"):
        chats.text(refused, what="it", key="k")
    chats = Chats(chatty)
    chats.text(ASKED, what="it", key="k")
    assert [chats.text(refused, what="it", key="k") for _ in range(200)] == [None] * 200


def test_a_conversation_without_messages_is_no_text(chatty: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "messages": value} for value in ([], ASKED, [])]
    assert documents(tmp_path / "a.jsonl", rows, chatty) == [RENDERED]


def test_a_question_and_its_answer_are_a_chat_where_there_is_a_template(chatty: Any) -> None:
    place = {"what": "it", "key": "calibration.data"}
    assert Chats(chatty).pair("hello", "good day", **place) == RENDERED
    assert Chats(pico_tokenizer()).pair("hello", "good day", **place) == "hello\n\ngood day"


@pytest.mark.parametrize("bos", [False, True])
def test_marks_are_special_tokens_and_none_is_doubled(bos: bool, chatty: Any) -> None:
    windows, _ = tokenize_windows(
        [RENDERED] * 20, chatty, num_samples=4, seq_len=32, seed=0, bos=bos
    )
    for row in windows.tolist():
        tokens = chatty.convert_ids_to_tokens(row)
        assert "<u>" in tokens and "<a>" in tokens
        pairs = list(itertools.pairwise(tokens))
        assert ("<s>", "<s>") not in pairs and ("</s>", "</s>") not in pairs
        assert tokens.count("<s>") == (1 if bos else sum(a == "</s>" for a, b in pairs))
        assert not bos or tokens[0] == "<s>"
