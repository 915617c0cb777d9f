"""Layouts of pairs and of single responses: each says a conversation, y_t and, if there are two, y_s."""

from __future__ import annotations

from typing import Any

import pytest

from dpkd_offline.common.errors import DataError
from dpkd_offline.curation.import_layouts import Arrangement
from dpkd_offline.prompts.columns import content_of
from dpkd_offline.prompts.sources import Row


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TEXT = {"chosen": "Yes.", "rejected": "No."}
HOT = "Tea?\n\nHot."
# A row; the messages of its prompt; the columns that y_t and y_s are from.
PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]], tuple[str, str]]] = {
    "LLaMA-Factory, Alpaca": (
        {"instruction": "Tea?", "input": "Hot.", **TEXT},
        [user(HOT)],
        ("chosen", "rejected"),
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [human("Hi"), gpt("Ho"), human("Tea?")],
            "system": "Be brief.",
            "chosen": gpt("Yes."),
            "rejected": gpt("No."),
        },
        [SYSTEM, user("Hi"), assistant("Ho"), user("Tea?")],
        ("chosen", "rejected"),
    ),
    "LLaMA-Factory, ranking": (
        {"instruction": "Tea?", "input": "", "output": ["Yes.", "No."]},
        [user("Tea?")],
        ("output", "output"),
    ),
    "ms-swift": (
        {"messages": [SYSTEM, user("Tea?"), assistant("Yes.")], "rejected_response": "No."},
        [SYSTEM, user("Tea?")],
        ("messages", "rejected_response"),
    ),
    "ms-swift, messages": (
        {"messages": [user("Tea?"), assistant("Yes.")], "rejected_messages": [user("Tea?"), assistant("No.")]},
        [user("Tea?")],
        ("messages", "rejected_messages"),
    ),
    "ms-swift, the last message": (
        {"messages": [user("Tea?"), assistant("Yes.")], "rejected_messages": [assistant("No.")]},
        [user("Tea?")],
        ("messages", "rejected_messages"),
    ),
    "TRL, explicit": (
        {"prompt": [user("Tea?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        [user("Tea?")],
        ("chosen", "rejected"),
    ),
    "TRL, implicit": (
        {"chosen": [SYSTEM, user("Tea?"), assistant("Yes.")], "rejected": [SYSTEM, user("Tea?"), assistant("No.")]},
        [SYSTEM, user("Tea?")],
        ("chosen", "rejected"),
    ),
    "TRL, text": ({"prompt": "Tea?", **TEXT}, [], ("chosen", "rejected")),
    "UltraFeedback, binarized": (
        {
            "prompt": "Tea?",
            "prompt_id": "f00",
            "chosen": [user("Tea?"), assistant("Yes.")],
            "rejected": [user("Tea?"), assistant("No.")],
            "messages": [user("Tea?"), assistant("Yes.")],
            "score_chosen": 8.5,
        },
        [user("Tea?")],
        ("chosen", "rejected"),
    ),
    "UltraFeedback, cleaned": (
        {"instruction": "Tea?", "chosen_response": "Yes.", "rejected_response": "No."},
        [user("Tea?")],
        ("chosen_response", "rejected_response"),
    ),
    "Orca": ({"system": "Be brief.", "question": "Tea?", **TEXT}, [SYSTEM, user("Tea?")], ("chosen", "rejected")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_layout_of_pairs_is_understood(name: str) -> None:
    row, messages, columns = PAIRS[name]
    arrangement = Arrangement("auto", "chat")
    arranged = arrangement(Row("p:1", row))
    assert (arranged.columns["chosen"], arranged.columns["rejected"]) == ("Yes.", "No.")
    assert tuple(", ".join(names) for names in arrangement.columns.values()) == columns
    content = content_of(arranged, beside=("chosen", "rejected"))
    if messages:
        assert content.messages == messages
    else:
        assert (content.kind, content.instruction) == ("prompt", row["prompt"])
    assert set(content.unused) <= {"prompt_id"}


# A row; the messages of its prompt; the column that y_t is from; the references.
SINGLE: dict[str, tuple[dict[str, Any], list[dict[str, str]], str, list[str]]] = {
    "Alpaca": ({"instruction": "Tea?", "input": "Hot.", "output": "Yes."}, [user(HOT)], "output", ["Yes."]),
    "Dolly": ({"instruction": "Tea?", "context": "Hot.", "response": "Yes."}, [user(HOT)], "response", ["Yes."]),
    "question and answer": ({"question": "Tea?", "answer": "Yes."}, [user("Tea?")], "answer", ["Yes."]),
    "S-NI": (
        {"Definition": ["Tea?"], "Input": "Hot.", "Output": ["Yes."]},
        [user(HOT)],
        "Output",
        ["Yes."],
    ),
    "a response beside the right answer": (
        {"question": "Tea?", "answer": "Oui.", "response": "Yes."},
        [user("Tea?")],
        "response",
        ["Oui."],
    ),
    "a response beside a reference": (
        {"instruction": "Tea?", "reference": "Oui.", "response": "Yes."},
        [user("Tea?")],
        "response",
        ["Oui."],
    ),
    "a reference alone": ({"instruction": "Tea?", "reference": "Yes."}, [user("Tea?")], "reference", ["Yes."]),
    "ShareGPT": (
        {"conversations": [human("Hi"), gpt("Ho"), human("Tea?"), gpt("Yes.")], "system": "Be brief."},
        [SYSTEM, user("Hi"), assistant("Ho"), user("Tea?")],
        "conversations",
        ["Yes."],
    ),
    "messages": ({"messages": [SYSTEM, user("Tea?"), assistant("Yes.")]}, [SYSTEM, user("Tea?")], "messages", ["Yes."]),
    "messages beside the right answer": (
        {"messages": [user("Tea?"), assistant("Yes.")], "answer": "Oui."},
        [user("Tea?")],
        "messages",
        ["Oui."],
    ),
    "messages that end with the user": (
        {"messages": [user("Tea?")], "response": "Yes."},
        [user("Tea?")],
        "response",
        ["Yes."],
    ),
    "TRL's prompt and completion": (
        {"prompt": [user("Tea?")], "completion": [assistant("Yes.")]},
        [user("Tea?")],
        "completion",
        ["Yes."],
    ),
    "chosen alone": (
        {"prompt": "Tea?", "chosen": [user("Tea?"), assistant("Yes.")], "rejected": None},
        [user("Tea?")],
        "chosen",
        ["Yes."],
    ),
}


@pytest.mark.parametrize("template", ["chat", "alpaca"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_layout_of_one_response_is_understood(name: str, template: str) -> None:
    row, messages, column, references = SINGLE[name]
    arrangement = Arrangement("auto", template)  # type: ignore[arg-type]
    arranged = arrangement(Row("p:1", row))
    assert (arranged.columns["chosen"], arranged.columns["rejected"]) == ("Yes.", None)
    assert ([*arrangement.columns["chosen"]], arrangement.columns["rejected"]) == ([column], {})
    content = content_of(arranged, beside=("chosen", "rejected"))
    assert (content.messages, content.references, content.unused) == (messages, references, ())
    alone = (template == "alpaca" and len(messages) == 1) or row.keys() & {"instruction", "question", "Definition"}
    assert content.kind == ("instruction" if alone else "messages")


def test_a_prompt_that_is_text_is_taken_as_it_is_unless_a_template_is_asked_for() -> None:
    row = Row("p:1", {"prompt": "The sky is", "completion": " blue."})
    content = content_of(Arrangement("auto", "chat")(row), beside=("chosen", "rejected"))
    assert (content.kind, content.instruction, content.references) == ("prompt", "The sky is", [" blue."])
    content = content_of(Arrangement("chat", "chat")(row), beside=("chosen", "rejected"))
    assert (content.kind, content.messages) == ("instruction", [user("The sky is")])


ONE, PAIR = {"instruction": "Tea?", "output": "Yes."}, {"instruction": "Tea?", **TEXT}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a pair behind single ones": ([ONE, PAIR], "column 'rejected': this row is a pair, and those before it have one"),
    "ranked behind single ones": ([ONE, {**ONE, "output": ["a", "b"]}], "column 'output': this row is a pair"),
    "a single one behind pairs": ([PAIR, ONE], "column 'rejected' must be a string or a list of messages"),
    "no response": ([{"question": "Tea?", "gold": "Yes."}], "no response: .*; the row has 'question', 'gold'; say .*"),
    "an empty one": ([{"question": "Tea?", "answer": " "}], "no response: neither a column such as 'response'"),
    "several": (
        [{"question": "Tea?", "answer": ["Yes.", "Oui."]}],
        "column 'answer' holds 2 responses; write one a row",
    ),
    "one that is not liked": ([{**ONE, "label": True}, {**ONE, "label": False}], "column 'label' is false"),
    "an answer to nothing": (
        [{"messages": [SYSTEM, assistant("Yes.")]}],
        "column 'messages' must answer messages that",
    ),
    "an answer to an answer": (
        [{"messages": [user("a"), assistant("b"), assistant("c")]}],
        "column 'messages' must answer messages that end with what a user says",
    ),
    "a number": ([{"instruction": "Tea?", "response": 4}], "column 'response' must be a list of at least one message"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_with_its_row(name: str) -> None:
    rows, message = REFUSED[name]
    arrangement = Arrangement("auto", "chat")
    for row in rows[:-1]:
        arrangement(Row("p:1", row))
    with pytest.raises(DataError, match=f"^p:2: {message}"):
        arrangement(Row("p:2", rows[-1]))
