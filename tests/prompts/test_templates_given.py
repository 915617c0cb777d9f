"""Templates from a file, system turns from an option and conversations with tools, through all that is made of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import train_config
from helpers.tiny import CHAT_TEMPLATE, generate_config, rows, score_config, write_jsonl

from dpkd_offline.common.errors import MismatchError, UsageError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.config.data import ImportConfig, MergeConfig, SubsetConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.curation.import_pairs import import_pairs
from dpkd_offline.curation.merge import merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.retokenize import prompts_for
from dpkd_offline.training.trainer import train

THINKS = CHAT_TEMPLATE.replace(
    "<|assistant|>{%",
    "<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{%",
)
OWN = "{{ tools | tojson if tools else '' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}" + (
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_thinking_on_and_off_are_other_prompts(teachers: dict[str, Path], tmp_path: Path) -> None:
    template, source = tmp_path / "thinks.jinja", write_jsonl(tmp_path / "p.jsonl", rows(3))
    template.write_text(THINKS)
    sets = {}
    for name, changes in {"unsaid": {}, "on": {"enable_thinking": True}, "off": {"enable_thinking": False}}.items():
        options: dict[str, Any] = {"prompts": str(source), "template": str(template), "max_new_tokens": 2}
        config = generate_config(
            tmp_path / name, "teacher", teachers["llama"], template_args=changes or None, **options
        )
        generate(config)
        sets[name] = Dataset.open(tmp_path / name).prompt_set
        assert Dataset.open(tmp_path / name).prompts.read(0)[0].prompt.endswith("<think></think>") == (name == "off")
        card = (tmp_path / name / "README.md").read_text()
        assert "template `chat` of a file" in card
        assert ('with `{"enable_thinking": false}`' in card) == (name == "off")
    assert len({of.template_fingerprint for of in sets.values()}) == 3 == len({of.id for of in sets.values()})
    with pytest.raises(MismatchError, match="template_fingerprint is"):
        merge(MergeConfig(output=tmp_path / "both", parts=(tmp_path / "on", tmp_path / "off")))
    for other in ({"template_args": {"enable_thinking": True}}, {"prompts": str(source), "template": str(template)}):
        with pytest.raises(MismatchError, match=r"dataset\.json: its prompts"):
            generate(generate_config(tmp_path / "off", "teacher", teachers["llama"], max_new_tokens=2, **other))
    for value in ("alpaka", str(tmp_path / "none.jinja")):
        with pytest.raises(ValueError, match="is neither auto, chat, alpaca or none, nor a file"):
            PromptOptions(template=value)


def test_a_system_turn_is_for_rows_that_have_none(teachers: dict[str, Path], tmp_path: Path) -> None:
    given = [{"id": "a", "instruction": "Tea?"}, {"id": "b", "instruction": "Tea?", "system": "Be long."}]
    source = write_jsonl(tmp_path / "p.jsonl", given)
    config = {"prompts": str(source), "max_new_tokens": 2}
    plain = generate_config(tmp_path / "plain", "teacher", teachers["llama"], **config)
    brief = generate_config(tmp_path / "brief", "teacher", teachers["llama"], system="Be brief.", **config)
    generate(plain)
    generate(brief)
    assert [prompt.prompt for prompt in Dataset.open(tmp_path / "brief").prompts.read(0)] == [
        f"<|system|>{text}</s><|user|>Tea?</s><|assistant|>" for text in ("Be brief.", "Be long.")
    ]
    assert "system" not in json.loads((tmp_path / "plain" / "dataset.json").read_text())["prompt_set"]
    assert Dataset.open(tmp_path / "brief").prompt_set.system == "Be brief."
    assert "system turn `Be brief.`" in (tmp_path / "brief" / "README.md").read_text()
    generate(brief.model_copy(update={"prompts": None}))
    with pytest.raises(MismatchError, match=r'were made with system "Be brief."; leave --system out'):
        generate(brief.model_copy(update={"prompts": None, "system": "Be kind."}))
    with pytest.raises(UsageError, match="system is for a chat template, 'none' writes no system turn"):
        generate(brief.model_copy(update={"dataset": tmp_path / "new", "template": "none"}))
    unnamed = write_jsonl(tmp_path / "q.jsonl", [{"instruction": "Tea?"}])
    ids = []
    for name, system in (("x", None), ("y", "Be brief.")):
        changes = {"prompts": str(unnamed), "max_new_tokens": 2, "system": system}
        generate(generate_config(tmp_path / name, "teacher", teachers["llama"], **changes))
        ids.append(Dataset.open(tmp_path / name).prompts.read(0)[0].id)
    assert ids[0] == ids[1]  # of the row


CALL = {"function": {"name": "rain", "arguments": {"in": "Rom"}}}
TOOLS = [{"type": "function", "function": {"name": "rain", "description": "", "parameters": {}}}]
TALK = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "wet"},
]


@pytest.fixture(scope="module")
def talking(teachers: dict[str, Path], foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of plain prompts and one with tools, answered and scored, whose student has its own tokens."""
    folder = tmp_path_factory.mktemp("talking")
    (folder / "own.jinja").write_text(OWN)
    (folder / "student.jinja").write_text("{{ '#' }}" + OWN)
    given = [*rows(3), {"id": "talk", "messages": TALK, "tools": TOOLS, "reference": "It rains in Rome."}]
    asked = [{"role": "user", "content": "Sun?"}, *TALK[1:]]
    called = {"id": "called", "messages": [*asked, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS}
    source = write_jsonl(folder / "p.jsonl", [*given, called])
    shared = {"max_new_tokens": 4, "shard_size": 2}
    file, dataset = str(folder / "own.jinja"), folder / "ds"
    generate(generate_config(dataset, "teacher", teachers["llama"], prompts=str(source), template=file,
                             system="Be brief.", **shared))  # fmt: skip
    generate(generate_config(dataset, "student", foreign, template=str(folder / "student.jinja"),
                             system="Be kind.", **shared))  # fmt: skip
    score_teacher(score_config(dataset, teachers["llama"], student=str(foreign)))
    return folder


def test_a_student_with_another_tokenizer_gets_the_same_by_its_own_template(
    talking: Path, foreign: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(talking / "ds")
    *_, talk, called = (prompt for shard in range(3) for prompt in dataset.prompts.read(shard))
    *_, seen, seen_call = (prompt for shard in range(3) for prompt in dataset.student_prompts.read(shard))
    assert talk.conversation is not None
    assert json.loads(talk.conversation)["messages"] == [{"role": "system", "content": "Be brief."}, *TALK]
    assert seen.prompt == "#" + talk.prompt.replace("Be brief.", "Be kind.") and "[tool]wet<end>" in seen.prompt
    assert (seen.messages, seen.conversation, seen.references) == (talk.messages, talk.conversation, talk.references)
    assert called.references == seen_call.references == [json.dumps(CALL["function"])]
    assert dataset.prompt_set.columns == {"conversation": "string"} and dataset.prompt_set.chat_template == OWN
    made = dataset.student_prompts.require_provenance()
    assert made["chat_template"] == "{{ '#' }}" + OWN and made["system"] == "Be kind."
    assert prompts_for(dataset, ModelInfo(str(foreign))).read(1)[1] == seen
    assert verify(talking / "ds").rows["prompts/student"] == 5
    for name in ("dataset.json", "prompts/student/_table.json"):
        shutil.copytree(talking / "ds", tmp_path / name)
        path = tmp_path / name / name
        path.write_text(path.read_text().replace("[assistant]", "[somebody]"))
        with pytest.raises(MismatchError, match="template_fingerprint is not that of chat_template"):
            verify(tmp_path / name)
    assert "system turn `Be kind.`" in (talking / "ds" / "README.md").read_text()


def test_another_template_of_the_teacher_is_refused(talking: Path, teachers: dict[str, Path]) -> None:
    for template in ("chat", "none", str(talking / "student.jinja")):
        with pytest.raises(
            MismatchError, match=r"made with another template \('chat' of a file\); leave --template out"
        ):
            generate(generate_config(talking / "ds", "teacher", teachers["llama"], template=template, max_new_tokens=4))
    generate(generate_config(talking / "ds", "teacher", teachers["llama"], template=str(talking / "own.jinja"),
                             max_new_tokens=4, shard_size=2))  # fmt: skip


def test_such_rows_are_trained_on_measured_and_recombined(
    talking: Path, foreign: Path, teachers: dict[str, Path], tmp_path: Path
) -> None:
    for objective in ("dpkd", "sft"):
        output = tmp_path / objective
        train(train_config(talking / "ds", foreign, output, objective=objective, epochs=1, max_length=1024))
        saved = ModelInfo(str(output)).tokenizer.chat_template
        assert saved == "{{ '#' }}" + OWN != ModelInfo(str(foreign)).tokenizer.chat_template
        assert "Prompt template: `chat` of a file, system turn `Be kind.`." in (output / "README.md").read_text()
    source = write_jsonl(tmp_path / "q.jsonl", [{"messages": TALK, "tools": TOOLS, "reference": "It rains."}])
    teacher = Path(shutil.copytree(teachers["llama"], tmp_path / "teacher"))
    (teacher / "chat_template.jinja").write_text(OWN)
    evaluate(
        EvaluateConfig(
            model=str(foreign), teacher=str(teacher), prompts=str(source), output=tmp_path / "eval",
            template=str(talking / "student.jinja"), engine="transformers", dtype="float32", seeds=(1,),
            max_new_tokens=2,
        )
    )  # fmt: skip
    (line,) = (tmp_path / "eval" / "responses.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][1:] == [
        TALK[0], {"role": "assistant", "content": json.dumps(CALL["function"])}, TALK[2]
    ]  # fmt: skip
    plain = generate_config(tmp_path / "plain", "teacher", teachers["llama"], max_new_tokens=4,
                            prompts=str(write_jsonl(tmp_path / "p.jsonl", [*rows(1), *rows(6)[5:]])),
                            template=str(talking / "own.jinja"), system="Be brief.")  # fmt: skip
    generate(plain)
    assert Dataset.open(tmp_path / "plain").prompt_set.columns == {}
    result = merge(MergeConfig(output=tmp_path / "all", parts=(tmp_path / "plain", talking / "ds"), shard_size=3))
    assert (result.rows, result.left_out) == (6, 1)
    whole = [prompt for shard in range(2) for prompt in Dataset.open(tmp_path / "all").prompts.read(shard)]
    assert [prompt.conversation is not None for prompt in whole] == [False] * 4 + [True] * 2
    subset(SubsetConfig(dataset=tmp_path / "all", output=tmp_path / "few", limit=3))
    assert Dataset.open(tmp_path / "few").prompt_set.columns == {}
    subset(SubsetConfig(dataset=talking / "ds", output=tmp_path / "some", limit=3))
    for folder in ("all", "few", "some"):
        verify(tmp_path / folder)


def test_such_rows_are_imported(talking: Path, teachers: dict[str, Path], tmp_path: Path) -> None:
    pairs = [
        {"prompt": TALK, "tools": TOOLS, "chosen": "It rains.", "rejected": "No."},
        {"tools": TOOLS, **{side: [*TALK, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}},
    ]
    config = ImportConfig(source=str(write_jsonl(tmp_path / "p.jsonl", pairs)), dataset=tmp_path / "ds",
                          model=str(teachers["llama"]), template=str(talking / "own.jinja"))  # fmt: skip
    import_pairs(config)
    prompts: list[Prompt] = Dataset.open(tmp_path / "ds").prompts.read(0)
    text = (
        json.dumps(TOOLS)
        + "[user]Rain?<end>[assistant]"
        + json.dumps(CALL["function"])
        + "<end>[tool]wet<end>[assistant]"
    )
    assert [prompt.prompt for prompt in prompts] == [text] * 2 and prompts[0].conversation == prompts[1].conversation
    verify(tmp_path / "ds")
