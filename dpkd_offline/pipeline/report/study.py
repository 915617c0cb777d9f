"""What a study's folder holds that its page can show: done, under way, or failed. It is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from dpkd_offline.common.files import find_model
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.evaluation.summary import RESULTS
from dpkd_offline.evaluation.table import AFTER, BEFORE, COLUMNS, SHARES, TEACHER
from dpkd_offline.pipeline.report.paper import BUCKETS, Number, Ours
from dpkd_offline.pipeline.report.run import (
    Evaluation,
    JudgeRecord,
    Run,
    StageLine,
    Training,
    add_differences,
    read_evaluation,
    read_stages,
    read_training,
)
from dpkd_offline.pipeline.study_layout import StudyLayout, StudyRun
from dpkd_offline.pipeline.study_results import study_results

WARM = "student-warm"
BEFORE_TRAINING = {"student-sft": "Fine-tuning on references", WARM: "Warm start on y_t"}
EXTREMES: tuple[tuple[str, str, Callable[[Sequence[float]], float]], ...] = (  # of curves, for the paper's Table 3
    ("min_reverse_kl_first", "val_reverse_kl_first", min),
    ("max_reward", "val_reward_chosen", max),
)
Bucket = tuple[int, int | None]  # words of a reference: above, and to
Evaluations = Mapping[str, Evaluation]  # by prompt set, whose name is empty where there is one


@dataclass(frozen=True)
class Change(Number):
    """How far a student is from the baseline, on the same prompts and seeds."""

    better: int = 0  # 1: it is better, -1: it is worse, 0: no different beyond noise


@dataclass(frozen=True)
class Measure(Number):
    """A measure of a model: of a student over seeds of training and prompts, else over prompts."""

    change: Change | None = None  # from the baseline


@dataclass(frozen=True)
class SeedRun:
    """A student trained with one seed, as far as it is there."""

    seed: int
    place: str  # its folder, from that of the study
    training: Training | None  # None before its first step
    evaluations: Evaluations
    judge: JudgeRecord | None
    stages: Sequence[StageLine]

    @property
    def tokens(self) -> int | None:
        """Tokens that training read, as the dry run counts them."""
        return next((line.tokens for line in reversed(self._trainings) if line.tokens), None)

    @property
    def peak_memory(self) -> int | None:
        """Bytes."""
        return max((line.peak_memory for line in self._trainings if line.peak_memory), default=None)

    @property
    def _trainings(self) -> list[StageLine]:
        return [line for line in self.stages if line.stage.startswith("train")]


@dataclass(frozen=True)
class Student:
    """A student of the study, with a run for each seed."""

    name: str
    start: str
    runs: Sequence[SeedRun]
    results: Mapping[str, Any]  # as study_results has them

    def mean(self, of: Callable[[SeedRun], float | None]) -> float | None:
        """Over the seeds that have the number."""
        values = [value for run in self.runs if (value := of(run)) is not None]
        return fmean(values) if values else None

    @property
    def seconds(self) -> float | None:
        """Of training, as a mean over the seeds."""
        mean: float | None = self.results.get("training_seconds", {}).get("mean")
        return mean


@dataclass(frozen=True)
class Study:
    """All that the folder of a study holds."""

    folder: Path
    layout: StudyLayout
    results: Mapping[str, Any]
    students: Sequence[Student]
    shared: Mapping[str, Evaluations]  # of the teacher and the starts, by what a page calls them
    stages: Sequence[StageLine]  # of what all students share

    @property
    def name(self) -> str:
        return self.folder.resolve().name or "study"

    @property
    def dataset(self) -> Path | None:
        return self.folder / "dataset" if Dataset.exists(self.folder / "dataset") else None

    @property
    def names(self) -> list[str]:
        """The names of the students, in the recipe's order."""
        return [student.name for student in self.students]

    @property
    def sets(self) -> list[str]:
        """The names of the prompt sets that models are evaluated on, in their order."""
        evaluations = [*self.shared.values(), *(run.evaluations for student in self.students for run in student.runs)]
        return list(dict.fromkeys(name for of in evaluations for name in of))

    @property
    def evaluations(self) -> dict[str, Evaluations]:
        """An evaluation of each model: of a student that of its first seed that has one."""
        first = {
            student.name: next((run.evaluations for run in student.runs if run.evaluations), {})
            for student in self.students
        }
        return {name: of for name, of in {**self.shared, **first}.items() if of}

    @cached_property
    def measured(self) -> dict[str, dict[str, dict[str, Measure]]]:
        """By prompt set and model the measures, and the shares of its responses."""
        return {name: dict(self._measured(name)) for name in self.sets}

    def _measured(self, prompt_set: str) -> Iterator[tuple[str, dict[str, Measure]]]:
        for name, evaluations in self.shared.items():
            if prompt_set in evaluations:
                yield name, dict(_measures(evaluations[prompt_set].results))
        for student in self.students:
            if (of_set := student.results.get("sets", {"": student.results}).get(prompt_set)) is not None:
                if measures := dict(_measures(of_set)):
                    yield student.name, measures


def _measures(results: Mapping[str, Any]) -> Iterator[tuple[str, Measure]]:
    changes = results.get("difference", {})
    for name in COLUMNS:
        if name in results:
            change = None
            if name in changes:
                verdict = {"better": 1, "worse": -1}.get(changes[name].get("verdict", ""), 0)
                change = Change(changes[name]["mean"], _interval(changes[name]), verdict)
            yield name, Measure(results[name]["mean"], _interval(results[name]), change)
    for name in SHARES:
        if name in results:
            yield name, Measure(results[name])


