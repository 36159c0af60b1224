"""What an assistant said is found in conversations of every usual template, or not claimed."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from llmprune.calibration import windows as module
from llmprune.calibration.chat import Chats
from llmprune.calibration.mix import Loss, Windows, read_windows
from llmprune.calibration.turns import Said, asked_tokens, only_said, said_spans
from llmprune.calibration.windows import token_ids, tokenize_asked, tokenize_windows
from llmprune.recipe import build
from tests.conftest import pico_tokenizer

CHATML = """{%- for m in messages %}{{ '<s>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n<call>' + call.function.name }}{% endfor %}
{{- '</s>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
BLOCKS = """{%- for m in messages %}{{ '<s>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}
{%- else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
SPACED = BLOCKS.replace("m.content + '</s>' }}{% end", "m.content + '</s>\n' }}{% end")
NO_PROMPT = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<s>[I] ' + m.content + ' [/I]' }}
{%- else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"""
END_ONCE = """{{- bos_token }}{% for m in messages %}
{{- '<' + m.role[0] + '>' + m.content }}{% endfor %}{{ eos_token }}"""
# a thought is written in the last turn, and left out of it once another turn follows
THOUGHTS = """{%- for m in messages %}{{ '<s>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '-' + (m.thought or '') + '-\n' }}{% endif %}
{{- m.content + '</s>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"""
# what the system says is written with the last question
MOVED = """{%- for m in messages[1:] %}{%- if m.role == 'user' %}
{{- '[I] ' + (messages[0].content + ' ' if loop.last else '') + m.content + ' [/I]' }}
{%- else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"""
# what follows an answer depends on how long that is
MEASURED = END_ONCE.replace(
    "{{ eos_token", "{{ '?' if messages[1].content | length > 1 else '!' }}{{ eos_token"
)
FORETOLD = "{{ '?' if messages[1].content | length > 1 else '!' }}" + END_ONCE
# the prompt begins a thought, and answers are written without
BEGUN = CHATML.replace("'<s>assistant\n'", "'<s>assistant\n-'")
REVERSED = END_ONCE.replace("in messages", "in messages | reverse")
# a call of a tool hides what is said beside it
CALL_ALONE = CHATML.replace("m.content }}", "('' if m.tool_calls else m.content) }}")
# an answer is written as a part of the next question
WOVEN = """{%- for m in messages %}{{ '<' + m.role + '>' }}
{%- if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML, "blocks": BLOCKS, "no prompt": NO_PROMPT, "end once": END_ONCE,
    "thoughts": THOUGHTS,
}  # fmt: skip
ENDS = {"no prompt": " </s>", "end once": ""}  # of a turn that another follows

ASKED = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
AGAIN = [*ASKED, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}]
SYSTEM = [{"role": "system", "content": "be kind"}, *AGAIN]
CALLED = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "take care"},
]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """Return the small tokenizer, one token per character but for its marks, with a template."""
    tokenizer = pico_tokenizer()
    marks = [AddedToken(mark, special=True) for mark in ("<s>", "<u>", "<a>")]
    tokenizer.add_special_tokens({"bos_token": marks[0], "additional_special_tokens": marks[1:]})
    tokenizer.chat_template = template
    return tokenizer


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """Return the bundled tokenizer, of bytes in several."""
    return PreTrainedTokenizerFast.from_pretrained(str(resources.files("llmprune") / "demo/model"))


def said(messages: list[dict[str, Any]], tokenizer: Any) -> list[str] | None:
    """Return what is found to be said."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = said_spans(text, messages, tokenizer)
    return None if spans is None else [text[start:end] for start, end in spans]


def marked(messages: list[dict[str, Any]], tokenizer: Any) -> str:
    text = Chats(tokenizer, marks=True).text(messages, what="it", key="k")
    assert text is not None
    return text


def asked_text(ids: Any, asked: Any, tokenizer: Any) -> str:
    """Return the tokens that are asked for as text."""
    return "".join(tokenizer.convert_ids_to_tokens(torch.as_tensor(ids)[asked].tolist()))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, ASKED, ["good day</s>"]),
        (CHATML, SYSTEM, ["good day</s>", "so long</s>"]),
        (CHATML, CALLED, ["\n<call>look</s>", "take care</s>"]),
        (CHATML, SYSTEM[:-1], ["good day</s>"]),
        (CHATML, AGAIN[1:], ["good day</s>", "so long</s>"]),
        (CHATML, ASKED[:1], []),
        (BLOCKS, SYSTEM, ["good day</s>", "so long</s>"]),
        (SPACED, SYSTEM, ["good day</s>", "so long</s>"]),
        (NO_PROMPT, AGAIN, ["good day </s>", "so long </s>"]),
        (END_ONCE, AGAIN, ["good day", "so long</s>"]),
        (THOUGHTS, AGAIN, ["good day</s>", "--\nso long</s>"]),
        (MOVED, SYSTEM[:-1], ["good day</s>"]),
        (CALL_ALONE, CALLED, ["\n<call>look</s>", "take care</s>"]),
        (WOVEN, ASKED, ["good day"]),
        (WOVEN, AGAIN, None),
        (MEASURED, ASKED, None),
        (FORETOLD, ASKED, None),
        (BEGUN, AGAIN, ["good day</s>", "so long</s>"]),
        (REVERSED, AGAIN, None),
    ],
)  # fmt: skip
def test_what_was_said_is_found_with_what_ends_the_turn(
    template: str, messages: Any, expected: list[str] | None
) -> None:
    assert said(messages, tokenizer_with(template)) == expected


