"""What the columns of a source's row say: a prompt, in one of several layouts, and references.

    messages                  a conversation that ends with what a user says
    prompt                    raw text, which gets no template
    instruction [, input]     a task, and what it is about

`id` is optional, and `reference` may be a string or a list of them. Every error names file, row (a line of JSONL, else
counted from 1) and column.

A new layout (ShareGPT's `conversations`, say) is a function from a row to its Content and an entry in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dpkd_offline.common.errors import DataError
from dpkd_offline.prompts.sources import Row, text_in

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Content:
    """What a row says, before any template: messages, instruction and input, or raw text."""

    kind: Literal["messages", "instruction", "prompt"]
    messages: list[dict[str, str]]
    instruction: str = ""
    input: str = ""


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


def _messages(row: Row) -> Content:
    messages = conversation(row, "messages")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{row.place}: column 'messages' must end with what a user says")
    return Content("messages", messages)


def _raw_text(row: Row) -> Content:
    return Content("prompt", [], _filled_text(row, "prompt"))


def _instruction(row: Row) -> Content:
    instruction, context = _filled_text(row, "instruction").strip(), (text_in(row, "input") or "").strip()
    message = f"{instruction}\n\n{context}" if context else instruction
    return Content("instruction", [{"role": "user", "content": message}], instruction, context)


def _filled_text(row: Row, column: str) -> str:
    text = text_in(row, column)
    if text is None or not text.strip():
        raise DataError(f"{row.place}: column '{column}' is empty")
    return text


# By the column that a row of the layout has. Of a row that has several, the first counts.
LAYOUTS: dict[str, Callable[[Row], Content]] = {
    "messages": _messages,
    "prompt": _raw_text,
    "instruction": _instruction,
}


def content_of(row: Row) -> Content:
    """What a row says; a DataError where it has none of the layouts, or a column holds something else."""
    for column, content in LAYOUTS.items():
        if row.columns.get(column) is not None:
            return content(row)
    if "instruction" in row.columns:
        return _instruction(row)  # which says that it is empty
    others = ", ".join(f"or '{column}'" for column in LAYOUTS if column != "instruction")
    raise DataError(f"{row.place}: column 'instruction' is missing ({others})")


def references_in(row: Row) -> list[str]:
    """The references of a row that say anything; a DataError where the column holds something else."""
    value = row.columns.get("reference")
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{row.place}: column 'reference' must be a string or a list of strings")
    return [v for v in values if v.strip()]
