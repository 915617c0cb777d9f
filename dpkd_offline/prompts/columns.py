"""What the columns of a source's row say: a prompt, in one of the layouts that people have, and references.

LAYOUTS has the layouts, each under the column that holds its prompt. `id` is optional in each of them. Every error
names file, row (a line of JSONL or CSV, else counted from 1) and column.

A new layout is an entry in LAYOUTS, and a function from a row and that column to its Content where it is no other's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import ColumnName
from dpkd_offline.prompts.conversations import (
    NO_VISION,
    Turn,
    conversation,
    is_plain,
    text_of,
    tools_in,
    unread_keys,
)
from dpkd_offline.prompts.sources import Row, text_in

SYSTEM = ("system", "system_prompt")  # columns, of which a row has one
REFERENCES = (
    "reference",
    "references",
    "output",
    "response",
    "answer",
    "completion",
)  # the first that says anything counts
TEACHER_MESSAGES = "teacher_messages"  # a column: the conversation as the teacher sees it, and no student
TOOLS = ("tools", "functions")  # columns, of which a row has one
SEEN = ("images", "image", "videos", "video", "audios", "audio")  # columns of what is no text
CONVERSATIONS = ("messages", "conversations", "conversation", TEACHER_MESSAGES)  # columns that hold nothing else


@dataclass(frozen=True)
class Content:
    """What a row says, before any template: messages, instruction and input, or raw text."""

    kind: Literal["messages", "instruction", "prompt"]
    messages: list[Turn]  # what a chat template is given, and with it:
    instruction: str = ""
    input: str = ""
    references: list[str] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    answer: Turn | None = None  # the assistant's last turn, where it calls tools: the template writes that reference
    needs_chat: str = "messages"  # the column that only a chat template can render
    columns: tuple[str, ...] = ()  # of the row, which say this
    unused: tuple[str, ...] = ()  # those that hold text, too, and are not read

    @property
    def text_messages(self) -> list[dict[str, str]]:
        """The conversation for people: roles and text."""
        return text_of(self.messages, self.tools)

    @property
    def conversation(self) -> str | None:
        """What a template was given, as JSON, where roles and text do not say it all."""
        if is_plain(self.messages) and not self.tools and self.answer is None:
            return None
        parts = {"messages": self.messages, "tools": self.tools, "answer": self.answer}
        return json.dumps({key: value for key, value in parts.items() if value}, ensure_ascii=False)

    @classmethod
    def of_conversation(cls, text: str) -> Content:
        """The inverse of `conversation`."""
        parts = json.loads(text)
        return cls("messages", parts["messages"], tools=parts.get("tools", []), answer=parts.get("answer"))


@dataclass(frozen=True)
class Layout:
    """How rows say a prompt in one column, and what belongs to it in others."""

    form: str  # of that column, for people
    content: Callable[[Row, str], Content]
    context: tuple[str, ...] = ()  # what the task is about; the first that says anything counts
    references: tuple[str, ...] = REFERENCES


def with_turns_listed(row: Row, columns: Sequence[str]) -> Row:
    """A row in which a column that holds one message holds a list of it."""
    single = {name: [row.columns[name]] for name in columns if isinstance(row.columns.get(name), dict)}
    return replace(row, columns=row.columns | single)


def with_conversations_read(row: Row) -> Row:
    """A row in which a conversation that a table of text holds as JSON is one."""
    texts = {name: row.columns[name] for name in CONVERSATIONS if isinstance(row.columns.get(name), str)}
    read = {}
    for name, text in texts.items():
        if not text.strip():
            continue
        try:
            read[name] = json.loads(text)
        except (ValueError, RecursionError):
            fault = f"{row.place}: column '{name}' is text, and no JSON of a list of messages"
            return replace(row, fault=DataError(f"{fault}; in a table of text, write it as json.dumps does"))
    return replace(row, columns=row.columns | read) if read else row


def _messages(row: Row, column: str) -> Content:
    """A conversation. Where the assistant has the last word, that is a reference."""
    turns, answer = conversation(row, column), None
    if turns[-1]["role"] == "assistant":
        *turns, answer = turns
    last = turns[-1] if turns else {"role": "nobody", "content": ""}
    if last["role"] not in ("user", "tool") or (last["role"] == "user" and not last["content"].strip()):
        raise DataError(
            f"{row.place}: column '{column}' must end with what a user or a tool says, or with the answer to that"
        )
    reference = text_of([answer])[0]["content"] if answer else ""
    return Content(
        "messages",
        turns,
        references=[reference] if reference.strip() else [],
        answer=answer if answer and "tool_calls" in answer else None,
        needs_chat=column,
    )


def teacher_content(row: Row) -> Content | None:
    """What the teacher is asked, where a row says it in a column of its own."""
    return None if row.columns.get(TEACHER_MESSAGES) is None else _messages(row, TEACHER_MESSAGES)


def _prompt(row: Row, column: str) -> Content:
    """Raw text, or a conversation, as TRL has it."""
    if isinstance(row.columns[column], list):
        return _messages(row, column)
    return Content("prompt", [], _filled_text(row, column))


def _task(row: Row, column: str) -> Content:
    return Content("instruction", [], _filled_text(row, column).strip())


def _definition(row: Row, column: str) -> Content:
    """Super-NaturalInstructions', which is a list of one string."""
    if not isinstance(lines := row.columns[column], list):
        return _task(row, column)
    if not all(isinstance(line, str) for line in lines):
        raise DataError(f"{row.place}: column '{column}' must be a string or a list of strings")
    return _task(Row(row.place, {column: "\n".join(lines)}), column)


