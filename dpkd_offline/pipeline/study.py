"""A study: many students on one dataset, from one recipe.

Each student is an ordinary recipe (`recipe_of_student`) with the ordinary stages (`plan`). What several of them would
do alike is done once: the stages are divided into units, which are the data, each start, and each student with each
seed. A unit is run by one process at a time. Any number of processes may work on a study: each takes the next unit
that nobody holds or has done.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, OutputBusy, StageFailed, StudentRuined, UsageError
from dpkd_offline.common.files import find_model, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.ownership import is_held, locked, shared_output
from dpkd_offline.common.results import Result
from dpkd_offline.common.secrets import redacted_value
from dpkd_offline.config.base import in_words
from dpkd_offline.config.recipe import Recipe, recipe_of_student, suggestion
from dpkd_offline.pipeline.box import Box
from dpkd_offline.pipeline.distill import Runner, run_stage
from dpkd_offline.pipeline.stages import Places, Stage, plan
from dpkd_offline.pipeline.starter import stages_by_fork
from dpkd_offline.pipeline.study_layout import (
    STUDY,
    StudyLayout,
    StudyRun,
    StudyStart,
    StudyStudent,
    read_study,
)
from dpkd_offline.pipeline.study_results import FAILED, FIRST, RUINED, collect_results
from dpkd_offline.pipeline.throughput import Workload

KIND = "study"  # what its folder is
LOCK = ".dpkd-offline.stages.lock"  # in the folder of a unit: who runs its stages
LOOK_AGAIN_SECONDS = 1.0  # at what other processes do
LONGEST_END = 60.0  # seconds that a stage may take to end when the process that started it was killed
OF_TEACHER = ("generate: teacher", "evaluate: teacher")
OF_RUN = ("train", "evaluate: student after", "judge")


class Failure(BaseModel):
    """Which stage of a unit ended with an error, and with which exit code."""

    stage: str
    exit_code: int


@dataclass(frozen=True)
class Unit:
    """Stages that one process runs, one after the other."""

    title: str
    folder: Path  # of stages/ and stages.jsonl
    recipe: Recipe
    stages: Sequence[Stage]
    needs: Sequence[str] = ()  # the units whose results it reads, by their titles
    student: str | None = None  # of a run

    @property
    def lock(self) -> Path:
        return self.folder / LOCK

    @property
    def failure(self) -> Failure | None:
        """Why this unit will not be done, until the study is started anew."""
        return find_model(self.folder / FAILED, Failure)


@dataclass(frozen=True)
class Study:
    """A recipe with students: where everything lies, and the units of work, each after those that it needs."""

    recipe: Recipe
    layout: StudyLayout
    units: Sequence[Unit]

    @property
    def root(self) -> Path:
        return self.recipe.output

    def selected(self, only: Collection[str]) -> list[Unit]:
        """The units of some students, and what they need; of all where none is named.

        Raises:
            UsageError: there is no such student.
        """
        for name in only:
            if name not in self.layout.students:
                known = [*self.layout.students]
                raise UsageError(
                    f"--only {name}: no such student{suggestion(name, known)}; there is: {in_words(known)}"
                )
        chosen: list[Unit] = []
        for unit in reversed(self.units):
            needed = any(unit.title in other.needs for other in chosen)
            if needed or (unit.student is not None and (not only or unit.student in only)):
                chosen.insert(0, unit)
        return chosen


@dataclass(frozen=True)
class StudyResult(Result):
    """The folder of a study, and what came of its students."""

    results: Mapping[str, Any]  # as in results.json
    page: Path  # report.html
    failed: Mapping[str, Failure]  # the units with a stage that failed, by their titles
    ruined: Sequence[str]  # the runs that stopped early because the student got worse, by their titles

    def raise_failure(self) -> None:
        """Raise what the end of the command says of students that failed, or else of those that were ruined.

        Raises:
            StageFailed: a stage failed; with its exit code.
            StudentRuined: a student got worse, and the best one so far stands in its place.
        """
        if self.failed:
            what = [f"{title} ({failed.stage}, exit code {failed.exit_code})" for title, failed in self.failed.items()]
            code = next(iter(self.failed.values())).exit_code
            raise StageFailed(code, f"failed: {in_words(what)}; the same command tries again")
        if self.ruined:
            raise StudentRuined(f"got worse and stopped early: {in_words(self.ruined)}; their best students are kept")


def study_of(recipe: Recipe, file: Path | None = None) -> Study:
    """The students of a recipe with all of their stages.

    Args:
        file: the file of the recipe, for error messages.

    Raises:
        UsageError: a section of the recipe or of a student has an unknown key or a wrong value.
        DataError: the output's study.json is damaged.
    """
    assert recipe.students is not None
    seeds = list(recipe.seeds) if recipe.seeds is not None else [int(recipe.train.get("seed", 0))]
    recipes = {name: {seed: recipe_of_student(recipe, name, seed, file) for seed in seeds} for name in recipe.students}
    starts = _starts(recipe.output, [next(iter(by_seed.values())) for by_seed in recipes.values()])
    evaluated = recipe.evaluate is not None
    students = {
        name: StudyStudent(
            start=next(start for start, of in starts.items() if of.settings == _settings(by_seed[seeds[0]])),
            runs=[StudyRun(seed=seed, folder=f"students/{name}/seed-{seed}") for seed in seeds],
        )
        for name, by_seed in recipes.items()
    }
    layout = StudyLayout(
        baseline=recipe.baseline,
        seeds=seeds,
        teacher="evaluation/teacher" if evaluated else None,
        paper=recipe.paper,
        starts=starts,
        students=students,
    )
    return Study(recipe, layout, list(_units(recipe.output, layout, recipes, file)))


def _settings(recipe: Recipe) -> str:
    """Equal for students that start alike."""
    values = recipe.model_dump(mode="json", include={"student", "init_student", "sft", "warm_start"})
    return fingerprint(redacted_value(values))


def _starts(root: Path, recipes: Sequence[Recipe]) -> dict[str, StudyStart]:
    """The starts of the students by their names, which stay what they were where the study has grown."""
    before = read_study(root)
    known = {start.settings: name for name, start in before.starts.items()} if before else {}
    starts: dict[str, StudyStart] = {}
    for recipe in recipes:
        settings, number = _settings(recipe), 1
        while (new := f"start-{number}") in {*known.values(), *starts} or (root / "starts" / new).exists():
            number += 1
        name = known.get(settings) or next((name for name, of in starts.items() if of.settings == settings), new)
        evaluation = f"evaluation/{name}" if recipe.evaluate is not None else None
        starts[name] = StudyStart(
            folder=f"starts/{name}",
            before=evaluation,
            warm=f"{evaluation}-warm" if evaluation and recipe.warm_start is not None else None,
            student_name=None if name == FIRST else name,
            settings=settings,
        )
    return starts


def _units(
    root: Path, layout: StudyLayout, recipes: Mapping[str, Mapping[int, Recipe]], file: Path | None
) -> Iterator[Unit]:
    """The data, the starts, then the runs, seed by seed. What an earlier unit does is no stage of a later one."""
    first = next(iter(next(iter(recipes.values())).values()))
    places = _places(root, layout, next(iter(layout.students)))
    of_teacher = [stage for stage in plan(first, file, places) if stage.title in OF_TEACHER]
    yield Unit("data", root, first, of_teacher)
    of_start: dict[str, list[Stage]] = {}
    done_before = ["data"]
    for name, student in layout.students.items():
        if student.start in of_start:
            continue
        recipe = next(iter(recipes[name].values()))
        stages = plan(recipe, file, _places(root, layout, name))
        of_start[student.start] = [stage for stage in stages if stage.title not in (*OF_TEACHER, *OF_RUN)]
        # A further start takes over what the teacher has said of y_t for the first one.
        folder = root / layout.starts[student.start].folder
        yield Unit(student.start, folder, recipe, of_start[student.start], tuple(done_before))
        done_before.append(student.start)
    for number, seed in enumerate(layout.seeds):  # so that there is a whole table early
        for name, student in layout.students.items():
            shared = [*of_teacher, *of_start[student.start]]
            run, recipe = student.runs[number], recipes[name][seed]
            places = _places(root, layout, name, run, rounds=recipe.regenerate is not None)
            stages = [stage for stage in plan(recipe, file, places) if stage not in shared]
            yield Unit(f"{name}, seed {seed}", root / run.folder, recipe, stages, ("data", student.start), name)


def _places(root: Path, layout: StudyLayout, name: str, run: StudyRun | None = None, rounds: bool = False) -> Places:
    """Where the stages of a student write. For its `rounds` each run has tables of its own in the dataset."""
    start = layout.starts[layout.students[name].start]
    run = run or layout.students[name].runs[0]
    folder = root / run.folder
    evaluations = {"teacher": layout.teacher, "student before": start.before, "student warm": start.warm}
    known = {what: root / path for what, path in evaluations.items() if path is not None}
    return Places(
        root / "dataset",
        start=root / start.folder,
        run=folder,
        evaluations={**known, "student after": folder / "evaluation"},
        start_name=start.student_name,
        run_name=f"{name}.seed-{run.seed}" if rounds else start.student_name,
    )


# --- running it -------------------------------------------------------------------------------------------------------


def run_study(recipe: Recipe, file: Path | None = None, only: Collection[str] = ()) -> StudyResult:
    """Run every stage of a study that is not done yet, beside other processes that do the same.

    Where a stage of a student fails, the other students go on. Returns when all that is asked for is done or has
    failed, whoever did it.

    Args:
        file: the file of the recipe, for error messages.
        only: the students to train; by default all.

    Raises:
        UsageError, DataError, UnavailableError: the recipe is wrong, or a stage would certainly fail; nothing has run.
        StageFailed: a stage was interrupted, or the disk is full; the same call goes on there.
        OutputBusy: another command, or this one with another recipe, writes the output now.
    """
    from dpkd_offline.pipeline.report.report import report_study  # which imports numpy, as the next imports torch
    from dpkd_offline.pipeline.study_plan import plan_of_study

    study = study_of(recipe, file)
    units, work = study.selected(only), plan_of_study(study, file)
    for warning in work.warnings:
        console.info(f"warning: {warning}")
    identity = fingerprint(redacted_value(recipe.model_dump(mode="json", exclude={"gpus"})))
    with shared_output(study.root, KIND, "distill", identity, lambda: _begin(study, units)):
        with stages_by_fork():
            Worker(units, work.workloads, Box.of(recipe), file).run()
        results = collect_results(study.root, study.layout)
        page = report_study(study.root, study.layout)
    failed = {unit.title: failure for unit in units if (failure := unit.failure)}
    runs = {f"{name}, seed {seed}": run for name, of in results["students"].items() for seed, run in of["runs"].items()}
    ruined = [unit.title for unit in units if runs.get(unit.title, {}).get("state") == RUINED]
    return StudyResult(study.root, results, page.path, failed, ruined, warnings=(*work.warnings, *results["warnings"]))


def _begin(study: Study, units: Sequence[Unit]) -> None:
    """What the first process does: say what there is, and give what has failed another try."""
    if read_study(study.root) != study.layout:
        write_json(study.root / STUDY, study.layout.model_dump(mode="json"))
    for unit in units:
        (unit.folder / FAILED).unlink(missing_ok=True)


class Worker:
    """Runs the units that no other process holds or has done, until none is left.

    Args:
        workloads: what decides how long the stages of a unit take, by its title and theirs.
        box: the GPUs that they use.
        file: the file of the recipe, for error messages.
    """

    def __init__(
        self, units: Sequence[Unit], workloads: Mapping[str, Mapping[str, Workload]], box: Box, file: Path | None
    ):
        self._units, self._file = units, file
        self._runners = {
            unit.title: Runner(unit.folder, len(unit.stages), workloads.get(unit.title, {}), box, f"{unit.title} ")
            for unit in units
        }
        self._done: set[str] = set()

    def run(self) -> None:
        """Returns when each unit is done or has failed, or needs one that has.

        Raises:
            StageFailed: a stage was interrupted, or the disk is full.
        """
        waits = False
        while True:
            open_ = [unit for unit in self._units if not self._is_settled(unit)]
            if not open_:
                return
            ready = [unit for unit in open_ if self._done.issuperset(unit.needs)]
            if any(self._take(unit) for unit in ready):
                waits = False
                continue
            if not ready and not self._held(open_):
                return  # what they need has failed
            if not waits:
                console.info(f"waiting for other processes, which run {in_words([unit.title for unit in ready])}")
                waits = True
            time.sleep(LOOK_AGAIN_SECONDS)

    def _held(self, open_: Sequence[Unit]) -> bool:
        """Whether a unit that others need may still be done."""
        failed = {unit.title for unit in self._units if unit.failure}
        lost = set(failed)
        for unit in self._units:  # each after those that it needs
            if lost & set(unit.needs):
                lost.add(unit.title)
        return any(unit.title not in lost for unit in open_)

    def _is_settled(self, unit: Unit) -> bool:
        if unit.title in self._done:
            return True
        if unit.lock.exists():  # somebody runs it, or was killed and left this
            return False
        if self._is_done(unit):
            self._done.add(unit.title)
            return True
        return unit.failure is not None

    def _is_done(self, unit: Unit) -> bool:
        runner = self._runners[unit.title]
        return all(runner.is_done(stage, number) for number, stage in enumerate(unit.stages, start=1))

    def _take(self, unit: Unit) -> bool:
        """Run a unit, unless another process does. Returns whether it is settled now."""
        try:
            with locked(unit.lock, unit.folder, "distill"):
                if not self._is_done(unit) and unit.failure is None:
                    self._run(unit)
        except OutputBusy:
            return False
        return True

    def _run(self, unit: Unit) -> None:
        runner = self._runners[unit.title]
        for number, stage in enumerate(unit.stages, start=1):
            if runner.is_done(stage, number):
                continue
            _wait_until_free(stage)
            try:
                run_stage(runner, unit.recipe, stage, number, self._file)
            except StageFailed as error:
                if error.exit_code == Interrupted.exit_code:
                    raise
                write_json(unit.folder / FAILED, Failure(stage=stage.title, exit_code=error.exit_code).model_dump())
                reason = f"{error}; " if str(error) else ""
                console.info(f"{unit.title}: {reason}{stage.title} failed with exit code {error.exit_code}")
                return


def _wait_until_free(stage: Stage) -> None:
    """Wait for the end of a stage whose process was killed, which ends a moment later."""
    folder = getattr(stage.config, "output", None)
    end = time.monotonic() + LONGEST_END
    while folder is not None and is_held(Path(folder)) and time.monotonic() < end:
        time.sleep(0.1)
