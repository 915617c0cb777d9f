"""Conversations with tools: read in the spellings that people have, and rendered as `apply_chat_template` renders them.

The three templates have the structure of those that Qwen's, Meta's and Mistral's models come with: tools in the system
turn, what tools give as a user's turn; tools in the first user's turn, one call a turn; tools before the last user's
turn, ids of nine characters, roles that alternate.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import CHAT_TEMPLATE, write_jsonl

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.templates import render

QWEN = """
{%- if tools %}<|system|>
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- 'Functions, in <tools>:\n<tools>' }}
{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
{{- '\n</tools>\nCall them as <tool_call>{"name": ..., "arguments": ...}</tool_call></s>\n' }}
{%- elif messages[0].role == 'system' %}<|system|>{{ messages[0].content + '</s>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|' + message.role + '|>' + message.content + '</s>\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- if message.reasoning_content and not loop.last %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content if message.content is string else '' }}
{%- for call in message.tool_calls or [] %}
{%- if call.function %}{% set call = call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '</s>\n' }}
{%- elif message.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}<|user|>{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '</s>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}"""
LLAMA = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|system|>\n' }}{% if tools is not none %}{{ 'Environment: tools\n' }}{% endif %}{{ system + '</s>' }}
{%- if tools is not none %}
{%- set first = messages[0].content | trim %}{% set messages = messages[1:] %}
{{- '<|user|>\nAnswer with JSON that calls one of:\n\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{{ first + '</s>' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|ipython|>\n' }}{{ message.content | tojson }}{{ '</s>' }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|assistant|>\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}</s>' }}
{%- else %}
{{- '<|' + message.role + '|>\n' + message.content | trim + '</s>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
MISTRAL = """
{%- if messages[0].role == 'system' %}
{%- set system, messages = messages[0].content, messages[1:] %}
{%- endif %}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages | rejectattr('role', 'equalto', 'tool') | selectattr('tool_calls', 'undefined') %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools is not none and message == asked[-1] %}
{{- '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (', ' if not loop.last else ']' + eos_token) }}
{%- endfor %}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL}


@pytest.fixture(scope="module")
def model(teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers["llama"]))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *calls: dict[str, Any], **others: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others, **({"tool_calls": [*calls]} if calls else {})}


def call(city: str, number: int = 1, **arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city, **arguments}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


def result(text: str, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": f"call{number:05}"}


def without(value: Any, *keys: str) -> Any:
    if isinstance(value, dict):
        return {key: without(item, *keys) for key, item in value.items() if key not in keys}
    return [without(item, *keys) for item in value] if isinstance(value, list) else value


def in_text(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAI's interface writes them: arguments are JSON text."""
    turns = deepcopy(turns)
    for function in (call["function"] for turn in turns for call in turn.get("tool_calls", ())):
        function["arguments"] = json.dumps(function["arguments"])
    return turns


SYSTEM = {"role": "system", "content": "Be brief."}
CITY = {"type": "string", "description": "where, as in Zürich"}
DEFINITION = {
    "name": "weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": DEFINITION}]
ASKED = [user("Rain in Zürich?"), assistant(None, call("Zürich")), result("dry")]


def read(folder: Path, rows: list[dict[str, Any]], model: ModelInfo, template: str, **options: Any) -> list[Prompt]:
    file = folder / "template.jinja"
    file.write_text(template)
    options = {"template": str(file), "max_prompt_tokens": 4096, **options}
    source = write_jsonl(folder / "p.jsonl", rows)
    return list(read_prompts(str(source), PromptOptions(**options), model, PromptReport()))


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "turns": ([SYSTEM, user("Hi"), assistant("Ho"), user("Rain?")], None),
    "tools alone": ([SYSTEM, user("Rain?")], TOOLS),
    "what a tool gives": (ASKED, TOOLS),
    "a question after it": ([*ASKED, assistant("It is dry."), user('And "Bern" \\ Köln?')], TOOLS),
    "two rounds of calls": ([*ASKED, assistant(None, call("Bern", 2, days=[1, 2.5, None])), result("wet", 2)], TOOLS),
    "two calls": ([user("Bern, Genf?"), assistant(None, call("Bern"), call("Genf", 2)), result("a"), result("b", 2)],
                  TOOLS),
    "text beside a call": ([user("Bern?"), assistant("Let me see.", call("Bern")), result("a")], TOOLS),
    "a thought before a call": ([user("Bern?"), assistant("", call("Bern"), reasoning_content="Hm."), result("a")],
                                TOOLS),
}  # fmt: skip
CANNOT: dict[tuple[str, str], str] = {  # by template and conversation, why it is refused
    ("llama", "two calls"): "cannot take it: one call at a time",
    ("llama", "text beside a call"): r"leaves out what turn 2 \(assistant\) says",
    ("mistral", "text beside a call"): r"leaves out what turn 2 \(assistant\) says",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_apply_chat_template_does(name: str, model: ModelInfo, tmp_path: Path) -> None:
    template = TEMPLATES[name]
    tokenizer = model.with_chat_template(template).tokenizer
    for title, (turns, tools) in CONVERSATIONS.items():
        row = {"id": title, "messages": in_text(turns), "tools": tools}
        if why := CANNOT.get((name, title)):
            with pytest.raises(DataError, match=rf"p\.jsonl:1: column 'tools': the chat template .* {why}"):
                read(tmp_path, [row], model, template)
            continue
        (prompt,) = read(tmp_path, [row], model, template)
        expected = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True)
        assert prompt.prompt == expected, title
        assert prompt.prompt_ids == tokenizer.apply_chat_template(
            turns, tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert (prompt.conversation is None) == (title == "turns")
        if prompt.conversation is not None:
            assert json.loads(prompt.conversation) == {"messages": turns, "tools": tools}
        assert render(prompt, "chat", "chat", tokenizer) == prompt  # what is stored says it all again


FLAT = {"name": "weather", "arguments": {"city": "Zürich"}}
LF_TOOLS = json.dumps([DEFINITION])
# Rows that say ASKED with TOOLS, but for ids of calls and the names of what gave a result.
SPELLINGS: dict[str, dict[str, Any]] = {
    "OpenAI": {"messages": in_text(ASKED), "tools": TOOLS},
    "Hugging Face": {"messages": without(ASKED, "id", "tool_call_id"), "tools": TOOLS},
    "without content": {"messages": [ASKED[0], without(ASKED[1], "content"), ASKED[2]], "tools": TOOLS},
    "a call by itself": {"messages": [ASKED[0], {**ASKED[1], "tool_calls": [FLAT]}, ASKED[2]], "tools": [DEFINITION]},
    "everything as text": {
        "messages": [ASKED[0], {**ASKED[1], "tool_calls": json.dumps(ASKED[1]["tool_calls"])}, ASKED[2]],
        "tools": json.dumps(TOOLS),
    },
    "tools as texts": {"messages": ASKED, "tools": [json.dumps(DEFINITION)]},
    "OpenAI's functions": {
        "messages": [
            ASKED[0],
            {"role": "assistant", "content": None, "function_call": {**FLAT, "arguments": '{"city": "Zürich"}'}},
            {"role": "function", "name": "weather", "content": "dry"},
        ],
        "functions": [DEFINITION],
    },
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Rain in Zürich?"},
            {"from": "function_call", "value": json.dumps(FLAT)},
            {"from": "observation", "value": "dry"},
        ],
        "tools": LF_TOOLS,
    },
    "ms-swift": {
        "messages": [
            ASKED[0],
            {"role": "tool_call", "content": json.dumps(FLAT)},
            {"role": "tool_response", "content": "dry"},
        ],
        "tools": LF_TOOLS,
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Rain in "}, {"type": "text", "text": "Zürich?"}]},
            {**ASKED[1], "content": None},
            {**ASKED[2], "content": [{"type": "text", "text": "dry"}]},
        ],
        "tools": TOOLS,
    },
    "columns of other names": {"talk": ASKED, "api": TOOLS},
}


def test_every_spelling_says_the_same(model: ModelInfo, tmp_path: Path) -> None:
    expected = model.with_chat_template(QWEN).tokenizer.apply_chat_template(
        ASKED, tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    for name, row in SPELLINGS.items():
        columns = {"columns": "messages=talk,tools=api"} if "talk" in row else {}
        (prompt,) = read(tmp_path, [row], model, QWEN, **columns)
        assert prompt.prompt == expected, name
        assert prompt.messages == [
            {"role": "tools", "content": json.dumps(TOOLS[0], ensure_ascii=False)},
            user("Rain in Zürich?"),
            assistant(json.dumps(FLAT, ensure_ascii=False)),
            {"role": "tool", "content": "dry"},
        ], name
    system = {"instruction": "Rain in Zürich?", "system": "Be brief.", "tools": LF_TOOLS, "output": "No."}
    (prompt,) = read(tmp_path, [system], model, QWEN)
    assert prompt.prompt.startswith("<|system|>Be brief.\n\nFunctions") and prompt.references == ["No."]


def test_what_parquet_fills_in_is_not_there(model: ModelInfo, tmp_path: Path) -> None:
    """A column of objects has one type: every row has the keys of all others, with null in them."""
    other = {**DEFINITION, "name": "time", "parameters": {"type": "object", "properties": {"zone": CITY}}}
    talk = [user("Time?"), assistant(None, {"id": "x", "function": {"name": "time", "arguments": {"zone": "UTC"}}})]
    rows = [
        {"messages": ASKED, "tools": TOOLS},
        {"messages": [*talk, result("noon")], "tools": [{"type": "function", "function": other}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["tools"] != TOOLS
    expected = read(tmp_path, rows, model, QWEN)
    options = PromptOptions(template=str(tmp_path / "template.jinja"), max_prompt_tokens=4096)
    assert list(read_prompts(str(tmp_path / "p.parquet"), options, model, PromptReport())) == expected


def test_calls_one_behind_the_other_are_of_one_turn(model: ModelInfo, tmp_path: Path) -> None:
    turns, tools = CONVERSATIONS["two calls"]
    calls = [json.dumps(call["function"]) for call in turns[1]["tool_calls"]]
    one_by_one = [turns[0], *({"role": "tool_call", "content": text} for text in calls), *turns[2:]]
    listed = [turns[0], {"role": "function_call", "content": f"[{','.join(calls)}]"}, *turns[2:]]
    prompts = [read(tmp_path, [{"messages": m, "tools": tools}], model, QWEN)[0] for m in (turns, one_by_one, listed)]
    assert len({prompt.prompt for prompt in prompts}) == 1 and prompts[0].prompt.count("<tool_call>\n") == 2


def test_an_answer_that_calls_tools_is_a_reference_as_the_template_writes_it(model: ModelInfo, tmp_path: Path) -> None:
    row = {"id": "x", "messages": [*ASKED, assistant("Then Bern.", call("Bern"))], "tools": TOOLS}
    (prompt,) = read(tmp_path, [row], model, QWEN, min_reference_words=2)
    assert prompt.references == [
        'Then Bern.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    ]
    (alone,) = read(tmp_path, [{**row, "messages": ASKED}], model, QWEN)
    assert (prompt.prompt, prompt.prompt_ids, prompt.messages) == (alone.prompt, alone.prompt_ids, alone.messages)
    row["messages"][-1]["content"] = None
    (of_mistral,) = read(tmp_path, [row], model, MISTRAL)
    (text,) = of_mistral.references
    assert text.startswith('[TOOL_CALLS] [{"name": "weather"') and "</s>" not in text
    # a student with another template reads it in its own
    seen = render(of_mistral, "chat", "chat", model.with_chat_template(LLAMA).tokenizer)
    assert seen.references == ['{"name": "weather", "parameters": {"city": "Bern"}}']
    with pytest.raises(DataError, match=r"p\.jsonl:1: column 'tools': .* does not write its answer, a call of a tool"):
        read(tmp_path, [row], model, QWEN, template_args={"enable_thinking": False})


DROPS_SYSTEM = CHAT_TEMPLATE.replace("for message in messages", "for message in messages if message.role != 'system'")
PARTS_ALONE = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}<|assistant|>"
)


def test_what_a_template_leaves_out_without_a_word_is_refused(model: ModelInfo, tmp_path: Path) -> None:
    tools = ({"messages": ASKED, "tools": TOOLS}, "'tools': .* leaves out the tools")
    calls = ({"messages": ASKED}, "'messages': .* leaves out what turn 2 calls")
    results = ({"messages": ASKED}, r"'messages': .* leaves out what turn 3 \(tool\) says")
    for template, (row, message) in (
        (CHAT_TEMPLATE, tools),
        (CHAT_TEMPLATE, calls),
        (QWEN.replace("+ message.content + '\n</tool", "+ '\n</tool"), results),
        (QWEN.replace("{{ call.arguments | tojson }}", "..."), calls),
        (DROPS_SYSTEM, ({"messages": [SYSTEM, user("Hi")]}, r"'messages': .* turn 1 \(system\) says")),
        (DROPS_SYSTEM, ({"instruction": "Hi", "system": "Be brief."}, r"'system': .* turn 1 \(system\) says")),
        (PARTS_ALONE, ({"instruction": "Hi"}, r"'instruction': .* turn 1 \(user\) says")),
    ):
        with pytest.raises(DataError, match=rf"p\.jsonl:2: column {message}; take a model or a --template"):
            read(tmp_path, [{"prompt": "Hi"}, row], model, template)
        assert len(read(tmp_path, [{"prompt": "Hi"}, row], model, template, on_bad_row="skip")) == 1


def asking(**columns: Any) -> dict[str, Any]:
    return {"messages": [user("a")], **columns}


def part(kind: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: "b"}]}]}