def _filled_text(row: Row, column: str) -> str:
    text = text_in(row, column)
    if text is None or not text.strip():
        raise DataError(f"{row.place}: column '{column}' is empty")
    return text


# By the column that holds the prompt. Of a row that has several, the first counts.
LAYOUTS: dict[str, Layout] = {
    "messages": Layout("messages", _messages),
    "prompt": Layout("raw text, or messages", _prompt),
    "instruction": Layout("a task", _task, context=("input", "context")),
    "conversations": Layout("messages", _messages),
    "conversation": Layout("messages", _messages),
    "question": Layout("a task", _task, context=("context", "input")),
    "Definition": Layout("a task", _definition, context=("Input",), references=("reference", "Output")),
    "definition": Layout(
        "a task", _definition, context=("input", "inputs"), references=("reference", "output", "targets")
    ),
}


def content_of(row: Row, beside: Sequence[str] = ()) -> Content:
    """What a row says; a DataError where it has none of the layouts, or a column holds something else.

    Args:
        beside: columns that are read for something else.
    """
    column = _prompt_column(row)
    layout = LAYOUTS[column]
    if seen := [name for name in SEEN if _holds_any(row.columns.get(name))]:
        raise DataError(f"{row.place}: column '{seen[0]}': {NO_VISION}")
    content, used = layout.content(row, column), [column]
    if content.kind == "instruction":
        content = _with_context(row, content, layout.context, used)
    content = _with_tools(row, _with_system(row, content, column, used), column, used)
    content = replace(content, references=[*_references(row, layout.references, used), *content.references])
    return replace(content, columns=tuple(used), unused=_unused(row, column, content, {"id", *TOOLS, *used, *beside}))


def _unused(row: Row, column: str, content: Content, used: set[str]) -> tuple[str, ...]:
    """The columns that hold text and are not read, and such keys of the messages in `column`."""
    names = [name for name, value in (row.unread | row.columns).items() if name not in used and _holds_text(value)]
    turns = row.columns[column] if content.kind == "messages" else None
    keys = unread_keys(turns if isinstance(turns, list) else [])
    return (*names, *(f"{column}.{key}" for key, values in keys.items() if any(map(_holds_text, values))))


def _prompt_column(row: Row) -> str:
    present = [column for column in LAYOUTS if column in row.columns]
    if not present:
        others = ", ".join(f"'{column}'" for column in LAYOUTS if column != "instruction")
        raise DataError(
            f"{row.place}: column 'instruction' is missing, or one of {others}; the row has {_names(row)}; say which "
            f"is what, as in --columns instruction=NAME,reference=NAME"
        )
    return next((column for column in present if row.columns[column] not in (None, "", [])), present[0])


def _names(row: Row) -> str:
    return ", ".join(f"'{name}'" for name in list(row.columns)[:10]) or "no column"


def _with_context(row: Row, content: Content, names: Sequence[str], used: list[str]) -> Content:
    name, context = _first_text(row, names)
    used += [name] if context else []
    message = f"{content.instruction}\n\n{context}" if context else content.instruction
    return replace(content, input=context, messages=[{"role": "user", "content": message}])


