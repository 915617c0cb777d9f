"""What a folder holds that a page can show: all of a run or a part, done or under way. It is only read.

Each file is read as a model, so that a broken one is named in a line; what is not there is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import as_model, find_json, find_model, first_fault, opened, read_bounded
from dpkd_offline.common.ownership import claim_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.evaluation.summary import RESPONSES, RESULTS, difference_of
from dpkd_offline.evaluation.table import AFTER, BEFORE, TEACHER, EvaluationRecord
from dpkd_offline.pipeline.report.curves import Curves, read_curves
from dpkd_offline.pipeline.throughput import LARGEST_RECORD
from dpkd_offline.training.record import TrainingRecord

TRAININGS = {"student": "Training", "student-sft": "Fine-tuning on references", "student-warm": "Warm start on y_t"}
Interval = tuple[float, float] | None


class StageLine(BaseModel):
    """A line of stages.jsonl."""

    stage: str
    seconds: float
    exit_code: int
    engine: str | None = None
    sequences: int | None = None
    tokens: int | None = None
    peak_memory: int | None = None  # bytes


class SettingsRecord(TrainingRecord):
    """training.json with what the run was made of."""

    model_config = ConfigDict(extra="ignore")
    settings: dict[str, Any] = Field(default_factory=dict)
    student: dict[str, Any] | None = None


class JudgeRecord(BaseModel):
    """results.json of a judge; the numbers that its form has."""

    form: Literal["pairwise", "score"]
    judge: str
    prompts: int
    pairs: int
    asked: int
    failed: int
    warnings: list[str]
    made: dict[str, Any] = {}
    win_rate: float | None = None
    win_rate_interval: Interval = None
    controlled_win_rate: float | None = None
    controlled_win_rate_interval: Interval = None
    preference: float | None = None
    wins: float | None = None
    losses: float | None = None
    ties: float | None = None
    order_disagreement: float | None = None
    mean_score: float | None = None
    mean_score_interval: Interval = None
    mean_reference_score: float | None = None
    ratio_of_sums: float | None = None
    ratio_of_sums_interval: Interval = None


@dataclass(frozen=True)
class Training:
    """A run of `train`, done or under way."""

    title: str
    name: str  # of its folder
    curves: Curves
    record: SettingsRecord | None  # None while it is under way
    settings: Mapping[str, Any]

    @property
    def epoch_steps(self) -> float | None:
        """How many steps an epoch has, where that is known."""
        if self.record is None or self.settings.get("max_steps") or not self.record.steps:
            return None
        epochs = self.settings.get("epochs")
        return self.record.steps / epochs if isinstance(epochs, int | float) and epochs > 0 else None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on one prompt set."""

    model: str  # what a page calls it
    folder: Path
    results: dict[str, Any]  # results.json, with `difference` from the student before


@dataclass(frozen=True)
class Run:
    """All that a folder holds. `sets` has evaluations by prompt set, whose name is empty where there is one."""

    folder: Path
    kind: str
    dataset: Path | None = None
    trainings: list[Training] = field(default_factory=list)
    sets: dict[str, list[Evaluation]] = field(default_factory=dict)
    benchmarks: dict[str, dict[str, Any]] = field(default_factory=dict)  # results of models on several prompt sets
    judge: JudgeRecord | None = None
    stages: list[StageLine] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what is not done yet

    @property
    def name(self) -> str:
        return self.folder.resolve().name or "run"


