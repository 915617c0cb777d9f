"""The stages of a recipe, with their configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.locations import RemotePath
from dpkd_offline.config.base import Config
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig, SubsetConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.recipe import Recipe, recipe_section
from dpkd_offline.config.train import InitStudentConfig, TrainConfig

COMMANDS: dict[type[Config], str] = {
    EvaluateConfig: "evaluate",
    GenerateConfig: "generate",
    InitStudentConfig: "init-student",
    JudgeConfig: "judge",
    ScoreTeacherConfig: "score-teacher",
    SubsetConfig: "subset",
    TrainConfig: "train",
}


@dataclass(frozen=True)
class Places:
    """Where the stages of a recipe write."""

    dataset: Path
    start: Path  # the students before training: student-init, student-sft, student-warm
    run: Path  # student, judge
    evaluations: Mapping[str, Path]  # by what is evaluated
    start_name: str | None = None  # in the dataset, of the student that answers first
    run_name: str | None = None  # in the dataset, of the student that is trained

    @classmethod
    def of(cls, root: Path) -> Places:
        """Those of a single recipe: all in its output."""
        names = ("teacher", "student before", "student warm", "student after")
        evaluations = {name: root / "evaluation" / name.replace(" ", "-") for name in names}
        return cls(root / "dataset", start=root, run=root, evaluations=evaluations)


@dataclass(frozen=True)
class Stage:
    """One command of the experiment."""

    title: str
    section: str  # of the recipe
    config: Config

    @property
    def command(self) -> str:
        return COMMANDS[type(self.config)]


def plan(recipe: Recipe, file: Path | None = None, places: Places | None = None) -> list[Stage]:
    """The stages of a recipe with their configs, in the order in which they run.

    Args:
        file: the file of the recipe, for error messages.
        places: where they write; by default in its output.

    Raises:
        UsageError: a section has an unknown key or a wrong value.
    """
    return list(_stages(recipe, file, places or Places.of(recipe.output)))


def _stages(recipe: Recipe, file: Path | None, places: Places) -> Iterator[Stage]:
    """The experiment from top to bottom.

    The teacher responds before the student is fine-tuned, because `generate` reads the prompts into the dataset that
    `train` needs.
    """
    stage = partial(_stage, recipe, file)
    start, teacher = places.start, recipe.teacher
    data = {"dataset": places.dataset}
    student = recipe.student or str(start / "student-init")

    if recipe.init_student is not None:
        yield stage("init-student", "init_student", InitStudentConfig, teacher=teacher, output=student)

    yield (y_t := _teacher_responses(recipe, file, places.dataset))

    if recipe.sft is not None:
        implied = {"objective": "sft", "student": student, "output": str(start / "student-sft")}
        yield stage("train: sft", "sft", TrainConfig, **data, **implied)
        student = implied["output"]
    students = {"student before": student}

    if recipe.warm_start is not None:
        implied = {"objective": "seqkd", "responses": "teacher", "student": student}
        implied["output"] = str(start / "student-warm")
        yield stage("train: warm start", "warm_start", TrainConfig, **data, **implied)
        students["student warm"] = student = implied["output"]

    yield from _pairs(recipe, file, places.dataset, student, y_t, places.start_name)
    if places.run_name != places.start_name:  # with tables of its own, for its rounds
        yield from _pairs(recipe, file, places.dataset, student, y_t, places.run_name)

    if recipe.subset is not None:
        where = {"dataset": places.dataset, "output": places.run / "dataset-subset"}
        yield stage("subset", "subset", SubsetConfig, **where)
        data = {"dataset": where["output"]}  # rounds are its, too

    rounds = recipe.regenerate.for_train() if recipe.regenerate else {}
    named = _named(places.run_name)
    yield stage(
        "train", "train", TrainConfig, **data, **named, student=student, output=places.run / "student", **rounds
    )
    students["student after"] = str(places.run / "student")

    if recipe.evaluate is not None:
        for name, model in {"teacher": teacher, **students}.items():
            output = places.evaluations[name]
            last = stage(f"evaluate: {name}", "evaluate", EvaluateConfig, model=model, teacher=teacher, output=output)
            yield last

    if recipe.judge is not None:
        assert isinstance(last.config, EvaluateConfig)
        first = next(iter(last.config.prompt_sets))  # of several sets the first is judged
        after, before = (places.evaluations[f"student {when}"] / first for when in ("after", "before"))
        other = None if recipe.judge.get("form") == "score" else before
        yield stage("judge", "judge", JudgeConfig, a=after, b=other, output=places.run / "judge", dry_run=False)


def _named(name: str | None) -> dict[str, str]:
    return {} if name is None else {"student_name": name}


def _pairs(
    recipe: Recipe, file: Path | None, dataset: Path, student: str, y_t: Stage, name: str | None
) -> Iterator[Stage]:
    """The first responses of a student, and the teacher's scores of both."""
    stage, data = partial(_stage, recipe, file), {"dataset": dataset, **_named(name)}
    answers = {"role": "student", "model": student}
    y_s = stage("generate: student", section_of(recipe, "student"), GenerateConfig, **data, **answers, prompts=None)
    yield _with_limits(y_s, y_t)
    yield stage("score-teacher", "score_teacher", ScoreTeacherConfig, **data, model=recipe.teacher, student=student)


