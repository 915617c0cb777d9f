"""What the columns of a source's row say: a prompt, in one of the layouts that people have, and references.

LAYOUTS has the layouts, each under the column that holds its prompt. `id` is optional in each of them. Every error
names file, row (a line of JSONL or CSV, else counted from 1) and column.

A new layout is an entry in LAYOUTS, and a function from a row and that column to its Content where it is no other's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import ColumnName
from dpkd_offline.prompts.sources import Row, check_text, text_in

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
CALLS = ("tool_calls", "function_call")  # keys of a message
SYSTEM = ("system", "system_prompt")  # columns, of which a row has one
REFERENCES = (
    "reference",
    "references",
    "output",
    "response",
    "answer",
    "completion",
)  # the first that says anything counts
KEYS_READ = {"role", "content", "from", "value"}


@dataclass(frozen=True)
class Content:
    """What a row says, before any template: messages, instruction and input, or raw text."""

    kind: Literal["messages", "instruction", "prompt"]
    messages: list[dict[str, str]]
    instruction: str = ""
    input: str = ""
    references: list[str] = field(default_factory=list)
    needs_chat: str = "messages"  # the column that only a chat template can render
    columns: tuple[str, ...] = ()  # of the row, which say this
    unused: tuple[str, ...] = ()  # those that hold text, too, and are not read


@dataclass(frozen=True)
class Layout:
    """How rows say a prompt in one column, and what belongs to it in others."""

    form: str  # of that column, for people
    content: Callable[[Row, str], Content]
    context: tuple[str, ...] = ()  # what the task is about; the first that says anything counts
    references: tuple[str, ...] = REFERENCES


def conversation(row: Row, column: str) -> list[dict[str, str]]:
    """The messages in a column, each with a role and a content, or a DataError.

    ShareGPT's spelling is understood: `from` and `value`, `human` and `gpt`.
    """
    turns = row.columns[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: column '{column}' must be a list of at least one message")
    return [_message(turn, f"{row.place}: column '{column}'", number) for number, turn in enumerate(turns, start=1)]


def conversation_in(row: Row) -> list[dict[str, str]]:
    """The messages in the first of ShareGPT's columns that has any; none where none has."""
    columns = (column for column in ("conversations", "conversation") if row.columns.get(column))
    return next((conversation(row, column) for column in columns), [])


def with_turns_listed(row: Row, columns: Sequence[str]) -> Row:
    """A row in which a column that holds one message holds a list of it."""
    single = {name: [row.columns[name]] for name in columns if isinstance(row.columns.get(name), dict)}
    return replace(row, columns=row.columns | single)


def _message(turn: Any, place: str, number: int) -> dict[str, str]:
    values: dict[str, Any] = turn if isinstance(turn, dict) else {}
    role = values.get("role") or values.get("from")
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    content = values["content"] if values.get("content") is not None else values.get("value")
    if calls := [key for key in CALLS if values.get(key)]:
        raise DataError(f"{place} has '{calls[0]}' in turn {number}; {NO_TOOLS}")
    if role not in ROLES or not isinstance(content, str):
        fault = f"its role is {role!r}" if role not in ROLES else "its content is none"
        raise DataError(
            f"{place} needs a role of {', '.join(ROLES)} (or ShareGPT's human, gpt) and a string content; in turn "
            f"{number} {fault}"
        )
    check_text(content, f"{place}, turn {number},")
    return {"role": str(role), "content": content}


NO_TOOLS = (
    "a prompt is stored as turns of text, without tools: write them into the text, or leave such rows out with "
    "--on-bad-row skip"
)


def _messages(row: Row, column: str) -> Content:
    """A conversation. Where the assistant has the last word, that is a reference."""
    messages, answer = conversation(row, column), []
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = [last["content"]] if last["content"].strip() else []
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{row.place}: column '{column}' must end with what a user says, or with the answer to that")
    return Content("messages", messages, references=answer, needs_chat=column)


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
    if (tools := row.columns.get("tools")) and tools != "[]":
        raise DataError(f"{row.place}: column 'tools': {NO_TOOLS}")
    content, used = layout.content(row, column), [column]
    if content.kind == "instruction":
        content = _with_context(row, content, layout.context, used)
    content = _with_system(row, content, column, used)
    content = replace(content, references=[*_references(row, layout.references, used), *content.references])
    return replace(content, columns=tuple(used), unused=_unused(row, column, {"id", "tools", *used, *beside}))


def _unused(row: Row, column: str, used: set[str]) -> tuple[str, ...]:
    """The columns that hold text and are not read, and such keys of the messages in `column`."""
    names = [name for name, value in (row.unread | row.columns).items() if name not in used and _holds_text(value)]
    turns = row.columns[column]
    keys = (
        {k: v for turn in turns if isinstance(turn, dict) for k, v in turn.items()} if isinstance(turns, list) else {}
    )
    return (*names, *(f"{column}.{k}" for k, v in keys.items() if k not in KEYS_READ and _holds_text(v)))


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
    begun = [] if first["role"] == "system" else [{"role": "system", "content": system}]
    return Content("messages", [*begun, *content.messages], references=content.references, needs_chat=name)


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
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise DataError(f"{row.place}: column '{name}' must be a string or a list of strings")
        if filled := [v for v in values if v.strip()]:
            used.append(name)
            return filled
    return []


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