def _interval(numbers: Mapping[str, Any]) -> tuple[float, float] | None:
    interval = numbers.get("interval")
    return None if interval is None else (interval[0], interval[1])


def read_study_folder(folder: Path, layout: StudyLayout) -> Study:
    """What is there of a study.

    Raises:
        DataError: a file is broken.
    """
    results = study_results(folder, layout)
    students = [
        Student(name, of.start, [_seed_run(folder, run) for run in of.runs], results["students"][name])
        for name, of in layout.students.items()
    ]
    shared = {TEACHER: _evaluations(folder, layout.teacher, TEACHER)}
    stages = list(read_stages(folder / "stages.jsonl"))
    for name, start in layout.starts.items():
        title = name if len(layout.starts) > 1 else "before"
        shared[title] = _evaluations(folder, start.before, BEFORE)
        shared[f"{title}, warm"] = _evaluations(folder, start.warm, WARM)
        stages += read_stages(folder / start.folder / "stages.jsonl")
    return Study(folder, layout, results, students, {name: of for name, of in shared.items() if of}, stages)


def _seed_run(study: Path, run: StudyRun) -> SeedRun:
    folder = study / run.folder
    student = folder / "student"
    return SeedRun(
        run.seed,
        run.folder,
        read_training(student, "Training") if (student / "metrics.jsonl").exists() else None,
        read_evaluation(folder / "evaluation", AFTER),
        find_model(folder / "judge" / RESULTS, JudgeRecord),
        list(read_stages(folder / "stages.jsonl")),
    )


def _evaluations(folder: Path, place: str | None, model: str) -> Evaluations:
    return {} if place is None else read_evaluation(folder / place, model)


def run_of_student(study: Study, student: Student, run: SeedRun) -> Run:
    """A student's run as that of a single recipe would be, for a page of its own. The data are on the study's page."""
    start = study.layout.starts[student.start]
    page = Run(study.folder / run.place, f"{student.name}, a student of {study.name}", judge=run.judge)
    page.stages.extend(run.stages)
    page.trainings.extend([run.training] if run.training is not None else [])
    for name, title in BEFORE_TRAINING.items():
        if (study.folder / start.folder / name / "metrics.jsonl").exists():
            page.trainings.append(read_training(study.folder / start.folder / name, title))
    places = {TEACHER: study.layout.teacher, BEFORE: start.before, WARM: start.warm}
    shared = [_evaluations(study.folder, place, model) for model, place in places.items()]
    for evaluations in (*shared, run.evaluations):
        for name, evaluation in evaluations.items():
            page.sets.setdefault(name, []).append(evaluation)
    add_differences(page)
    return page


# --- over the seeds ---------------------------------------------------------------------------------------------------


def by_length(study: Study, prompt_set: str) -> dict[str, dict[Bucket, float]]:
    """Of each model Rouge-L by words of the reference; of a student as a mean over the seeds of training."""
    shared = {name: of[prompt_set].results for name, of in study.shared.items() if prompt_set in of}
    lengths = {name: _buckets(results, "rouge_l") for name, results in shared.items()}
    for student in study.students:
        evaluations = [run.evaluations[prompt_set] for run in student.runs if prompt_set in run.evaluations]
        by_seed = [_buckets(evaluation.results, "rouge_l") for evaluation in evaluations]
        buckets = [bucket for bucket in (by_seed[0] if by_seed else ()) if all(bucket in of for of in by_seed)]
        lengths[student.name] = {bucket: fmean(of[bucket] for of in by_seed) for bucket in buckets}
    return {name: of for name, of in lengths.items() if of}


def _buckets(results: Mapping[str, Any], measure: str) -> dict[Bucket, float]:
    return {(b["above"], b["to"]): b[measure] for b in results.get("by_length", ()) if measure in b}


def numbers_for_paper(study: Study) -> Ours:
    """What the paper's tables have, of this study: over the seeds of training."""
    ours: dict[tuple[str, str, str], Number] = {}
    for name, models in study.measured.items():
        for model, measures in models.items():
            ours |= {(model, name, key): measures[key] for key in ("rouge_l", "exact_match") if key in measures}
    for student in study.students:
        for name in study.sets:
            for measure in ("rouge_l", "exact_match"):
                for n, bucket in enumerate(BUCKETS):
                    if (mean := student.mean(partial(_in_bucket, name, bucket, measure))) is not None:
                        ours[student.name, name, f"{measure}:{n}"] = Number(mean)
        for key, curve, pick in EXTREMES:
            if (mean := student.mean(partial(_extreme, curve, pick))) is not None:
                ours[student.name, "", key] = Number(mean)
    return ours


def _in_bucket(prompt_set: str, bucket: Bucket, measure: str, run: SeedRun) -> float | None:
    """A measure over the prompts whose references have so many words; None where the run has no such bucket."""
    evaluation = run.evaluations.get(prompt_set)
    return None if evaluation is None else _buckets(evaluation.results, measure).get(bucket)


def _extreme(name: str, pick: Callable[[Sequence[float]], float], run: SeedRun) -> float | None:
    """The least or the highest value of a curve."""
    curve = run.training.curves[name] if run.training is not None else None
    return pick(curve.values) if curve else None
