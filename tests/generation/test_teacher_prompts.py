"""A teacher that is told more than its students, and a student that is told otherwise: who sees what, and what is
scored behind it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, files_of, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import MergeConfig, SubsetConfig
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.curation.merge import merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.pipeline.checks import Experiment, check_prompts
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.pipeline.survey import survey
from dpkd_offline.prompts.retokenize import prompts_for
from dpkd_offline.sharing.pull import pull
from dpkd_offline.sharing.push import push
from dpkd_offline.training.trainer import train

SYSTEM = "Zebrafish: answer as a fishmonger."
OWN = [{"role": "user", "content": "Quokka 9, and say why."}]  # what the teacher is asked in place of the first row's


def plain_logps(model: Any, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """log p of a response's tokens, by a plain forward pass."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])
    values: list[float] = logps[:, 0].tolist()
    return values


@pytest.fixture(scope="module")
def informed(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path]) -> Path:
    """A dataset whose teacher has a system turn, and of two rows a conversation of its own."""
    root = tmp_path_factory.mktemp("informed")
    values: list[dict[str, Any]] = [*rows(12)]
    values[0] |= {"teacher_messages": OWN}
    values[5] |= {"teacher_messages": [{"role": "system", "content": "Quokka."}, *OWN]}
    values[7] |= {"system": "Be kind."}
    source = write_jsonl(root / "prompts.jsonl", values)
    generate(generate_config(root / "ds", "teacher", teachers["llama"], prompts=str(source), teacher_system=SYSTEM))
    generate(generate_config(root / "ds", "student", students["llama"]))
    score_teacher(score_config(root / "ds", teachers["llama"], audit=4))
    return root / "ds"


def all_rows(table: Any) -> list[Any]:
    return [row for shard in range(table.plan.count) for row in table.read(shard)]


def test_both_responses_are_scored_behind_what_the_teacher_was_told(
    informed: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    dataset, tokenizer = Dataset.open(informed), ModelInfo(str(teachers["llama"])).tokenizer
    teacher, student = (load_model(str(models["llama"]), "float32") for models in (teachers, students))
    tables = dataset.prompts, dataset.prompts_seen_by("teacher"), dataset.pairs(0)
    assert tables[1].name == "prompts/teacher"
    for number, (seen, told, pair) in enumerate(zip(*map(all_rows, tables), strict=True)):
        asked = seen.messages[-1:] if number not in (0, 5) else OWN
        system = SYSTEM + {5: "\n\nQuokka.", 7: "\n\nBe kind."}.get(number, "")
        assert told.messages == [{"role": "system", "content": system}, *asked]
        text = "".join(f"<|{turn['role']}|>{turn['content']}</s>" for turn in told.messages) + "<|assistant|>"
        assert (told.prompt, told.prompt_ids) == (text, tokenizer(text, add_special_tokens=False)["input_ids"])
        assert (pair.id, pair.prompt, pair.prompt_ids) == (seen.id, seen.prompt, seen.prompt_ids)
        for ids, logps in (
            (pair.chosen_ids, pair.teacher_chosen_logps),
            (pair.rejected_ids, pair.teacher_rejected_logps),
        ):
            assert logps == pytest.approx(plain_logps(teacher, told.prompt_ids, ids), abs=1e-4)
            assert logps != pytest.approx(plain_logps(teacher, seen.prompt_ids, ids), abs=1e-2)
        own = plain_logps(student, seen.prompt_ids, pair.rejected_ids)
        assert pair.behavior_rejected_logps == pytest.approx(own, abs=1e-4)
    audit = json.loads((informed / "pairs/round-000/_audit.json").read_text())
    assert audit["gap_abs_max"] < 1e-4  # the audit asks behind the same prompts
    assert verify(informed).rows["prompts/teacher"] == 12


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[n : n + len(part)]) == list(part) for n in range(len(ids)))


def test_no_student_sees_what_the_teacher_was_told(informed: Path, teachers: dict[str, Path]) -> None:
    dataset, tokenizer = Dataset.open(informed), ModelInfo(str(teachers["llama"])).tokenizer
    words = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("Zebrafish", "Quokka")}
    told = all_rows(dataset.prompts_seen_by("teacher"))
    assert all(contains(prompt.prompt_ids, words["Zebrafish"]) for prompt in told)
    assert sum(contains(prompt.prompt_ids, words["Quokka"]) for prompt in told) == 2
    for table in (dataset.prompts, dataset.pairs(0)):
        for row in all_rows(table):
            for word, ids in words.items():
                assert word not in str(row) and not contains(row.prompt_ids, ids)


