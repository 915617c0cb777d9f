"""What the columns of a row say: messages, instruction and input, or raw text; and references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpkd_offline.common.errors import DataError
from dpkd_offline.prompts.sources import Row, text_in

ROLES = ("system", "user", "assistant")


def conversation(row: Row, column: str) -> list[dict[str, str]]:
    """The messages in a column, each with a role and a content, or a DataError."""
    messages = row.columns[column]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.place}: column '{column}' must be a list of at least one message")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"{row.place}: column '{column}' needs a role of {', '.join(ROLES)} and a string content")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _messages(row: Row) -> list[dict[str, str]]:
    messages = conversation(row, "messages")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{row.place}: column 'messages' must end with what a user says")
    return messages


def references_in(row: Row) -> list[str]:
    value = row.columns.get("reference")
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{row.place}: column 'reference' must be a string or a list of strings")
    return [v for v in values if v.strip()]


@dataclass(frozen=True)
class Content:
    """What a row says, before any template: messages, instruction and input, or raw text."""

    kind: Literal["messages", "instruction", "prompt"]
    messages: list[dict[str, str]]
    instruction: str = ""
    input: str = ""


def content_of(row: Row) -> Content:
    if row.columns.get("messages") is not None:
        return Content("messages", _messages(row))
    kind: Literal["instruction", "prompt"] = "prompt" if row.columns.get("prompt") is not None else "instruction"
    if kind not in row.columns:
        raise DataError(f"{row.place}: column 'instruction' is missing (or 'messages', or 'prompt')")
    text = text_in(row, kind)
    if text is None or not text.strip():
        raise DataError(f"{row.place}: column '{kind}' is empty")
    if kind == "prompt":
        return Content(kind, [], text)
    context = (text_in(row, "input") or "").strip()
    said = f"{text.strip()}\n\n{context}" if context else text.strip()
    return Content(kind, [{"role": "user", "content": said}], text.strip(), context)