def read_run(folder: Path) -> Run:
    """What a folder holds.

    Raises:
        DataError: there is nothing to show, or a file is broken.
        MismatchError: responses are not those of the results beside them.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if Dataset.exists(folder):
        return Run(folder, "dataset", dataset=folder)
    if (folder / "metrics.jsonl").exists() or (folder / "training.json").exists() or (folder / "train.yaml").exists():
        return Run(folder, "training", trainings=[read_training(folder, "Training")])
    claim = claim_of(folder)
    if claim is not None and claim.kind == "judgement":
        judge = find_model(folder / RESULTS, JudgeRecord)
        return Run(folder, "judgement", judge=judge, missing=[] if judge else ["no verdicts are counted yet"])
    if (results := find_json(folder / RESULTS)) is not None and not (folder / "evaluation").is_dir():
        run = Run(folder, "evaluation")
        _add_results(run, folder.resolve().name, folder, results)
        return run
    if any((folder / name).exists() for name in ("stages.jsonl", "dataset", "student", "evaluation")):
        return _distillation(folder)
    raise DataError(
        f"{folder}: nothing to report; name a folder of distill, train, evaluate or judge, or a dataset directory"
    )


def _distillation(folder: Path) -> Run:
    run = Run(
        folder,
        "distillation",
        dataset=folder / "dataset" if Dataset.exists(folder / "dataset") else None,
        judge=find_model(folder / "judge" / RESULTS, JudgeRecord),
        stages=list(read_stages(folder / "stages.jsonl")),
    )
    for name, title in TRAININGS.items():
        if any((folder / name / file).exists() for file in ("metrics.jsonl", "training.json")):
            run.trainings.append(read_training(folder / name, title))
    for place in _in_order(folder / "evaluation"):
        if (results := find_json(place / RESULTS)) is not None:
            _add_results(run, place.name, place, results)
    add_differences(run)
    if run.dataset is None:
        run.missing.append("there is no dataset yet")
    student = next((training for training in run.trainings if training.name == "student"), None)
    if student is None:
        run.missing.append("the student is not trained yet")
    elif student.record is None:
        run.missing.append(f"training is at step {student.curves.steps}, and not done")
    evaluated = {evaluation.model for evaluations in run.sets.values() for evaluation in evaluations}
    if AFTER not in evaluated:
        run.missing.append("the student after training is not evaluated")
    return run


def _in_order(folder: Path) -> list[Path]:
    """The evaluations of a run: the teacher first, then the students from the first to the last."""
    names = [TEACHER, BEFORE, "student-warm", AFTER]
    present = [path for path in folder.glob("*") if path.is_dir()]
    return sorted(present, key=lambda p: (names.index(p.name) if p.name in names else len(names), p.name))


def read_training(folder: Path, title: str) -> Training:
    """What `train` has left in its output so far."""
    record = find_model(folder / "training.json", SettingsRecord)
    settings = record.settings if record is not None else _yaml(folder / "train.yaml").get("train", {})
    return Training(title, folder.resolve().name, read_curves(folder / "metrics.jsonl"), record, settings)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(read_bounded(path, LARGEST_RECORD)) if path.exists() else {}
    except yaml.YAMLError as error:
        raise DataError(f"{path}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(section, dict) for section in value.values()):
        raise DataError(f"{path}: expected a section of settings")
    return value


def read_evaluation(folder: Path, model: str) -> dict[str, Evaluation]:
    """The evaluation of a model by prompt set; empty where it is not done."""
    results = find_json(folder / RESULTS)
    return {} if results is None else _by_set(folder, model, results)


def _by_set(folder: Path, model: str, results: dict[str, Any]) -> dict[str, Evaluation]:
    if not isinstance(sets := results.get("sets", {"": results}), dict):
        raise DataError(f"{folder / RESULTS}: key 'sets' is wrong")
    for numbers in sets.values():
        as_model(numbers, folder / RESULTS, EvaluationRecord)
    return {name: Evaluation(model, folder / name, numbers) for name, numbers in sets.items()}


def _add_results(run: Run, model: str, folder: Path, results: dict[str, Any]) -> None:
    for name, evaluation in _by_set(folder, model, results).items():
        run.sets.setdefault(name, []).append(evaluation)
    if "sets" in results:
        run.benchmarks[model] = results


def add_differences(run: Run) -> None:
    """How far the student after is from the one before, as `distill` says it at its end."""
    for evaluations in run.sets.values():
        by_name = {evaluation.model: evaluation for evaluation in evaluations}
        if BEFORE in by_name and AFTER in by_name:
            teacher = by_name[TEACHER].folder if TEACHER in by_name else None
            after = by_name[AFTER]
            after.results["difference"] = difference_of(by_name[BEFORE].folder, after.folder, teacher)


def has_responses(evaluation: Evaluation) -> bool:
    return (evaluation.folder / RESPONSES).exists()


def read_stages(path: Path) -> Iterator[StageLine]:
    """The lines of stages.jsonl, without one that was cut off.

    Raises:
        DataError: a line is not what distill writes.
    """
    if not path.exists():
        return
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield StageLine.model_validate_json(line)
                except ValidationError as error:
                    raise DataError(f"{path}:{number}: {first_fault(error)}") from error