def test_a_dataset_is_that_of_its_teachers_system(
    informed: Path, tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    source, llama = str(informed.parent / "prompts.jsonl"), teachers["llama"]
    before = files_of(informed)
    for options in ({"prompts": source}, {}):
        generate(generate_config(informed, "teacher", llama, teacher_system=SYSTEM, **options))
    generate(generate_config(informed, "student", students["llama"], teacher_system=SYSTEM))
    assert files_of(informed) == before
    with pytest.raises(MismatchError, match="is told something else: 'Zebrafish"):
        generate(generate_config(informed, "teacher", llama, teacher_system="Be brief."))
    with pytest.raises(MismatchError, match="its prompts are not those of"):
        generate(generate_config(informed, "teacher", llama, prompts=source))
    begun = shutil.copytree(informed, tmp_path / "begun")  # as a command leaves it that ends before dataset.json
    (begun / "dataset.json").unlink()
    generate(generate_config(begun, "teacher", llama, prompts=source, teacher_system=SYSTEM))
    assert files_of(begun) == before
    (begun / "dataset.json").unlink()
    shutil.rmtree(begun / "responses")
    with pytest.raises(MismatchError, match="prompts/teacher was made with system=Zebrafish"):
        generate(generate_config(begun, "teacher", llama, prompts=source, teacher_system="Be brief."))
    plain = tmp_path / "plain"
    generate(generate_config(plain, "teacher", llama, prompts=str(write_jsonl(tmp_path / "p.jsonl", rows(3)))))
    with pytest.raises(MismatchError, match="is told nothing besides; leave --teacher-system out"):
        generate(generate_config(plain, "teacher", llama, teacher_system=SYSTEM))
    assert "teacher_prompts" not in json.loads((plain / "dataset.json").read_text())["prompt_set"]


def test_limits_hold_for_what_the_teacher_sees(tmp_path: Path, teachers: dict[str, Path]) -> None:
    source = str(write_jsonl(tmp_path / "p.jsonl", [*rows(3), {"prompt": "Raw text."}]))
    config = generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=source, teacher_system=SYSTEM)
    with pytest.raises(DataError, match=r"p\.jsonl:4: column 'prompt' is raw text, and takes no system turn"):
        generate(config)
    long = {"teacher_system": 10 * SYSTEM, "max_prompt_tokens": 100, "on_bad_row": "skip"}
    with pytest.raises(DataError, match=r"no prompt is left: 0 of 4 rows \(dropped: 3 longer than max-prompt-tokens"):
        generate(config.model_copy(update=long))
    with pytest.raises(UsageError, match="teacher_system is for a chat template"):
        generate(config.model_copy(update={"template": "alpaca"}))
    wrong = write_jsonl(tmp_path / "w.jsonl", [{**rows(1)[0], "teacher_messages": "Say it."}])
    with pytest.raises(DataError, match=r"w\.jsonl:1: column 'teacher_messages' is text, and no JSON of a list"):
        generate(generate_config(tmp_path / "ds", "teacher", teachers["llama"], prompts=str(wrong)))


def test_a_recipe_says_it_once(tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]) -> None:
    small = {"engine": "transformers", "dtype": "float32", "max_length": 200}
    source = {"prompts": str(write_jsonl(tmp_path / "p.jsonl", rows(8))), "max_new_tokens": 8, "shard_size": 4}
    values = {
        **{"teacher": str(teachers["llama"]), "student": str(students["llama"]), "output": str(tmp_path / "run")},
        **{"generate": {**small, **source, "teacher_system": SYSTEM}, "score_teacher": small},
        "train": {"max_steps": 1, "batch_size": 4, "dtype": "float32"},
    }
    recipe = Recipe.model_validate(values)
    stages = plan(recipe)
    training, _ = survey(recipe, stages)
    check_prompts(Experiment(recipe, stages), training, None)
    makers: dict[str, Any] = {"generate": generate, "score-teacher": score_teacher, "train": train}
    for stage in stages:
        makers[stage.command](stage.config)
    dataset = Dataset.open(tmp_path / "run" / "dataset")
    assert dataset.longest_of_teacher[1] == training.longest_of_teacher > training.longest
    assert dataset.prompt_set.longest_prompt_tokens == training.longest
    assert "Zebrafish" not in str(all_rows(dataset.pairs(0))) and verify(dataset.root).rows["prompts/teacher"] == 8
    values["generate"] |= {"max_length": training.longest + 8}  # that of the teacher does not fit
    tight = Recipe.model_validate(values)
    with pytest.raises(UsageError, match=rf"the longest prompt has {training.longest_of_teacher} tokens"):
        check_prompts(Experiment(tight, plan(tight)), training, None)


