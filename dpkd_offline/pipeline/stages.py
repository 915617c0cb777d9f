"""The stages of a recipe, with their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.locations import RemotePath
from dpkd_offline.config.base import Config
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import Recipe, recipe_section
from dpkd_offline.config.train import InitStudentConfig, TrainConfig

COMMANDS: dict[type[Config], str] = {
    EvaluateConfig: "evaluate",
    GenerateConfig: "generate",
    InitStudentConfig: "init-student",
    ScoreTeacherConfig: "score-teacher",
    TrainConfig: "train",
}


@dataclass(frozen=True)
class Stage:
    """One command of the experiment."""

    title: str
    section: str  # of the recipe
    config: Config

    @property
    def command(self) -> str:
        return COMMANDS[type(self.config)]


def plan(recipe: Recipe, file: Path | None = None) -> list[Stage]:
    """The stages of a recipe in order, with their configs.

    The prompts enter with the teacher's responses, so that these come before the student's initial fine-tuning.

    Args:
        file: where the recipe stands, for error messages.

    Raises:
        UsageError: a section has an unknown key or a wrong value.
    """
    root = recipe.output
    teacher, student = recipe.teacher, recipe.student or str(root / "student-init")
    stages: list[Stage] = []

    def add(title: str, section: str, config: type[Config], **given: Any) -> None:
        asked = getattr(recipe, section)
        if config is TrainConfig and isinstance(asked, dict) and asked.get("holdout") != 0:
            asked = {"stop_when_ruined": True, **asked}
        values = recipe_section(config, section, asked, given, file)
        for key in type(values).model_fields:
            if isinstance(place := getattr(values, key), RemotePath) and place.secret:
                raise UsageError(
                    f"'{section}.{key}': {place} with a user, password or query, which the settings that distill "
                    f"writes may not hold; let the environment or fsspec's own settings say it"
                )
        stages.append(Stage(title, section, values))

    def add_generate(role: str, model: str, **given: Any) -> None:
        own = f"generate_{role}"
        section = "generate" if getattr(recipe, own) is None else own
        add(f"generate: {role}", section, GenerateConfig, role=role, model=model, **data, **given)

    data = {"dataset": root / "dataset"}
    if recipe.init_student is not None:
        add("init-student", "init_student", InitStudentConfig, teacher=teacher, output=student)
    add_generate("teacher", teacher)
    if recipe.sft is not None:
        output = str(root / "student-sft")
        add("train: sft", "sft", TrainConfig, objective="sft", student=student, output=output, **data)
        student = output
    before = {"student before": student}
    if recipe.warm_start is not None:
        output = str(root / "student-warm")
        warm = {"objective": "seqkd", "responses": "teacher", "student": student, "output": output}
        add("train: warm start", "warm_start", TrainConfig, **warm, **data)
        before["student warm"] = student = output
    add_generate("student", student, prompts=None)
    add("score-teacher", "score_teacher", ScoreTeacherConfig, model=teacher, student=student, **data)
    rounds = recipe.regenerate.for_train() if recipe.regenerate else {}
    add("train", "train", TrainConfig, student=student, output=root / "student", **data, **rounds)
    if recipe.evaluate is not None:
        for name, model in {"teacher": teacher, **before, "student after": str(root / "student")}.items():
            output = str(root / "evaluation" / name.replace(" ", "-"))
            add(f"evaluate: {name}", "evaluate", EvaluateConfig, model=model, teacher=teacher, output=output)
    return stages


def round_stages(recipe: Recipe, train: TrainConfig, due: Mapping[str, Any], file: Path | None) -> list[Stage]:
    """What makes the round that `train` waits for."""
    assert recipe.regenerate is not None
    section = "generate" if recipe.generate_student is None else "generate_student"
    model, share = str(train.due.parent / due["student"]), recipe.regenerate.share
    parts: list[tuple[str, str, type[Config], dict[str, Any]]] = [
        ("generate: student", section, GenerateConfig, {"role": "student", "model": model, "prompts": None}),
        ("score-teacher", "score_teacher", ScoreTeacherConfig, {"model": recipe.teacher, "student": model}),
    ]
    if share < 1:
        parts[0][-1]["share"] = share
    return [
        Stage(
            f"{title}, round {due['round']}",
            name,
            recipe_section(
                config, name, getattr(recipe, name), {"dataset": train.dataset, "round": due["round"], **given}, file
            ),
        )
        for title, name, config, given in parts
    ]
