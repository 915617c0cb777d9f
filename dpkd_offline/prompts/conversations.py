"""Turns of a conversation, in the spellings that people have: as a chat template takes them, and as text for people.

OpenAI's and Hugging Face's turns have `role` and `content`, ShareGPT's `from` and `value`. A call of a tool stands in
`tool_calls`, `function_call`, or in a turn of its own; a template gets it in `tool_calls`, its arguments as an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpkd_offline.common.errors import DataError
from dpkd_offline.prompts.sources import Row, check_text

Turn = dict[str, Any]  # role, content, and what else its role has: tool_calls, name, …

ROLES = {  # by its spelling
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLING = ("function_call", "tool_call")  # roles of turns that are a call, as JSON
CALLS = ("tool_calls", "function_call")  # keys of a turn
THOUGHTS = ("reasoning_content", "thinking")
RESULT = ("name", "tool_call_id")  # keys of what a tool says
NO_VISION = "only text is read: vision is out of scope, and so is sound; leave such rows out with --on-bad-row skip"


def conversation(row: Row, column: str) -> list[Turn]:
    """The turns in a column, as a chat template takes them, or a DataError.

    Parts of text become one text, as templates write them: one behind the other. Calls that are turns of their own, one
    behind the other, are one turn.
    """
    turns, read = row.columns[column], list[Turn]()
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: column '{column}' must be a list of at least one message")
    calling = False
    for number, turn in enumerate(turns, start=1):
        message, before = _turn(turn, f"{row.place}: column '{column}'", number), calling
        if (calling := _spelled_role(turn) in CALLING) and before:
            read[-1]["tool_calls"] += message["tool_calls"]
        else:
            read.append(message)
    return read


def tools_in(value: Any, place: str) -> list[dict[str, Any]]:
    """The definitions of tools in a list, or in JSON text of one, as templates take them; a DataError where it is none.

    A definition may also be what stands under `function` alone.
    """
    if isinstance(value, str):
        value = _parsed(value, place) if value.strip() else None
    return [_definition(tool, place) for tool in ([value] if isinstance(value, dict) else _listed(value, place))]


def is_plain(turns: Sequence[Turn]) -> bool:
    """Whether roles and text say all that there is."""
    return all(turn.keys() == {"role", "content"} and turn["role"] != "tool" for turn in turns)


def text_of(turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, str]]:
    """Turns for people: a role and a text each. Calls, and the tools that there are, are JSON, one a line."""
    definitions = [{"role": "tools", "content": "\n".join(map(_json, tools))}] if tools else []
    return [*definitions, *({"role": turn["role"], "content": _text_of(turn)} for turn in turns)]


def unread_keys(turns: Sequence[Any]) -> dict[str, list[Any]]:
    """What turns of a source say that `conversation`, or the reference that the last one is, does not; by its key."""
    unread: dict[str, list[Any]] = {}
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            continue
        read = {"role", "content", "from", "value"}
        role = ROLES.get(str(_spelled_role(turn)))
        if role == "tool":
            read |= {*RESULT}
        elif role == "assistant" and (number < len(turns) or any(map(turn.get, CALLS))):
            read |= {*CALLS, *THOUGHTS}
        for key in turn.keys() - read:
            unread.setdefault(key, []).append(turn[key])
    return unread


# --- turns ------------------------------------------------------------------------------------------------------------


def _spelled_role(turn: Any) -> Any:
    return (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None


def _turn(turn: Any, place: str, number: int) -> Turn:
    values: dict[str, Any] = turn if isinstance(turn, dict) else {}
    spelled, at = _spelled_role(turn), f"{place}, turn {number},"
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    content = values["content"] if values.get("content") is not None else values.get("value")
    if spelled in CALLING:
        return {"role": "assistant", "content": None, "tool_calls": _calls(content, at)}
    message: Turn = {"role": role, "content": _content(content, role, at)}
    if role == "assistant":
        message |= {key: values[key] for key in THOUGHTS if isinstance(values.get(key), str) and values[key].strip()}
        if called := next((values[key] for key in CALLS if values.get(key)), None):
            message["tool_calls"] = _calls(called, at)
    elif role == "tool":
        message["content"] = message["content"] or ""
        message |= {key: values[key] for key in RESULT if isinstance(values.get(key), str)}
    says_nothing = message["content"] is None and "tool_calls" not in message
    if role is None or says_nothing:
        fault = f"its role is {spelled!r}" if role is None else "its content is none"
        raise DataError(
            f"{place} needs a role of system, user, assistant, tool (or ShareGPT's human, gpt, function_call, "
            f"observation) and a content of text; in turn {number} {fault}"
        )
    check_text(message["content"], at)
    return message


def _content(content: Any, role: str | None, place: str) -> str | None:
    """The text of a turn, whose parts are joined; what a tool gives besides text is JSON; None where there is none."""
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if isinstance(parts, list) and parts and all(isinstance(part, dict) and part.get("type") for part in parts):
        if unseen := [part["type"] for part in parts if not isinstance(part.get("text"), str)]:
            raise DataError(f"{place} has a part of type {unseen[0]!r}; {NO_VISION}")
        return "".join(part["text"] for part in parts)
    return _json(content) if role == "tool" else None


# --- calls and definitions --------------------------------------------------------------------------------------------


def _calls(value: Any, place: str) -> list[dict[str, Any]]:
    value = _parsed(value, place) if isinstance(value, str) else value
    calls = [_call(call, place) for call in ([value] if isinstance(value, dict) else _listed(value, place))]
    if not calls:
        raise DataError(f"{place} calls nothing")
    return calls


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": …, "arguments": {…}}}`, with its id if it has one."""
    wrapped, function = _wrapped(call, place)
    if not isinstance(name := function.get("name"), str) or not name:
        raise DataError(f"{place} has a call without the name of what it calls: {_shown(call)}")
    arguments = function.get("arguments")
    arguments = _parsed(arguments, place) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    if not isinstance(arguments, dict):
        raise DataError(f"{place} calls '{name}' with arguments that are no JSON object: {_shown(arguments)}")
    return wrapped | {"function": function | {"arguments": arguments}}


