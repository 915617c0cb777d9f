"""What a recipe's later stages need is known before the first one runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_recipe
from helpers.tiny import rows, write_jsonl

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.pipeline import checks
from dpkd_offline.pipeline.distill import distill
from dpkd_offline.pipeline.dry_run import plan_of_work


def without_references(count: int) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "reference"} for row in rows(count)]


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (["teacher=/nowhere/model"], UsageError, "teacher: /nowhere/model: no such folder"),
        (["generate.prompts=nowhere.jsonl"], UsageError, "generate.prompts: nowhere.jsonl: no such file"),
        (["evaluate.prompts=a/b/c"], UsageError, "evaluate.prompts: a/b/c: no such file"),
        (["train.lm_corpus=nowhere.jsonl"], UsageError, "train.lm_corpus: nowhere.jsonl: no such file"),
        (["train.objective=kd"], UsageError, "train.objective: 'kd' reads the teacher's likeliest tokens"),
        (["score_teacher.engine=http"], UsageError, "score_teacher.engine: engine 'http' needs --url"),
        (["evaluate.engine=http", "evaluate.url=http://x"], UsageError, "evaluate.url: its servers hold one model"),
        (["train.track=wandb"], UnavailableError, "train.track: --track wandb: not installed"),
        (["train.lora_rank=2", "train.lora_output=adapter"], UsageError, "train.lora_output: later stages need"),
        (["generate.max_new_tokens=250"], UsageError, "generate.max_new_tokens: the longest prompt has"),
        (["evaluate.tasks=a/b.yaml"], UsageError, "evaluate.tasks: a/b.yaml: no such file or folder"),
        (["evaluate.max_new_tokens=250"], UsageError, "evaluate.max_new_tokens: the longest prompt has"),
        (["generate.max_prompt_tokens=1"], DataError, "generate.prompts: "),
        (["generate.prompts=data/train.csv"], UsageError, "generate.prompts: data/train.csv: no such file"),
        (["train.holdout=0.99"], UsageError, "train.holdout: 0.99 holds out all 12 prompts; lower it"),
        (
            ["train.validate_rouge=4", "train.holdout=0.02"],
            UsageError,
            "train.validate_rouge: no prompt is held out for it; raise holdout",
        ),
        (["train.student_name=small"], UsageError, "train.student_name: 'small', and the student's responses are made"),
        (["train.round=1"], UsageError, "train.round: 1, and the student's responses are made with 0 (generate.round)"),
        (["score_teacher.round=2"], UsageError, "score_teacher.round: 2, and the student's responses are made with 0"),
        (["generate.num_shards=2"], UsageError, "generate.num_shards: distill makes whole tables"),
        (["init_student.layers=9"], UsageError, "layers: the teacher has 4, the student needs 1 to 3"),
        (
            ["train.objective=kd", "score_teacher.top_k=4", "regenerate={every: 1}"],
            UsageError,
            "objective 'kd' reads y_t alone, so that new y_s change nothing",
        ),
        (["train.objective=minillm"], UsageError, "train.objective: 'minillm' reads the teacher's likeliest tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_stage_that_would_fail_is_an_error_that_names_its_key(
    tmp_path: Path, teachers: dict[str, Path], changes: list[str], error: type[DpkdError], sentence: str
) -> None:
    recipe = read_recipe(write_recipe(tmp_path, teachers["llama"]), changes)
    with pytest.raises(error) as raised:
        plan_of_work(recipe)
    assert str(raised.value).startswith(sentence)


def test_distill_checks_before_it_runs_anything(tmp_path: Path, teachers: dict[str, Path]) -> None:
    recipe = read_recipe(write_recipe(tmp_path, teachers["llama"]), ["train.objective=akl"])
    with pytest.raises(UsageError, match=r"score_teacher\.top_k is 0"):
        distill(recipe)
    assert not (tmp_path / "run").exists()


def test_a_template_that_the_students_model_has_not(tmp_path: Path, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    changes = ["init_student=null", f"student={teachers['opt']}", "evaluate=null", "generate.template=chat"]
    with pytest.raises(
        UsageError, match=r"generate\.template: .*: template 'chat': this model's tokenizer has no chat"
    ):
        plan_of_work(read_recipe(path, changes))


def test_rounds_that_never_begin_and_prompts_that_are_not_held_out_are_warnings(
    tmp_path: Path, teachers: dict[str, Path]
) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    changes = ["sft=null", "regenerate={when: epochs, every: 2}", "train.holdout=0.2", "train.max_steps=3"]
    (warning,) = plan_of_work(read_recipe(path, changes)).warnings
    assert warning == "regenerate.every: the first round would begin after 4 steps, and train takes 3"
    assert not plan_of_work(read_recipe(path, [*changes, "train.max_steps=5"])).warnings
    (warning,) = plan_of_work(read_recipe(path, ["sft=null", "train.holdout=0.02"])).warnings
    assert warning.startswith("train.holdout: 0.02 holds out none of 12 prompts")


def test_packages_that_are_not_installed(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    path = write_recipe(tmp_path, teachers["llama"])
    for changes, sentence in (
        (["sft.lora_rank=2"], "sft.lora_rank: PEFT is not installed"),
        (["generate.cluster=ray"], "generate.cluster: Ray is not installed"),
    ):
        with pytest.raises(UnavailableError, match=sentence):
            plan_of_work(read_recipe(path, changes))


def test_word_level_objectives_need_one_tokenizer(tmp_path: Path, teachers: dict[str, Path], foreign: Path) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    changes = ["init_student=null", f"student={foreign}", "score_teacher.top_k=4"]
    assert plan_of_work(read_recipe(path, changes)).works
    with pytest.raises(UsageError, match=r"train\.objective: 'kd' compares teacher and student token by token"):
        plan_of_work(read_recipe(path, [*changes, "train.objective=kd"]))


def test_references_where_a_stage_needs_them(tmp_path: Path, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    write_jsonl(tmp_path / "train.jsonl", [*without_references(3), *rows(12)[3:]])
    assert plan_of_work(read_recipe(path)).warnings == ["sft: 3 of 12 prompts have no reference and are left out"]
    write_jsonl(tmp_path / "train.jsonl", without_references(12))
    with pytest.raises(UsageError, match="sft: it trains on references, and no prompt has one"):
        plan_of_work(read_recipe(path))
    with pytest.raises(UsageError, match=r"train\.validate_rouge: it needs references"):
        plan_of_work(read_recipe(path, ["sft=null", "train.validate_rouge=4"]))
    assert not plan_of_work(read_recipe(path, ["sft=null"])).warnings
    write_jsonl(tmp_path / "test.jsonl", without_references(6))
    with pytest.raises(DataError, match=r"evaluate\.prompts: .*test\.jsonl:1: column 'reference' is missing"):
        plan_of_work(read_recipe(path, ["sft=null"]))


def test_what_may_go_wrong_is_a_warning(tmp_path: Path, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    write_jsonl(tmp_path / "test.jsonl", rows(18)[10:])
    changes = ["train.max_length=20", "score_teacher.max_length=21", "init_student.layers=3"]
    warnings = plan_of_work(read_recipe(path, changes)).warnings
    assert [warning.partition(":")[0] for warning in warnings] == [
        "score_teacher.max_length",
        "train.max_length",
        "evaluate.prompts",
    ]
    assert warnings[-1] == "evaluate.prompts: 2 of 8 are prompts that the student is trained on"
    told = ["generate.system=Be brief."]
    first = plan_of_work(read_recipe(path, told)).warnings[0]
    assert first.startswith("evaluate.system: None, and the student is trained on prompts with 'Be brief.': it is ")
    assert len(plan_of_work(read_recipe(path, [*told, "evaluate.system=Be brief."])).warnings) == 1


def test_a_corpus_is_read_before_hours_are_spent(tmp_path: Path, teachers: dict[str, Path]) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"text": "few words"}])
    with pytest.raises(DataError, match=r"train\.lm_corpus: lm-corpus: fewer than 64 tokens"):
        plan_of_work(read_recipe(path, [f"train.lm_corpus={corpus}", "train.lm_length=64"]))
    with pytest.raises(UsageError, match=r"train\.lm_length: 300 tokens, the context of the student has 256"):
        plan_of_work(read_recipe(path, [f"train.lm_corpus={corpus}", "train.lm_length=300"]))
    assert plan_of_work(read_recipe(path, [f"train.lm_corpus={corpus}", "train.lm_length=2"])).works