def test_a_thought_belongs_to_what_is_said() -> None:
    messages = [*AGAIN[:-1], AGAIN[-1] | {"thought": "why"}]
    assert said(messages, tokenizer_with(THOUGHTS)) == ["good day</s>", "-why-\nso long</s>"]


def test_a_thought_left_out_of_the_content_does_not_mislead() -> None:
    template = CHATML.replace("m.content }}", "(m.content.split('|')[-1] if m.content) }}")
    messages = [*ASKED[:1], {"role": "assistant", "content": "hm|good day"}, *AGAIN[2:]]
    assert said(messages, tokenizer_with(template)) == ["good day</s>", "so long</s>"]


def test_a_text_that_cannot_be_written_again_claims_nothing() -> None:
    tokenizer = tokenizer_with("{{ messages | length }}")
    assert said(ASKED, tokenizer) is None
    tokenizer = tokenizer_with(BLOCKS)
    assert said_spans("another text " * 9, ASKED, tokenizer) is None


def test_a_tokenizer_without_characters_claims_nothing() -> None:
    class Slow:
        is_fast = False

    assert said_spans("good day", ASKED, Slow()) is None


texts = st.text("abc dIs?", min_size=1, max_size=8).map(str.strip).filter(bool)
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(turns=turns, name=st.sampled_from(sorted(TEMPLATES)))
@settings(max_examples=60)
def test_asked_tokens_are_what_assistants_said(turns: list[tuple[str, str]], name: str) -> None:
    tokenizer = TOKENIZERS[name]
    pairs = [(("user", question), ("assistant", answer)) for question, answer in turns]
    messages = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    document = marked(messages, tokenizer)
    assert isinstance(document, Said)
    ids, asked = module._tokens(document, tokenizer, None)
    last = {"no prompt": " </s>"}.get(name, "</s>")
    answers = [answer + ENDS.get(name, "</s>") for _, answer in turns[:-1]]
    answers += [("--\n" if name == "thoughts" else "") + turns[-1][1] + last]
    assert asked_text(ids, torch.tensor(asked), tokenizer) == "".join(answers)
    assert ids == token_ids(str(document), tokenizer)