def round_stages(recipe: Recipe, train: TrainConfig, due: Mapping[str, Any], file: Path | None) -> Iterator[Stage]:
    """What makes the round that `train` waits for, which its file `due` describes."""
    assert recipe.regenerate is not None
    model, share = str(train.due.parent / due["student"]), recipe.regenerate.share
    data = {"dataset": train.dataset, "round": due["round"], **_named(train.student_name)}

    answers: dict[str, Any] = {"role": "student", "model": model, "prompts": None}
    answers["samples"] = 1  # train reads the first sample alone
    answers |= {"share": share} if share < 1 else {}
    title, section = f"generate: student, round {due['round']}", section_of(recipe, "student")
    y_s = _stage(recipe, file, title, section, GenerateConfig, **data, **answers)
    assert isinstance(train.dataset, Path)
    yield _with_limits(y_s, _teacher_responses(recipe, file, train.dataset))

    title = f"score-teacher, round {due['round']}"
    yield _stage(recipe, file, title, "score_teacher", ScoreTeacherConfig, **data, model=recipe.teacher, student=model)


def _teacher_responses(recipe: Recipe, file: Path | None, dataset: Path) -> Stage:
    data = {"dataset": dataset, "role": "teacher", "model": recipe.teacher}
    return _stage(recipe, file, "generate: teacher", section_of(recipe, "teacher"), GenerateConfig, **data)


def _with_limits(y_s: Stage, y_t: Stage) -> Stage:
    """The stage of a student's responses, which may be as long as the teacher's where the recipe says nothing."""
    teacher, student = y_t.config, y_s.config
    assert isinstance(teacher, GenerateConfig) and isinstance(student, GenerateConfig)
    return replace(y_s, config=student.with_limits(teacher.max_new_tokens, teacher.max_length))


def section_of(recipe: Recipe, role: str) -> str:
    """The section of a recipe that says how teacher or student respond: one of its own, or that of both."""
    return "generate" if getattr(recipe, f"generate_{role}") is None else f"generate_{role}"


def _stage(recipe: Recipe, file: Path | None, title: str, section: str, config: type[Config], **implied: Any) -> Stage:
    """A stage from its section of the recipe and what the recipe implies; the latter wins."""
    values = getattr(recipe, section)
    if config is TrainConfig and isinstance(values, dict) and values.get("holdout") != 0:
        values = {"stop_when_ruined": True, **values}
    stage = Stage(title, section, recipe_section(config, section, values, implied, file, student=recipe.of_student))
    _refuse_secrets(stage)
    return stage


def _refuse_secrets(stage: Stage) -> None:
    for key in type(stage.config).model_fields:
        if isinstance(location := getattr(stage.config, key), RemotePath) and location.secret:
            raise UsageError(
                f"'{stage.section}.{key}': {location} with a user, password or query, which the settings that distill "
                f"writes may not hold; let the environment or fsspec's own settings say it"
            )