def test_merge_and_subset_carry_the_teachers_prompts(informed: Path, tmp_path: Path, teachers: dict[str, Path]) -> None:
    half = subset(SubsetConfig(dataset=informed, output=tmp_path / "half", share=0.5)).path
    twice = merge(MergeConfig(output=tmp_path / "twice", parts=(half, informed), shard_size=5)).path
    told = {prompt.id: prompt for prompt in all_rows(Dataset.open(informed).prompts_seen_by("teacher"))}
    for folder, count in ((half, len(all_rows(Dataset.open(half).prompts))), (twice, 12)):
        assert verify(folder).rows["prompts/teacher"] == count
        dataset = Dataset.open(folder)
        assert all(prompt == told[prompt.id] for prompt in all_rows(dataset.prompts_seen_by("teacher")))
    push(informed, str(tmp_path / "pushed"))
    pull(str(tmp_path / "pushed"), tmp_path / "pulled", ("pairs",))
    assert {"prompts", "prompts/teacher", "pairs/round-000"} == verify(tmp_path / "pulled").rows.keys()
    source = str(write_jsonl(tmp_path / "p.jsonl", rows(3)))
    generate(generate_config(tmp_path / "plain", "teacher", teachers["llama"], prompts=source))
    with pytest.raises(MismatchError, match="its teacher sees prompts of its own"):
        merge(MergeConfig(output=tmp_path / "out", parts=(tmp_path / "plain", informed)))


