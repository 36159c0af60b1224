"""What an assistant said in a conversation: where in its text, and which tokens that is.

A template with generation blocks says it itself. For any other the conversation is written again
with parts of it left out or exchanged, and what stays the same tells where a message lies. Spans
are (start, end) in characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Span = tuple[int, int]
Message = dict[str, Any]
Write = Callable[..., str | None]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = ("0", "1")  # contents of one character, that no template takes apart


class Said(str):
    """The text of a conversation, which knows the spans that an assistant said."""

    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span]) -> Said:
        """Return the text with its spans."""
        found = super().__new__(cls, text)
        found.spans = tuple(spans)
        return found


def only_said(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents; of those that know no spans nothing counts as said."""
    for text in documents:
        yield text if isinstance(text, Said) else Said(text, ())


def said_spans(text: str, messages: Sequence[Message], tokenizer: Any) -> tuple[Span, ...] | None:
    """Return where in ``text``, the conversation as its template writes it, an assistant speaks.

    With each message goes what ends the turn, and no white space after that. None where it is not
    certain: where the template writes earlier turns otherwise once others follow, in a way that
    hides where they are, or where the tokenizer does not tell which characters a token is of.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    template = tokenizer.get_chat_template()
    if _GENERATION.search(template):
        return _checked(_generated(text, messages, template, tokenizer), text)

    def write(part: Sequence[Message], **wishes: bool) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(list(part), tokenize=False, **wishes))
        except Exception:  # a template is a program, and need not know parts of conversations
            return None

    places = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
    return _checked([_turn(text, messages, index, write) for index in places], text)


def asked_tokens(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Tell which tokens hold a character of a span, by the characters that each token is of.

    Tokens between two of a span are asked for too: some tokenizers know no characters for spaces.

    >>> asked_tokens([(3, 6)], [(0, 2), (2, 4), (5, 5), (4, 6), (6, 8)])
    [False, True, True, True, False]
    """
    asked = [False] * len(offsets)
    place = 0
    for start, end in spans:
        while place < len(offsets) and offsets[place][1] <= start:
            place += 1
        inside = place
        while inside < len(offsets) and offsets[inside][0] < end:
            inside += 1
        while inside > place and offsets[inside - 1][0] == offsets[inside - 1][1]:
            inside -= 1  # spaces after the last word
        asked[place:inside] = [True] * (inside - place)
    return asked


def _generated(
    text: str, messages: Sequence[Message], template: str, tokenizer: Any
) -> list[Span | None]:
    """Return what generation blocks wrote.

    `apply_chat_template` gives their tokens, but all to the end of the conversation where the last
    character of a block is in no token (transformers 5.23), so their characters are asked for.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # of a batch, though its annotation says otherwise
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    (written,), (spans,) = rendered
    if written != text:
        return [None]
    return [_without_space_at_end(text, span) for span in spans]


def _turn(text: str, messages: Sequence[Message], index: int, write: Write) -> Span | None:
    """Return where a message of the assistant lies, with what ends its turn.

    The conversation before it, with the prompt to speak, is where it begins; the conversation up to
    it where it ends. Where one is not as in the whole, its content is exchanged instead.
    """
    start = _prompt_end(text, messages[:index], write)
    closed = (write(messages[: index + 1]) or "").rstrip()
    if start is not None and text.startswith(closed) and len(closed) >= start:
        return start, len(closed)
    around = _around(messages, index, write)
    alone = _around(messages[: index + 1], index, write)
    if around is None or alone is None or not text.endswith(around[1]):
        return None
    if start is None and text.startswith(around[0]):
        start = len(around[0])
    end = len(text) - len(around[1])
    ending = alone[1].rstrip()
    if around[1].startswith(ending):  # otherwise it ends the conversation, and not the turn
        end += len(ending)
    return None if start is None else (start, end)


def _prompt_end(text: str, before: Sequence[Message], write: Write) -> int | None:
    """Return where the prompt to speak ends, for a template that writes one as in the whole."""
    prompt = write(before, add_generation_prompt=True)
    if prompt is None or prompt == write(before) or not text.startswith(prompt):
        return None
    return len(prompt)


def _around(messages: Sequence[Message], index: int, write: Write) -> tuple[str, str] | None:
    """Return what is written before and after the content of a message, whatever that is."""
    one, two = (
        write([*messages[:index], messages[index] | {"content": mark}, *messages[index + 1 :]])
        for mark in _MARKS
    )
    if one is None or two is None:
        return None
    differ = [place for place, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]]
    if len(one) != len(two) or len(differ) != 1:
        return None
    return one[: differ[0]], one[differ[0] + 1 :]


def _without_space_at_end(text: str, span: Span) -> Span:
    start, end = span
    return start, start + len(text[start:end].rstrip())


def _checked(spans: Sequence[Span | None], text: str) -> tuple[Span, ...] | None:
    """Return spans that hold something; none where one is not known or they are out of order."""
    known = [span for span in spans if span is not None]
    borders = [0, *(place for span in known for place in span), len(text)]
    if len(known) < len(spans) or borders != sorted(borders):
        return None
    return tuple(span for span in known if span[0] < span[1])
