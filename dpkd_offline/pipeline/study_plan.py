"""What a study will do: its recipes checked before anything runs, and `--dry-run` with what each student costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dpkd_offline.common.errors import DpkdError
from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.base import in_words
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.checks import Experiment
from dpkd_offline.pipeline.dry_run import (
    LIMITS,
    NO_RATES,
    RATES,
    TITLES,
    WorkPlan,
    check_experiment,
    work_cells,
    work_of,
)
from dpkd_offline.pipeline.estimate import Work
from dpkd_offline.pipeline.study import Study, Unit
from dpkd_offline.pipeline.survey import PromptSurvey, survey
from dpkd_offline.pipeline.throughput import Workload

COPIED = ("generate: student", "score-teacher")  # of a run: for its rounds, what its start has
Timed = tuple[Work, float | None]  # and its seconds, where they are known


@dataclass(frozen=True)
class StudyPlan:
    """What each unit of a study does, by its title."""

    works: Mapping[str, Sequence[Timed]]
    workloads: Mapping[str, Mapping[str, Workload]]  # by the titles of units and stages
    warnings: Sequence[str]


def plan_of_study(study: Study, file: Path | None = None) -> StudyPlan:
    """Check the recipe of every student, and count what its stages will do; prompts are read once.

    Args:
        file: the file of the recipe, for error messages.

    Raises:
        DataError, UsageError, UnavailableError: as `plan_of_work`, with the student that it is of.
    """
    units = {unit.title: unit for unit in study.units}
    prompts: tuple[PromptSurvey, PromptSurvey | None] | None = None
    models: dict[tuple[str, bool], ModelInfo] = {}
    works: dict[str, list[Timed]] = {}
    workloads: dict[str, Mapping[str, Workload]] = {}
    warnings: dict[str, list[str]] = {}  # and the students that they are of
    for name in study.layout.students:
        runs = [unit for unit in study.units if unit.student == name]
        shared = [units[title] for title in runs[0].needs]
        experiment = Experiment(runs[0].recipe, [s for part in (*shared, runs[0]) for s in part.stages], models)
        try:
            check_experiment(experiment)
            prompts = prompts or survey(runs[0].recipe, experiment.stages)
            plan = work_of(experiment, *prompts)
        except DpkdError as error:
            raise type(error)(f"students.{name}: {error}") from error
        for warning in plan.warnings:
            warnings.setdefault(warning, []).append(name)
        rest = list(plan.works)
        for part in shared:
            of_part, rest = rest[: len(part.stages)], rest[len(part.stages) :]
            works.setdefault(part.title, _timed(_without_y_t(part, of_part, shared[0], prompts[0]), plan))
        rest = [_copied(work) if work.stage in COPIED else work for work in rest]
        works |= {run.title: _timed(rest, plan) for run in runs}
        workloads |= {unit.title: plan.workloads for unit in (*shared, *runs)}
    return StudyPlan(works, workloads, _of_students(warnings, len(study.layout.students)))


def _of_students(warnings: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Each warning once, with the students that it is of, unless it is of all."""
    return [
        warning if len(names) == count else f"students {in_words(names)}: {warning}"
        for warning, names in warnings.items()
    ]


def _timed(works: Sequence[Work], plan: WorkPlan) -> list[Timed]:
    return [(work, plan.seconds.get(work.stage) if work.tokens else None) for work in works]


def _copied(work: Work) -> Work:
    return replace(work, sequences=0, tokens=0, memory=0, note="copied")


def _without_y_t(unit: Unit, works: Sequence[Work], data: Unit, prompts: PromptSurvey) -> list[Work]:
    """The works of a start: after the first one y_t is not scored again."""
    new = next(s.config.max_new_tokens for s in data.stages if isinstance(s.config, GenerateConfig))
    further = any(getattr(stage.config, "student_name", None) for stage in unit.stages)

    def of_y_s(work: Work) -> Work:
        tokens = work.tokens - prompts.rows * new
        return replace(work, sequences=work.sequences // 2, tokens=tokens, note="y_t as scored for the first start")

    return [of_y_s(work) if further and work.stage == "score-teacher" else work for work in works]


def table_of_study(study: Study, plan: StudyPlan, only: Collection[str] = ()) -> str:
    """The plan as a Markdown table: what is shared, stage by stage, then each student, and all together."""
    units = study.selected(only)
    rows = []
    for unit in (unit for unit in units if unit.student is None):
        rows += [[f"{unit.title}: {w.stage}", *work_cells([(w, s)]), w.note] for w, s in plan.works[unit.title]]
    for name in dict.fromkeys(unit.student for unit in units if unit.student is not None):
        runs = [unit for unit in units if unit.student == name]
        stages = ", ".join(dict.fromkeys(work.stage.partition(", round")[0] for work, _ in plan.works[runs[0].title]))
        note = f"{len(runs)} seed{'s' * (len(runs) > 1)}, from {study.layout.students[name].start}: {stages}"
        rows.append([name, *work_cells([timed for run in runs for timed in plan.works[run.title]]), note])
    everything = [timed for unit in units for timed in plan.works[unit.title]]
    rows.append(["in all", *work_cells(everything), ""])
    rates = RATES if any(seconds is not None for _, seconds in everything) else NO_RATES
    warnings = [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join([markdown_table(("student", *TITLES[1:]), rows), "", LIMITS, rates, *warnings])
