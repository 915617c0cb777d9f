"""Layouts as people have them: each says a prompt, and no text for the model is dropped without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_jsonl
from pydantic import ValidationError

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.columns import LAYOUTS, content_of
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.sources import Row


@pytest.fixture(scope="module")
def chat(teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers["llama"]))


def read(
    folder: Path, rows: list[dict[str, Any]], model: ModelInfo, **options: Any
) -> tuple[list[Prompt], PromptReport]:
    report = PromptReport()
    source = write_jsonl(folder / "p.jsonl", rows)
    return list(read_prompts(str(source), PromptOptions(**options), model, report)), report


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TEA = "<|user|>Tea?</s><|assistant|>"
SHORT_TEA = "<|system|>Be brief.</s><|user|>Tea?</s><|assistant|>"
HOT_TEA = "<|user|>Tea?\n\nHot.</s><|assistant|>"
# A row; the text of its prompt; its references; the columns that are named as not used.
UNDERSTOOD: dict[str, tuple[dict[str, Any], str, list[str], list[str]]] = {
    "Alpaca": ({"instruction": "Tea?", "input": "Hot.", "output": "Yes."}, HOT_TEA, ["Yes."], []),
    "Alpaca with the text of a template": (
        {"instruction": "Tea?", "input": "", "output": "Yes.", "text": "Below is an instruction"},
        TEA,
        ["Yes."],
        ["text"],
    ),
    "Dolly": (
        {"instruction": "Tea?", "context": "Hot.", "response": "Yes.", "category": "closed_qa"},
        HOT_TEA,
        ["Yes."],
        ["category"],
    ),
    "a response alone": ({"instruction": "Tea?", "response": "Yes."}, TEA, ["Yes."], []),
    "question and answer": ({"question": "Tea?", "answer": "Yes."}, TEA, ["Yes."], []),
    "question, context and answers": (
        {"question": "Tea?", "context": "Hot.", "answer": ["Yes.", "Oui."]},
        HOT_TEA,
        ["Yes.", "Oui."],
        [],
    ),
    "OpenOrca": (
        {"id": "x", "system_prompt": "Be brief.", "question": "Tea?", "response": "Yes."},
        SHORT_TEA,
        ["Yes."],
        [],
    ),
    "S-NI": ({"Definition": ["Tea?"], "Input": "Hot.", "Output": ["Yes.", "Oui."]}, HOT_TEA, ["Yes.", "Oui."], []),
    "S-NI of the Hub": ({"definition": "Tea?", "inputs": "Hot.", "targets": "Yes."}, HOT_TEA, ["Yes."], []),
    "prompt and completion": ({"prompt": "Tea? ", "completion": "Yes."}, "Tea? ", ["Yes."], []),
    "a prompt of messages": ({"prompt": [user("Tea?")], "completion": "Yes."}, TEA, ["Yes."], []),
    "a prompt and a completion of messages": (
        {"prompt": [user("Tea?")], "completion": [assistant("Yes.")]},
        TEA,
        ["Yes."],
        [],
    ),
    "messages": ({"messages": [SYSTEM, user("Tea?")]}, SHORT_TEA, [], []),
    "messages with an answer": ({"messages": [user("Tea?"), assistant("Yes.")]}, TEA, ["Yes."], []),
    "messages of three turns": (
        {"messages": [user("Hi"), assistant("Ho"), user("Tea?"), assistant("Yes.")], "reference": "Oui."},
        "<|user|>Hi</s><|assistant|>Ho</s>" + TEA,
        ["Oui.", "Yes."],
        [],
    ),
    "messages with thoughts": (
        {"messages": [user("Tea?"), assistant("Yes.") | {"reasoning_content": "Hm.", "weight": 1, "tool_calls": None}]},
        TEA,
        ["Yes."],
        ["messages.reasoning_content"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, human("Tea?"), gpt("Yes.")]},
        SHORT_TEA,
        ["Yes."],
        [],
    ),
    "ShareGPT in roles": ({"conversations": [user("Tea?"), assistant("Yes.")], "n": 1}, TEA, ["Yes."], []),
    "a system column": ({"instruction": "Tea?", "system": "Be brief."}, SHORT_TEA, [], []),
    "a system column beside messages": ({"messages": [user("Tea?")], "system": "Be brief."}, SHORT_TEA, [], []),
    "a system column and the same turn": (
        {"messages": [SYSTEM, user("Tea?")], "system": "Be brief."},
        SHORT_TEA,
        [],
        [],
    ),
    "an empty system column": ({"instruction": "Tea?", "system": " ", "tools": [], "input": None}, TEA, [], []),
    "tools that are none": ({"instruction": "Tea?", "tools": "[]"}, TEA, [], []),
    "of two prompts the one that says anything": ({"messages": [], "prompt": None, "instruction": "Tea?"}, TEA, [], []),
    "two prompts": ({"instruction": "Tea?", "question": "Coffee?"}, TEA, [], ["question"]),
    "two answers": ({"instruction": "Tea?", "reference": "Yes.", "output": "No."}, TEA, ["Yes."], ["output"]),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_layout_is_understood(name: str, tmp_path: Path, chat: ModelInfo) -> None:
    row, text, references, unused = UNDERSTOOD[name]
    (prompt,), report = read(tmp_path, [row], chat)
    assert (prompt.prompt, prompt.references, list(report.unused)) == (text, references, unused)
    assert str(report).endswith(f"; columns not used: {', '.join(unused)}" if unused else f" {[*report.columns][-1]}")
    assert not set(report.columns) & set(unused)


def test_every_layout_is_among_them() -> None:
    assert {column for row, *_ in UNDERSTOOD.values() for column in row} >= LAYOUTS.keys() - {"conversation"}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": (
        {"tools": [CALL], "messages": [user("Tea?")]},
        "column 'tools': the chat template of .* leaves out the t",
    ),
    "tools as text": ({"tools": "[{}]", "question": "Tea?"}, "column 'tools' has a tool without a name"),
    "calls": (
        {"messages": [user("a"), assistant("") | {"tool_calls": [CALL]}, user("b")]},
        "column 'messages': the chat template of .* leaves out what turn 2 calls",
    ),
    "a role of its own": (
        {"messages": [user("a"), {"role": "critic", "content": "rain"}, user("b")]},
        "column 'messages' needs a role of system, user, assistant, tool .*; in turn 2 its role is 'critic'",
    ),
    "content that is none": ({"messages": [{"role": "user", "content": 3}]}, "in turn 1 its content is none"),
    "NUL in a turn": ({"messages": [user("a\0")]}, "column 'messages', turn 1, holds the character NUL"),
    "an answer to nothing": ({"conversations": [gpt("Yes.")]}, "'conversations' must end with what a user or a tool"),
    "a system turn beside raw text": (
        {"prompt": "Tea?", "system": "Be brief."},
        "column 'system' beside 'prompt', which is raw text .*--columns instruction=prompt,system=system",
    ),
    "two system turns": ({"messages": [SYSTEM, user("Tea?")], "system": "Be long."}, "column 'system' says something"),
    "a context that is no text": ({"question": "a", "context": {"b": ["c"]}}, "'context' must be a string, it is dict"),
    "an answer that is no text": ({"question": "a", "answer": 4}, "'answer' must be a string or a list of strings"),
    "a layout of its own": (
        {"query": "a", "gold": "b"},
        "column 'instruction' is missing, or one of .*; the row has 'query', 'gold'; say which is what, .*--columns",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused_with_row_and_column(name: str, tmp_path: Path, chat: ModelInfo) -> None:
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .*{message}"):
        read(tmp_path, [{"instruction": "a"}, row], chat)


def test_a_system_turn_needs_a_chat_template(tmp_path: Path, chat: ModelInfo) -> None:
    row = {"instruction": "Tea?", "system": "Be brief."}
    for template in ("alpaca", "none"):
        with pytest.raises(DataError, match=r"p\.jsonl:1: column 'system' needs a chat template"):
            read(tmp_path, [row], chat, template=template)


def test_columns_are_mapped_by_the_user(tmp_path: Path, chat: ModelInfo) -> None:
    row = {"query": "Tea?", "gold": "Yes.", "topic": "drinks", "context": {"no": "text"}, "id": "x", "input": "unread"}
    for columns in ("instruction=query, reference=gold", {"instruction": "query", "reference": "gold"}):
        (prompt,), report = read(tmp_path, [row], chat, columns=columns)
        assert (prompt.id, prompt.prompt, prompt.references) == ("x", TEA, ["Yes."])
        assert list(report.unused) == ["topic", "context", "input"]
    raw = {"prompt": "Tea?", "system": "Be brief."}
    (prompt,), _ = read(tmp_path, [raw], chat, columns="instruction=prompt,system=system")
    assert prompt.prompt == SHORT_TEA
    (prompt,), _ = read(tmp_path, [{"instruction": "Tea?", "gold": "Yes."}], chat, columns="reference=gold")
    assert (prompt.prompt, prompt.references) == (TEA, ["Yes."])
    with pytest.raises(
        DataError, match=r"p\.jsonl:1: column 'qery' of --columns is missing; the row has 'query', 'gold'"
    ):
        read(tmp_path, [row], chat, columns="instruction=qery")
    for wrong, message in (("instruction", "write NAME=COLUMN"), ("question=query", "'instruction', 'input'")):
        with pytest.raises(ValidationError, match=message):
            PromptOptions.model_validate({"columns": wrong})


def test_the_same_text_has_one_id_in_every_layout_of_tasks(tmp_path: Path, chat: ModelInfo) -> None:
    layouts = ("instruction", "input"), ("instruction", "context"), ("question", "context"), ("Definition", "Input")
    rows = [{task: "Tea?", context: "Hot."} for task, context in layouts]
    (prompt,), report = read(tmp_path, rows, chat)
    assert (prompt.id, report.duplicates) == ("82dc44326cd5b4af", 3)


def test_content_says_what_it_read() -> None:
    row = Row("p:1", {"question": "Tea?", "context": "Hot.", "answer": "Yes.", "n": 1, "id": 1, "chosen": "a"})
    content = content_of(row, beside=("chosen",))
    assert (content.columns, content.unused) == (("question", "context", "answer"), ())
