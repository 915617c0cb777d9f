"""Chat templates are programs of strangers: what they do wrong is said, and bounded, and the rest is reproducible."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import CHAT_TEMPLATE, files_of, generate_config, rows, write_jsonl
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import DataError, MismatchError, UnavailableError, UsageError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.config.data import GenerateConfig, ImportConfig
from dpkd_offline.config.recipe import from_recipe
from dpkd_offline.curation.import_pairs import import_pairs
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.generation.generate import generate
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts import chat
from dpkd_offline.prompts.chat import render_chat
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.retokenize import prompts_for
from dpkd_offline.prompts.templates import template_fingerprint, warn_of_template

WithTemplate = Callable[..., ModelInfo]
TURNS = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ENDED = CHAT_TEMPLATE.replace("</s>", "<end>")
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"


@pytest.fixture
def with_template(tmp_path: Path, students: dict[str, Path]) -> WithTemplate:
    """A model with this chat template."""

    def build(template: Any, name: str = "model", bos: str | None = None) -> ModelInfo:
        folder = Path(shutil.copytree(students["llama"], tmp_path / name))
        tokenizer = ModelInfo(str(folder)).tokenizer
        tokenizer.chat_template = template
        tokenizer.bos_token = bos
        (folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
        return ModelInfo(str(folder))

    return build


def prompts_of(model: ModelInfo, source: Path, **options: Any) -> list[Prompt]:
    return list(read_prompts(str(source), PromptOptions(**options), model, PromptReport()))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


USELESS = {  # by what it says: the template
    "line 2: unexpected '}'": "{% for m in messages %}\n{{ m['content'] }",
    "TypeError: unsupported operand": TURNS + "{{ 1 + 'a' }}",
    "'tools_of_mine' is undefined": TURNS + "{{ tools_of_mine.first.second }}",
    "ZeroDivisionError": "{{ 1 / 0 }}",
    "RecursionError": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "512 MiB of memory": "{{ 'a' * 10**10 }}",
    "512 MiB of memory ": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x * 2 %}{% endfor %}",
    "more than 16 times the text": "{{ 'a' * 10**7 }}",
    "surrogates not allowed": "{{ '\\ud800' }}",
    "it is only for adults": "{{ raise_exception('it is only\n for adults') }}",
    "more than 0.5 seconds": ENDLESS,
    "more than 0.5 seconds ": "{{ (3 ** 10000000) % 7 }}",
    "its chat template is empty": " \n",
    "no chat template to take": {"rag": TURNS, "tool_use": TURNS},
}


@pytest.mark.parametrize("reason", USELESS)
def test_a_template_that_works_with_no_prompt_is_named(
    reason: str, with_template: WithTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.5 if "seconds" in reason else 10)
    model, source = with_template(USELESS[reason]), write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Hi"}])
    started = time.monotonic()
    with pytest.raises(UnavailableError) as error:
        prompts_of(model, source)
    assert reason.strip() in str(error.value) and f"model '{model.name}'" in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 20
    assert prompts_of(model, source, template="alpaca")  # the way that the message names


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
LOOPS = "{% if 'loop' in messages[0].content %}" + ENDLESS + "{% endif %}"


def test_a_row_that_a_template_refuses_is_placed(
    with_template: WithTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]}
    twice = {"messages": [user("Hi"), user("again")]}
    for name, template, row, reason in (
        ("a", NO_SYSTEM, system, "column 'messages': .* cannot take it: no system"),
        ("b", ALTERNATES, twice, "column 'messages': .* cannot take it: roles must alternate"),
        ("c", LOOPS + CHAT_TEMPLATE, {"instruction": "loop"}, "column 'instruction': .* more than 0.5 seconds"),
        ("d", CHAT_TEMPLATE.replace("message['content']", "message['content'][:2]|int(default=None) + 1"),
         {"instruction": "x"}, "column 'instruction': .* TypeError"),
        ("e", "{{ messages[0].content|replace('zero', '') }}", {"instruction": "zero"},
         "column 'instruction' makes a prompt without any token"),
    ):  # fmt: skip
        monkeypatch.setattr(chat, "SECONDS", 0.5 if name == "c" else 10)
        source = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "12"}, row])
        with pytest.raises((DataError, UnavailableError), match=rf"p\.jsonl:2: {reason}") as error:
            prompts_of(with_template(template, name), source)
        assert isinstance(error.value, DataError) or name == "d"


def test_an_imported_row_that_a_template_refuses_is_placed(with_template: WithTemplate, tmp_path: Path) -> None:
    model = with_template(NO_SYSTEM)
    system = [{"role": "system", "content": "Be brief."}, user("Hi")]
    answers = {side: [*system, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    for row, column in (({"prompt": system, "chosen": "a", "rejected": "b"}, "prompt"), (answers, "chosen")):
        source = write_jsonl(tmp_path / "p.jsonl", [good, row])
        with pytest.raises(DataError, match=rf"p\.jsonl:2: column '{column}': the chat template .*: no system"):
            import_pairs(ImportConfig(source=str(source), dataset=tmp_path / "ds", model=model.name))
    assert not (tmp_path / "ds").exists()


def test_templates_make_what_transformers_makes_of_them(with_template: WithTemplate) -> None:
    talk = [
        {"role": "system", "content": "Ünïcode ☕\u2028"},
        user("a <b> 'c' \"d\" \\ {{ x }}"),
        user("\n  spaces \n"),
    ]
    tools = "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    block = "{% for m in messages %}\n    {% generation %}\n  {{- m.content }}\n {% endgeneration %}\n{% endfor %}"
    for n, template in enumerate(
        (CHAT_TEMPLATE, CHATML + BEGIN, LLAMA_2, tools, block, {"default": TURNS, "rag": "x"})
    ):
        model = with_template(template, f"model-{n}", bos="<|system|>")
        text = model.tokenizer.get_chat_template()
        for begin in (True, False):
            expected = model.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=begin)
            assert render_chat(text, talk, begin, dict(model.tokenizer.special_tokens_map))[0] == expected


def test_an_interrupted_question_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    assert render_chat("{{ messages[0].content }}", [user("one")], True, {})[0] == "one"
    renderer = chat._renderer
    assert renderer is not None and renderer._process.stdout is not None

    def interrupted() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(renderer._process, "stdout", type("Pipe", (), {"readline": staticmethod(interrupted)}))
    with pytest.raises(KeyboardInterrupt):
        render_chat("{{ messages[0].content }}", [user("two")], True, {})
    assert render_chat("{{ messages[0].content }}", [user("three")], True, {})[0] == "three"


def test_neither_clock_nor_chance_changes_a_dataset(
    with_template: WithTemplate, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Neither its prompts when the same call comes again, nor those of a student with another tokenizer."""
    dated = "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}{{ range(9999) | random }}" + CHAT_TEMPLATE
    teacher, source = with_template(dated), write_jsonl(tmp_path / "p.jsonl", rows(5))
    student = Path(shutil.copytree(foreign, tmp_path / "student"))
    (student / "chat_template.jinja").write_text("{{ strftime_now('%H:%M:%S.%f') }}" + ENDED)
    config = generate_config(tmp_path / "ds", "teacher", Path(teacher.name), prompts=str(source), max_new_tokens=2)
    generate(config)
    assert capsys.readouterr().err.count("writes the time: it is told 01 January 2025") == 1
    dataset, model = Dataset.open(tmp_path / "ds"), ModelInfo(str(student))
    before, rendered = files_of(tmp_path / "ds"), prompts_for(dataset, model).read(0)
    renderer = chat._renderer
    assert renderer is not None
    renderer.end()  # what comes is rendered by another process, at another time
    time.sleep(0.01)
    generate(config)
    assert files_of(tmp_path / "ds") == before
    assert prompts_for(dataset, model).read(0) == rendered
    assert dataset.prompts.read(0)[0].prompt.startswith("01 Jan 2025 00:00:00.000000")


