"""Conversations as text: through the chat template that the tokenizer brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmprune.base.errors import RecipeError
from llmprune.calibration.turns import Message, Said, said_spans

COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"))

_HOPELESS = 100  # conversations refused from the start, before reading on is given up
_KEYS = (("role", "content"), ("from", "value"))  # those of templates, and those of ShareGPT
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


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
        said = (content, "tool_calls")  # a call of a tool may say nothing beside
        if all(isinstance(m, Mapping) and role in m and any(k in m for k in said) for m in value):
            return [_message(item, role, content) for item in value]
    return None


@dataclass
class Chats:
    """Writes conversations by the template of a tokenizer, and counts those that it cannot write.

    Templates refuse roles that they do not know, or that do not take turns; some fail otherwise.
    With ``marks`` the text knows what an assistant said, but for `num_unmarked` of those written.
    """

    tokenizer: Any = None
    marks: bool = False
    num_written: int = 0
    num_refused: int = 0
    num_unmarked: int = 0
    reason: str = ""  # of the last refusal

    @property
    def has_template(self) -> bool:
        """Tell whether the tokenizer brings a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text(self, messages: list[Message], *, what: str, key: str) -> str | None:
        """Return a conversation as the template writes it; None for one that it refuses.

        Raises:
            RecipeError: there is no template, or it refuses the first hundred.
        """
        if not self.has_template:
            raise RecipeError(
                f"{key}: {what} holds chats, and there is no chat template to write them as text "
                "with. Give plain text, such as `--calib c4`, or the model with a tokenizer that "
                "has one (chat_template.jinja)."
            )
        try:
            _check_content(messages)
            found = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template is a program, and fails as programs do
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = lines[0][:200].rstrip(".")
            self.num_refused += 1
            if self.num_refused == _HOPELESS and not self.num_written:
                raise self.refused(what, key) from error
            return None
        self.num_written += 1
        return self._marked(found, messages) if self.marks else found

    def pair(self, question: str, answer: str, *, what: str, key: str) -> str | None:
        """Return an instruction and its answer as a chat, or joined where there is no template."""
        if not self.has_template:
            return f"{question}\n\n{answer}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.text(turns, what=what, key=key)

    def _marked(self, text: str, messages: list[Message]) -> str:
        """Return the text of a conversation with what an assistant said, where that is certain."""
        spans = said_spans(text, messages, self.tokenizer)
        if spans is None:
            self.num_unmarked += 1
            return text
        return Said(text, spans)

    def refused(self, what: str, key: str) -> RecipeError:
        """Return what to raise where no conversation could be written."""
        return RecipeError(
            f"{key}: none of the first {self.num_refused} conversations of {what} can be written "
            f"with this tokenizer's chat template: {self.reason}. Give conversations that it "
            "knows, or plain text."
        )


def _check_content(messages: list[Message]) -> None:
    for message in messages:
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"the content of a message is {kind}, not text")


def _message(item: Mapping[str, Any], role: str, content: str) -> Message:
    """Return a message in the templates' words; what else it says, such as tool calls, stays."""
    name = str(item[role]).lower()
    known = {"role": _ROLES.get(name, name), "content": _plain(item.get(content))}
    return {k: v for k, v in item.items() if v is not None and k not in (role, content)} | known


def _plain(content: object) -> object:
    """Return the content of a message as text, where it is a list of texts or missing."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") if part.get("type") == "text" else None for part in content]
        return "".join(map(str, texts)) if None not in texts else content
    return content


def _rows(columns: Mapping[str, Any]) -> object:
    lists = [value for value in columns.values() if isinstance(value, list)]
    if not lists or len(lists) < len(columns) or len({len(value) for value in lists}) != 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
