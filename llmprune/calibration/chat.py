"""Conversations as text: through the chat template that the tokenizer brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.base.errors import RecipeError

COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))

_KEYS = (("role", "content"), ("from", "value"))  # those of templates, and those of ShareGPT
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

Message = dict[str, Any]


def messages_of(value: object) -> list[Message] | None:
    """Return a cell of a table as messages with role and content; None where it is no chat.

    >>> messages_of([{"from": "human", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hello'}]
    """
    if isinstance(value, Mapping):  # a column of structs that was turned into columns
        value = _rows(value)
    if not isinstance(value, list) or not value:
        return None
    for role, content in _KEYS:
        if all(isinstance(item, Mapping) and role in item and content in item for item in value):
            return [_message(item, role, content) for item in value]
    return None


def render(messages: list[Message], tokenizer: Any, *, what: str, key: str) -> str | None:
    """Return a conversation as the template writes it; None for one that the template refuses.

    Templates refuse roles that they do not know, or that do not take turns.

    Raises:
        RecipeError: there is no template; says what to do.
    """
    if not has_template(tokenizer):
        raise RecipeError(
            f"{key}: {what} holds chats, and there is no chat template to write them as text with. "
            "Give plain text, such as `--calib c4`, or the model with a tokenizer that has one "
            "(chat_template.jinja)."
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return None


def pair_text(question: str, answer: str, tokenizer: Any) -> str | None:
    """Return an instruction and its answer as a chat, or joined where there is no template."""
    if not has_template(tokenizer):
        return f"{question}\n\n{answer}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return render(turns, tokenizer, what="it", key="calibration.data")


def has_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def _message(item: Mapping[str, Any], role: str, content: str) -> Message:
    name = str(item[role]).lower()
    text = item[content]
    return {"role": _ROLES.get(name, name), "content": "" if text is None else text}


def _rows(columns: Mapping[str, Any]) -> object:
    lists = [value for value in columns.values() if isinstance(value, list)]
    if not lists or len(lists) < len(columns) or len({len(value) for value in lists}) != 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