def test_pairs_by_rule_carry_the_teachers_prompts(
    tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    folder, source = tmp_path / "ds", str(write_jsonl(tmp_path / "p.jsonl", rows(3)))
    options = {"prompts": source, "teacher_system": SYSTEM, "samples": 2, "max_new_tokens": 4}
    generate(generate_config(folder, "teacher", teachers["llama"], **options))
    generate(generate_config(folder, "student", students["llama"]))
    score_teacher(score_config(folder, teachers["llama"]))
    pairs = subset(SubsetConfig(dataset=folder, output=tmp_path / "pairs", pairs="each")).path
    assert verify(pairs).rows["prompts/teacher"] == 6
    told = {prompt.id: prompt.prompt for prompt in all_rows(Dataset.open(folder).prompts_seen_by("teacher"))}
    seen = all_rows(Dataset.open(pairs).prompts_seen_by("teacher"))
    assert [(row.id, row.prompt) for row in seen] == [
        (f"{id_}::pair-t{sample}s0", prompt) for id_, prompt in told.items() for sample in range(2)
    ]


def test_verify_finds_other_prompts_of_the_teacher(informed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(informed, tmp_path / "ds")
    table = Dataset.open(folder).prompts_seen_by("teacher")
    shard = table.read(0)
    shard[2].prompt_ids[3] += 1
    replace_shard(table, 0, to_table(shard, Prompt.schema))
    with pytest.raises(MismatchError, match=r"prompt_set\.id is not that of these prompts"):
        verify(folder)
    shutil.rmtree(folder / "prompts/teacher")
    with pytest.raises(MismatchError, match="prompts/teacher: is not there"):
        verify(folder)


# --- teacher and student with one tokenizer, and each its own prompts -------------------------------------------------

THINKS = CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>{% if think %}Well, {% endif %}")


def thinker(folder: Path, original: Path) -> Path:
    """A model whose chat template may be told to think."""
    shutil.copytree(original, folder)
    (folder / "chat_template.jinja").write_text(THINKS)
    return folder


@pytest.fixture(scope="module")
def apart(
    tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path]
) -> dict[str, Path]:
    """A teacher that thinks, and students that do not, do, and have a system turn; all with one tokenizer."""
    root = tmp_path_factory.mktemp("apart")
    teacher, student = (thinker(root / n, models["llama"]) for n, models in (("big", teachers), ("small", students)))
    source, folder = str(write_jsonl(root / "p.jsonl", rows(10))), root / "ds"
    generate(generate_config(folder, "teacher", teacher, prompts=source, template_args={"think": True}))
    generate(generate_config(folder, "student", student, template_args={"think": False}))
    generate(generate_config(folder, "student", student, student_name="same"))
    generate(generate_config(folder, "student", student, student_name="kind", system="Be kind."))
    for name in (None, "same", "kind"):
        score_teacher(score_config(folder, teacher, student_name=name))
    return {"teacher": teacher, "student": student, "dataset": folder}


def test_a_student_may_see_the_prompts_otherwise_than_its_teacher(apart: dict[str, Path], tmp_path: Path) -> None:
    folder, tokenizer = apart["dataset"], ModelInfo(str(apart["teacher"])).tokenizer
    teacher = load_model(str(apart["teacher"]), "float32")
    begins = {None: "<|user|>", "same": "<|user|>", "kind": "<|system|>Be kind.</s><|user|>"}
    ends = {None: "</s><|assistant|>", "same": "</s><|assistant|>Well, ", "kind": "</s><|assistant|>Well, "}
    responses = {}
    for name, end in ends.items():
        dataset = Dataset.open(folder, name)
        own = prompts_for(dataset, ModelInfo(str(apart["student"])))
        assert own.name == dataset.prompts_seen_by("student").name
        y_s, pairs = all_rows(dataset.responses("student", 0)), all_rows(dataset.pairs(0))
        responses[name] = [row.response_ids for row in y_s]
        for prompt, sampled, pair in zip(all_rows(dataset.prompts), y_s, pairs, strict=True):
            assert prompt.prompt.endswith("</s><|assistant|>Well, ")
            assert pair.prompt == begins[name] + prompt.messages[0]["content"] + end
            assert pair.prompt_ids == tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
            assert pair.rejected_ids == sampled.response_ids and pair.rejected_exact and pair.chosen_exact
            assert pair.behavior_rejected_logps == sampled.logps
            for ids, logps in (
                (pair.chosen_ids, pair.teacher_chosen_logps),
                (pair.rejected_ids, pair.teacher_rejected_logps),
            ):
                assert logps == pytest.approx(plain_logps(teacher, prompt.prompt_ids, ids), abs=1e-4)
    assert responses[None] != responses["same"] != responses["kind"]  # nothing was copied from one to another
    places = ("prompts/student", "students/same/prompts/student", "students/kind/prompts/student")
    assert [(folder / place).exists() for place in places] == [True, False, True]
    verify(folder)
    verify(subset(SubsetConfig(dataset=folder, output=tmp_path / "half", share=0.5)).path)
    (folder / "prompts" / "student").rename(tmp_path / "hidden")
    with pytest.raises(DataError, match="belongs to prompts of its student's own"):
        verify(folder)
    (tmp_path / "hidden").rename(folder / "prompts" / "student")


def test_a_student_keeps_to_its_prompts(apart: dict[str, Path], tmp_path: Path) -> None:
    folder, before = apart["dataset"], files_of(apart["dataset"])
    for options in ({}, {"template_args": {"think": False}}, {"student_name": "same"}, {"student_name": "kind"}):
        generate(generate_config(folder, "student", apart["student"], **options))
    assert files_of(folder) == before
    with pytest.raises(MismatchError, match="template_fingerprint"):
        generate(generate_config(folder, "student", apart["student"], template_args={"think": "a little"}))
    with pytest.raises(MismatchError, match="answers the prompts as the dataset has them"):
        generate(generate_config(folder, "student", apart["student"], student_name="same", system="Be kind."))
    with pytest.raises(MismatchError, match="were made with template_args"):
        generate(generate_config(folder, "teacher", apart["teacher"], template_args={"think": False}))
    source = str(write_jsonl(tmp_path / "p.jsonl", rows(20)[10:]))
    generate(
        generate_config(tmp_path / "ds", "teacher", apart["teacher"], prompts=source, template_args={"think": True})
    )
    generate(generate_config(tmp_path / "ds", "student", apart["student"]))
    with pytest.raises(MismatchError, match="template_fingerprint is None"):
        merge(MergeConfig(output=tmp_path / "out", parts=(folder, tmp_path / "ds")))