def test_what_spoils_responses_is_said_once(
    with_template: WithTemplate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(2))
    other_end = "ends an answer with '<|system|>' (2), which is no EOS of the model; its EOS: '</s>' (1)"
    no_answer = "does not begin the answer (add_generation_prompt changes nothing): behind the question, prompts have "
    for n, (template, warning) in enumerate((
        (CHAT_TEMPLATE.replace("</s>", "<|system|>"), other_end),
        (TURNS, no_answer + "'', conversations with an answer '<|user|>'"),
        (CHATML, no_answer + r"'</s>\n', conversations with an answer '</s>\n<|im_start|>assistant\n'"),
        ("{{ bos_token * 2 }}" + CHAT_TEMPLATE, "begins prompts with '<|system|>' twice"),
        (CHAT_TEMPLATE, ""),
        (CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""),
        (LLAMA_2, ""),
    )):  # fmt: skip
        model = with_template(template, f"model-{n}", bos="<|system|>")
        for _ in range(2):
            prompts_of(model, source)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert (len(said), all(warning in line for line in said)) == (bool(warning), True), said


def test_text_that_is_probably_not_meant_is_said_once(
    with_template: WithTemplate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raw text for a chat model, unless the user calls it so or it has the template in it; special tokens in a turn."""
    with_marks = with_template(CHAT_TEMPLATE, "m", bos="<|system|>")
    with_words = with_template(LLAMA_2, "w", bos="<|system|>")
    raw, special = "column 'prompt' is raw text, without the chat template", "is given as a special token, not as text"
    for n, (model, texts, columns, said) in enumerate((
        (with_marks, [{"prompt": "Tea?"}, {"prompt": "Milk?"}], None, f"0.jsonl:1: {raw}"),
        (with_marks, [{"prompt": "<|user|>Tea?</s><|assistant|>"}, {"prompt": "Milk?"}], None, f"1.jsonl:2: {raw}"),
        (with_marks, [{"prompt": "<|system|>Tea?"}], None, raw),
        (with_words, [{"prompt": "<|system|>[INST] Tea? [/INST]"}], None, ""),
        (with_marks, [{"p": "Tea?"}], {"prompt": "p"}, ""),
        (with_marks, [{"prompt": "Tea?"}], {"instruction": "prompt"}, ""),
        (with_marks, [{"instruction": "<s>Tea"}, {"instruction": "a", "input": "</s>"}], None,
         f"6.jsonl:2: column 'instruction' holds '</s>', which '{with_marks.name}' {special}"),
        (with_marks, [{"messages": [user("<pad>" * n)]} for n in (1, 2)], None, special),
    )):  # fmt: skip
        source = write_jsonl(tmp_path / f"{n}.jsonl", texts)
        assert len(prompts_of(model, source, columns=columns)) == len(texts)
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert (len(warnings), all(said in line for line in warnings)) == (bool(said), True), warnings


def test_a_student_is_told_what_its_template_spoils(
    teachers: dict[str, Path], foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, source = Path(shutil.copytree(foreign, tmp_path / "student")), write_jsonl(tmp_path / "p.jsonl", rows(2))
    (student / "chat_template.jinja").write_text(ENDED.replace("<end>", "<pad>"))
    generate(generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=str(source), max_new_tokens=2))
    assert "ends an answer" not in capsys.readouterr().err
    generate(generate_config(tmp_path / "ds", "student", student, max_new_tokens=2))
    assert "ends an answer with '<pad>' (0), which is no EOS" in capsys.readouterr().err


def test_a_prompt_begins_with_one_bos(
    with_template: WithTemplate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_template(CHAT_TEMPLATE, bos="<|system|>")
    tokenizer = model.tokenizer
    adding = TemplateProcessing(single="<|system|> $A", special_tokens=[("<|system|>", 2)])
    tokenizer.backend_tokenizer.post_processor = adding
    assert tokenizer("<|system|>Tea")["input_ids"][:2] == [2, 2]
    source = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": text} for text in ("<|system|>Tea", "Tea", "<|system|><|system|>Tea")]
    )
    marked, plain, twice = prompts_of(model, source)
    assert marked.prompt_ids == plain.prompt_ids and plain.prompt_ids.count(2) == 1
    assert twice.prompt_ids.count(2) == 3  # what a row says twice is its own affair
    assert capsys.readouterr().err.count("warning: prompts begin with the text '<|system|>', and the tokenizer") == 1


THINKS = CHAT_TEMPLATE.replace(
    "<|assistant|>{%", "<|assistant|>{% if enable_thinking is false %}<think></think>{% endif %}{%"
)


def test_template_arguments_are_part_of_the_prompts(with_template: WithTemplate, foreign: Path, tmp_path: Path) -> None:
    model = with_template(THINKS.replace("is false", "is defined and enable_thinking is false"))
    source = write_jsonl(tmp_path / "p.jsonl", rows(3))
    student = Path(shutil.copytree(foreign, tmp_path / "student"))
    (student / "chat_template.jinja").write_text(ENDED + "{{ style }}")

    def config(name: str, role: str = "teacher", **changes: Any) -> GenerateConfig:
        folder = Path(model.name) if role == "teacher" else student
        return generate_config(tmp_path / name, role, folder, max_new_tokens=2, **changes)

    arguments = {"enable_thinking": False, "style": "pirate"}
    generate(config("plain", prompts=str(source)))
    generate(config("told", prompts=str(source), template_args=json.dumps(arguments)))
    plain, told = (Dataset.open(tmp_path / name).prompt_set for name in ("plain", "told"))
    assert "template_args" not in json.loads((tmp_path / "plain" / "dataset.json").read_text())["prompt_set"]
    assert told.template_args == arguments and told.id != plain.id
    assert plain.template_fingerprint == template_fingerprint("chat", model.tokenizer)
    assert told.template_fingerprint == template_fingerprint("chat", model.tokenizer, arguments)
    assert Dataset.open(tmp_path / "told").prompts.read(0)[0].prompt.endswith("<|assistant|><think></think>")
    assert verify(tmp_path / "told").rows["prompts"] == 3

    generate(config("told", prompts=str(source), template_args=arguments))  # goes on
    for changes in ({"template_args": {"style": "poet"}}, {"prompts": str(source)}):
        with pytest.raises(MismatchError, match=r"dataset\.json: its prompts"):
            generate(config("told", **changes))
    generate(config("told", "student"))
    seen = Dataset.open(tmp_path / "told").student_prompts
    assert seen.read(0)[0].prompt.endswith("<|assistant|>pirate")
    assert seen.require_provenance()["template_args"] == arguments
    with pytest.raises(UsageError, match="template_args are for a chat template, 'alpaca' takes none"):
        generate(config("new", prompts=str(source), template="alpaca", template_args=arguments))


def test_arguments_come_from_flags_and_recipes(tmp_path: Path) -> None:
    for value, message in (
        ("{", "expected a JSON object"),
        ("[1]", "dictionary"),
        ('{"messages": []}', "'messages' is"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptOptions.model_validate({"template_args": value})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: t\ngenerate:\n  template_args: {enable_thinking: false}\n")
    named = {"dataset": "d", "role": "teacher", "model": "m"}
    for flags, expected in (({}, {"enable_thinking": False}), ({"template_args": '{"a": 1}'}, {"a": 1})):
        assert from_recipe(GenerateConfig, "generate", recipe, {**named, **flags}).template_args == expected
    assert PromptOptions.model_validate({"template_args": {"a": 1}}).model_dump()["template_args"] == {"a": 1}
    assert "template_args" not in PromptOptions.model_validate({}).model_dump()


def beyond(folder: Path, target: Path) -> ModelInfo:
    """A model whose tokenizer has a token more than its embedding has rows."""
    shutil.copytree(folder, target)
    tokenizer = ModelInfo(str(target)).tokenizer
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(target)
    return ModelInfo(str(target))


def test_tokens_that_the_embedding_has_not_are_refused_with_their_row(
    teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    model, last = beyond(teachers["llama"], tmp_path / "model"), ModelInfo(str(teachers["llama"])).embedding_rows
    good, bad = {"instruction": "Hi"}, {"instruction": "Call <|tool|> now"}
    source = write_jsonl(tmp_path / "p.jsonl", [good, bad])
    message = rf"p\.jsonl:2: column 'instruction' has the token '<\|tool\|>' \({last}\), .* has {last} rows"
    with pytest.raises(DataError, match=message):
        generate(generate_config(tmp_path / "ds", "teacher", Path(model.name), prompts=str(source)))
    assert not (tmp_path / "ds").exists()
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        pair = {"prompt": "Hi", side: "Call <|tool|>", other: "Hi"}
        source = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Ho", "chosen": "a", "rejected": "b"}, pair])
        with pytest.raises(DataError, match=rf"q\.jsonl:2: column '{side}' has the token '<\|tool\|>'"):
            import_pairs(ImportConfig(source=str(source), dataset=tmp_path / "ds", model=model.name))
    # a model that shares the tokenizer, and not the size
    tokenizer = model.tokenizer
    larger = AutoModelForCausalLM.from_pretrained(model.name)
    larger.resize_token_embeddings(len(tokenizer))
    larger.save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    source = write_jsonl(tmp_path / "p.jsonl", [good, bad])
    generate(generate_config(tmp_path / "ds", "teacher", tmp_path / "larger", prompts=str(source), max_new_tokens=2))
    with pytest.raises(
        DataError, match=rf"row 1: column 'prompt_ids' holds a token id that a vocabulary of {last} has"
    ):
        generate(generate_config(tmp_path / "ds", "student", Path(model.name), max_new_tokens=2))


def test_a_template_without_faults_says_nothing(
    teachers: dict[str, Path], foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (*teachers.values(), foreign):
        model = ModelInfo(str(folder))
        warn_of_template(model, "chat" if model.tokenizer.chat_template else "alpaca")
    assert not capsys.readouterr().err