TOKENIZERS = {name: tokenizer_with(template) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("messages", [ASKED, SYSTEM, SYSTEM[:-1]])
def test_generation_blocks_give_the_mask_of_transformers(messages: Any) -> None:
    tokenizer = TOKENIZERS["blocks"]
    wishes = {"return_assistant_tokens_mask": True, "return_dict": True}
    theirs = tokenizer.apply_chat_template(messages, **wishes)
    ids, asked = module._tokens(marked(messages, tokenizer), tokenizer, None)
    assert ids == theirs["input_ids"]
    assert asked == [bool(mask) for mask in theirs["assistant_masks"]]


def by_characters(spans: list[tuple[int, int]], offsets: list[tuple[int, int]]) -> list[bool]:
    """Return what `asked_tokens` does where no token is without characters."""
    said = {place for start, end in spans for place in range(start, end)}
    return [bool(said & set(range(start, end))) for start, end in offsets]


@given(st.lists(st.integers(1, 4), max_size=20), st.lists(st.integers(0, 6), max_size=8))
def test_tokens_are_asked_for_by_their_characters(lengths: list[int], cuts: list[int]) -> None:
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()
    offsets = list(zip([0, *ends], ends, strict=False))
    borders = torch.tensor(cuts, dtype=torch.int64).cumsum(0).tolist()
    spans = [pair for pair in zip(borders[::2], borders[1::2], strict=False) if pair[0] < pair[1]]
    assert asked_tokens(spans, offsets) == by_characters(spans, offsets)


def test_characters_of_several_tokens_and_tokens_without_any() -> None:
    offsets = [(0, 1), (0, 1), (1, 1), (2, 4), (4, 4), (5, 6)]
    assert asked_tokens([(0, 4)], offsets) == [True, True, True, True, False, False]
    assert asked_tokens([(0, 1), (5, 9)], offsets) == [True, True, False, False, False, True]
    assert asked_tokens([(-5, -2)], offsets) == asked_tokens([], offsets) == [False] * 6


def test_bytes_of_a_character_are_asked_for_together() -> None:
    tokenizer = demo_tokenizer()
    text = "What a fine day! — “Très bien”, said she, \U0001f642 and smiled."
    start, end = text.index("“"), text.index(" and")
    ids, asked = module._tokens(Said(text, [(start, end)]), tokenizer, None)
    assert ids == token_ids(text, tokenizer)
    inside = [token for token, is_asked in zip(ids, asked, strict=True) if is_asked]
    assert tokenizer.decode(inside).strip() == text[start:end]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_windows_are_those_of_the_plain_text(name: str, bos: bool) -> None:
    tokenizer = TOKENIZERS[name]
    chats = [marked(messages, tokenizer) for messages in (ASKED, AGAIN)] * 9
    plain = [*chats, "some plain text"]
    wishes = {"num_samples": 6, "seq_len": 24, "seed": 3, "bos": bos}
    ids_NT, asked_NT, notice = tokenize_asked(plain, tokenizer, **wishes)
    theirs_NT, told = tokenize_windows([str(text) for text in plain], tokenizer, **wishes)
    assert torch.equal(ids_NT, theirs_NT) and notice == told
    assert asked_NT.shape == ids_NT.shape and asked_NT.dtype == torch.bool
    assert 0 < asked_NT.sum() < asked_NT.numel()
    assert not bos or not asked_NT[:, 0].any()


def test_every_window_asks_for_its_part_of_a_conversation() -> None:
    tokenizer = TOKENIZERS["chatml"]
    document = marked(AGAIN, tokenizer)
    ids, asked = module._tokens(document, tokenizer, None)
    wishes = {"num_samples": 99, "seq_len": 7, "seed": 0}
    ids_NT, asked_NT, _ = tokenize_asked([document], tokenizer, **wishes)
    rows = sorted(range(len(ids_NT)), key=lambda row: ids.index(ids_NT[row, 0].item()))
    places = [
        next(at for at in range(0, len(ids), 7) if ids[at : at + 7] == ids_NT[row].tolist())
        for row in rows
    ]
    assert sorted(places) == list(range(0, len(ids) - 6, 7))
    for row, place in zip(rows, places, strict=True):
        assert asked_NT[row].tolist() == asked[place : place + 7]


def test_an_end_of_text_belongs_to_plain_text_and_not_to_conversations() -> None:
    tokenizer = TOKENIZERS["chatml"]
    chat = marked(ASKED, tokenizer)
    for documents, expected in (
        ([chat, chat], "good day</s>good day</s>"),
        (["ab", "ab"], "ab</s>ab"),
        (list(only_said(["ab", chat, "ab"])), "good day</s>"),
    ):
        ids, asked = module._stream(documents, tokenizer, 999, bos=False)
        assert asked_text(ids, torch.tensor(asked), tokenizer) == expected


def test_a_bos_that_a_document_gives_up_leaves_the_others_in_place() -> None:
    tokenizer = TOKENIZERS["end once"]
    ids, asked = module._stream([marked(AGAIN, tokenizer)] * 2, tokenizer, 999, bos=True)
    assert tokenizer.bos_token_id not in ids and len(ids) == len(asked)
    assert asked_text(ids, torch.tensor(asked), tokenizer) == "good dayso long</s>" * 2


def test_pieces_of_a_long_conversation_know_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = demo_tokenizer()
    text = "she said that it was good and he " * 40
    document = Said(text, [(20, 290), (400, 1000)])
    whole = module._tokens(document, tokenizer, None)
    monkeypatch.setattr(module, "_PIECE", 120)
    assert module._tokens(document, tokenizer, None) == whole
    assert module._tokens(document, tokenizer, 50) == (whole[0][:50], whole[1][:50])


def read(path: Path, rows: list[dict[str, Any]], tokenizer: Any, loss: Loss) -> Windows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    calibration = {"data": str(path), "num_samples": 99}
    steps = [{"prune": {"sparsity": 0.5}}]
    recipe = build({"model": "owner/name", "steps": steps, "calibration": calibration})
    return read_windows(recipe, tokenizer, seq_len=8, loss=loss)


def test_a_file_is_asked_for_by_the_wish_and_read_alike(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]
    rows = [{"instruction": "hello", "output": "good day"}] * 8
    found = {wish: read(tmp_path / "a.jsonl", rows, tokenizer, wish) for wish in LOSSES}
    assert found["all"].asked is None
    for wish in ("auto", "assistant"):
        asked_NT = found[wish].asked
        assert torch.equal(found[wish].tokens, found["all"].tokens)
        assert asked_NT is not None
        assert set(asked_text(found[wish].tokens, asked_NT, tokenizer)) == set("good day</s>")
    plain = [{"text": "some plain text"}] * 8
    asked = {wish: read(tmp_path / "b.jsonl", plain, tokenizer, wish).asked for wish in LOSSES}
    assert asked["auto"] is not None and asked["auto"].all()
    assert asked["assistant"] is not None and not asked["assistant"].any()


LOSSES: tuple[Loss, ...] = ("all", "auto", "assistant")


def test_a_pair_without_a_template_is_plain_text(tmp_path: Path) -> None:
    rows = [{"instruction": "hello", "output": "good day"}] * 8
    asked_NT = read(tmp_path / "a.jsonl", rows, pico_tokenizer(), "auto").asked
    assert asked_NT is not None and asked_NT.all()


@pytest.mark.parametrize(("wish", "words"), [("auto", "all of"), ("assistant", "none of")])
def test_conversations_that_hide_who_speaks_are_counted(
    wish: Loss, words: str, tmp_path: Path
) -> None:
    tokenizer = tokenizer_with(WOVEN)
    rows = [{"messages": messages} for messages in (ASKED, AGAIN, AGAIN)]
    found = read(tmp_path / "a.jsonl", rows, tokenizer, wish)
    (notice,) = [one for one in found.notices if "not certain" in one]
    assert "in 2 of 3 conversations of" in notice and f"{words} their tokens" in notice
    assert read(tmp_path / "a.jsonl", rows, tokenizer, "all").notices == tuple(
        one for one in found.notices if one != notice
    )


def test_a_mix_keeps_what_is_asked_beside_its_windows(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]
    chats, plain = tmp_path / "chats.jsonl", tmp_path / "plain.txt"
    chats.write_text("".join(json.dumps({"messages": AGAIN}) + "\n" for _ in range(20)))
    plain.write_text("zz " * 400)
    calibration = {"data": f"{chats}:1,{plain}:1", "num_samples": 8}
    steps = [{"prune": {"sparsity": 0.5}}]
    recipe = build({"model": "owner/name", "steps": steps, "calibration": calibration})
    found = read_windows(recipe, tokenizer, seq_len=16, loss="auto")
    plainly = read_windows(recipe, tokenizer, seq_len=16)
    assert torch.equal(found.tokens, plainly.tokens) and plainly.asked is None
    assert found.asked is not None
    z = tokenizer.convert_tokens_to_ids("z")
    is_plain_N = (found.tokens == z).any(dim=1)
    assert is_plain_N.sum() == 4
    assert found.asked[is_plain_N].all()
    assert not found.asked[~is_plain_N].all(dim=1).any()