def _definition(tool: Any, place: str) -> dict[str, Any]:
    """A tool as `{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}`."""
    wrapped, function = _wrapped(tool, place)
    if not isinstance(name := function.get("name"), str) or not name:
        raise DataError(f"{place} has a tool without a name: {_shown(tool)}")
    if isinstance(parameters := function.get("parameters"), str):
        function |= {"parameters": _parsed(parameters, place)}
    return wrapped | {"function": function}


def _wrapped(value: Any, place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call or definition, and what stands under its `function`, or is all that it is."""
    written = isinstance(value, str)
    value = _parsed(value, place) if written else value
    if not isinstance(value, dict):
        raise DataError(f"{place} has {_shown(value)} where a tool must be an object with a name")
    value = value if written else _without_nulls(value)
    if isinstance(function := value.get("function"), dict):
        return value, function
    outer = {key: value[key] for key in ("id",) if key in value}
    return {**outer, "type": "function"}, {key: item for key, item in value.items() if key not in ("id", "type")}


def _without_nulls(value: Any) -> Any:
    """Objects without keys whose value is null: tables, whose rows have one type, put such keys into every row."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _listed(value: Any, place: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise DataError(f"{place} must be a list, or JSON text of one, it is {type(value).__name__}")
    return value or []


def _parsed(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        _json(value).encode()  # of half a character there is no UTF-8
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {_shown(text)}") from error
    return value


def _text_of(turn: Turn) -> str:
    calls = (_json(call["function"]) for call in turn.get("tool_calls", ()))
    return "\n".join([turn["content"], *calls] if turn["content"] else calls)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else _json(value)
    return repr(text if len(text) < 60 else text[:57] + "...")