def calling(**call: Any) -> dict[str, Any]:
    return {"messages": [user("a"), assistant(None, call), user("b")]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        kind: (
            part(kind),
            f"'messages', turn 1, has a part of type '{kind}'; only text is read: vision is out of scope",
        )
        for kind in ("image", "image_url", "input_audio", "video")
    },
    "a column of pictures": (asking(images=["a.png"]), "'images': only text is read: vision is out of scope"),
    "tools that are no list": (asking(tools=3), "'tools' must be a list, or JSON text of one"),
    "tools that are no JSON": (asking(tools="[{"), r"'tools' is no JSON: '\[{'"),
    "half a character": (asking(tools='["\\ud800"]'), "'tools' is no JSON"),
    "a tool without a name": (asking(tools=[{"type": "search"}]), "'tools' has a tool without a name"),
    "a tool of text": (asking(tools=["3"]), "'tools' has '3' where a tool must be an object"),
    "a call without a name": (calling(id="x"), "'messages', turn 2, has a call without the name of what it calls"),
    "arguments that are none": (
        calling(name="f", arguments="[1]"),
        r"'messages', turn 2, calls 'f' with arguments that are no JSON object: '\[1\]'",
    ),
    "a call of text": (
        {"conversations": [user("a"), {"from": "function_call", "value": "f(1)"}, user("b")]},
        r"'conversations', turn 2, is no JSON: 'f\(1\)'",
    ),
    "tools beside raw text": ({"prompt": "a", "tools": TOOLS}, "'tools' beside 'prompt', which is raw text and takes"),
    "a system turn at the end": ({"messages": [*ASKED, SYSTEM]}, "'messages' must end with what a user or a tool says"),
    "NUL in what a tool gives": ({"messages": [*ASKED[:2], result("a\0")]}, "turn 3, holds the character NUL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_conversation_is_refused_with_row_and_column(name: str, model: ModelInfo, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=rf"p\.jsonl:2: column .*{message}") as error:
        read(tmp_path, [{"instruction": "a"}, row], model, QWEN)
    assert "\n" not in str(error.value)


def test_what_a_tool_gives_besides_text_is_json(model: ModelInfo, tmp_path: Path) -> None:
    (prompt,) = read(tmp_path, [{"messages": [*ASKED[:2], {"role": "tool", "content": {"rain": 0}}]}], model, QWEN)
    assert prompt.prompt.endswith('\n<tool_response>\n{"rain": 0}\n</tool_response></s>\n<|assistant|>')


def test_tools_need_a_chat_template(model: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "a", "tools": TOOLS}])
    for template in ("alpaca", "none"):
        with pytest.raises(DataError, match=r"p\.jsonl:1: column 'tools' needs a chat template"):
            list(read_prompts(str(source), PromptOptions(template=template), model, PromptReport()))


def test_keys_of_turns_that_are_not_read_are_named(model: ModelInfo, tmp_path: Path) -> None:
    turns = [{**user("a"), "name": "Ann"}, assistant("b", reasoning_content="Hm."), {**user("c"), "note": "d"}]
    report = PromptReport()
    source = write_jsonl(tmp_path / "p.jsonl", [{"messages": [*turns, assistant("e", reasoning_content="Hm.")]}])
    list(read_prompts(str(source), PromptOptions(), model, report))
    assert set(report.unused) == {"messages.name", "messages.note", "messages.reasoning_content"}