def _with_system(row: Row, content: Content, column: str, used: list[str]) -> Content:
    """A system turn in front, where a column says one."""
    name, system = _first_text(row, SYSTEM)
    if not system:
        return content
    used.append(name)
    if content.kind == "prompt":
        raise DataError(
            f"{row.place}: column '{name}' beside '{column}', which is raw text and takes no system turn; "
            f"--columns instruction={column},system={name} makes a conversation of them"
        )
    first = content.messages[0]
    if first["role"] == "system" and first["content"].strip() != system:
        raise DataError(f"{row.place}: column '{name}' says something else than the system turn in '{column}'")
    return with_system(content, system, name)


def with_system(content: Content, system: str, column: str) -> Content:
    """A system turn in front of a conversation that has none; `column` is what says it."""
    if content.messages[0]["role"] == "system":
        return content
    begun = [{"role": "system", "content": system}, *content.messages]
    return replace(content, kind="messages", messages=begun, instruction="", input="", needs_chat=column)


def without_system(content: Content, system: str | None) -> Content:
    """A conversation without its system turn, where that says what `system` does."""
    first = content.messages[0]
    return replace(content, messages=content.messages[1:]) if first["content"] == system else content


def _with_tools(row: Row, content: Content, column: str, used: list[str]) -> Content:
    """What the model may call, where a column says it."""
    name = next((name for name in TOOLS if row.columns.get(name)), TOOLS[0])
    tools = tools_in(row.columns.get(name), f"{row.place}: column '{name}'")
    if not tools:
        return content
    used.append(name)
    if content.kind == "prompt":
        raise DataError(
            f"{row.place}: column '{name}' beside '{column}', which is raw text and takes no tools; "
            f"--columns instruction={column},tools={name} makes a conversation of them"
        )
    return replace(content, kind="messages", tools=tools, instruction="", input="", needs_chat=name)


def _first_text(row: Row, names: Sequence[str]) -> tuple[str, str]:
    """The first of some columns that says anything, and what; no text where none does."""
    for name in names:
        if text := (text_in(row, name) or "").strip():
            return name, text
    return "", ""


def _references(row: Row, names: Sequence[str], used: list[str]) -> list[str]:
    """The references of a row that say anything; a DataError where their column holds something else."""
    for name in names:
        value = row.columns.get(name)
        values = [value] if isinstance(value, str) else value or []
        if isinstance(values, list) and len(values) == 1 and isinstance(values[0], dict):  # TRL's, an answer as a turn
            values = [turn["content"] for turn in conversation(row, name) if turn["role"] == "assistant"]
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise DataError(f"{row.place}: column '{name}' must be a string or a list of strings")
        if filled := [v for v in values if v.strip()]:
            used.append(name)
            return filled
    return []


def _holds_any(value: object) -> bool:
    return any(map(_holds_any, value)) if isinstance(value, list | tuple) else value not in (None, "", {})


def _holds_text(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_holds_text, value))
    if isinstance(value, dict):
        return any(map(_holds_text, value.values()))
    return isinstance(value, str) and bool(value.strip())


def renamed(row: Row, names: Mapping[ColumnName, str], beside: Sequence[str] = ()) -> Row:
    """A row whose columns are called what they are: `names` gives for these the names that the source has.

    Where the prompt's own column is among them, the row's others are not read, but for `id` and those of `beside`.
    """
    if not names or row.fault:
        return row
    if missing := [name for name in names.values() if name not in row.columns]:
        raise DataError(f"{row.place}: column '{missing[0]}' of --columns is missing; the row has {_names(row)}")
    others = {name: value for name, value in row.columns.items() if name not in names.values()}
    columns = {name: row.columns[source] for name, source in names.items()}
    if not names.keys() & LAYOUTS.keys():
        return replace(row, columns=others | columns)
    kept = {name: others.pop(name) for name in ("id", *beside) if name in others}
    return replace(row, columns=kept | columns, unread=others)


def layouts_table() -> str:
    """The layouts for people, as Markdown."""

    def cell(names: Sequence[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    rows = [[f"`{c}`", x.form, cell(x.context), cell(x.references)] for c, x in LAYOUTS.items()]
    return markdown_table(["column", "holds", "context", "reference, the first that says anything"], rows)
