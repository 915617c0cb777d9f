"""`distill`: run a whole experiment from one recipe, each stage in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, MismatchError, StageFailed, StudentRuined
from dpkd_offline.common.files import (
    as_model,
    disk_errors,
    find_json,
    read_json,
    read_model,
    write_atomically,
    write_json,
)
from dpkd_offline.common.ownership import OutputFolder, output_folder
from dpkd_offline.common.process import SIGNALS, reason
from dpkd_offline.common.results import Result
from dpkd_offline.common.secrets import redacted_value, set_aside
from dpkd_offline.config.base import write_yaml
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig, SubsetConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.recipe import Recipe, read_yaml
from dpkd_offline.config.report import ReportConfig
from dpkd_offline.config.train import InitStudentConfig, TrainConfig
from dpkd_offline.evaluation.table import AFTER, BEFORE, TEACHER, EvaluationRecord, results_table, verdict
from dpkd_offline.pipeline.box import Box
from dpkd_offline.pipeline.launch import launched
from dpkd_offline.pipeline.stages import Stage, plan, round_stages
from dpkd_offline.pipeline.starter import STAGE, stages_by_fork, start
from dpkd_offline.pipeline.throughput import Workload, record_stage
from dpkd_offline.training.record import TrainingRecord

NO_FILE_NAME = re.compile(r"[^a-z0-9-]+")
LEFT_BEFORE = ("stages", "stages.jsonl", "dataset", "student-init")  # in a folder of recipes, whichever came first
LOOK_SECONDS = 0.5  # between two looks at the memory of a stage
STAGE_OF = "DPKD_OFFLINE_STAGE_OF"  # set in a stage's environment: who started it


@dataclass(frozen=True)
class DistillResult(Result):
    """The folder of the trained student, and how the run went."""

    results: Mapping[str, Mapping[str, Any]]  # of each evaluated model, as in results.json; empty without evaluate
    verdict: str | None  # whether the student got better, in a sentence; None without evaluate
    judgement: Mapping[str, Any] | None  # results.json of judge; None without it
    ruined: str | None  # why training stopped early, if the student got worse
    seconds: Mapping[str, float]  # of each stage, in this call
    page: Path  # report.html


def distill(recipe: Recipe, file: Path | None = None) -> DistillResult:
    """Run every stage of a recipe that is not done yet.

    Where training stopped because the student got worse, the best one is that student, and the stages after it run.

    Args:
        file: the file of the recipe, for error messages.

    Raises:
        UsageError, DataError, UnavailableError: the recipe is wrong, or a stage would certainly fail; nothing has run.
        StageFailed: a stage ended with an error, which it has printed; the same call goes on there.
        OutputBusy: another command writes the recipe's output now.
    """
    root = recipe.output.resolve()
    own = [path.resolve() for path in (file, Path(recipe.teacher), Path(recipe.student or recipe.teacher)) if path]
    beside = [path.relative_to(root).parts[0] for path in own if root in path.parents]
    with (
        output_folder(recipe.output, "distillation", "distill", known=(*LEFT_BEFORE, *beside)) as output,
        stages_by_fork(),
    ):
        return _run_stages(recipe, file, output)


def _run_stages(recipe: Recipe, file: Path | None, output: OutputFolder) -> DistillResult:
    from dpkd_offline.pipeline.dry_run import plan_of_work  # which imports torch
    from dpkd_offline.pipeline.report.report import report

    if "SLURM_ARRAY_TASK_ID" in os.environ:  # distill gives each stage its share, which is all of it
        console.info(
            "SLURM array: distill runs its whole recipe in one worker, and the others end; generate and score-teacher "
            "share shards"
        )
    stages, work = plan(recipe, file), plan_of_work(recipe, file)
    for warning in work.warnings:
        console.info(f"warning: {warning}")
    # Which run it is says each stage's own folder: a recipe may grow, but no stage that has begun may change.
    output.claim("recipe", known=lambda: None, begun=True)
    runner = Runner(recipe.output, len(stages), work.workloads, Box.of(recipe))
    for number, stage in enumerate(stages, start=1):
        run_stage(runner, recipe, stage, number, file)
    warnings = _warnings_of(recipe, stages)
    judgement = _judgement_of(stages)
    results = _collect_results(recipe, stages, warnings, judgement)
    training = read_model(recipe.output / "student" / "training.json", TrainingRecord)
    return DistillResult(
        path=recipe.output / "student",
        results=results,
        verdict=verdict(results),
        judgement=judgement,
        warnings=(*work.warnings, *warnings, *(judgement["warnings"] if judgement else ())),
        ruined=training.ruined,
        seconds=runner.seconds,
        page=report(ReportConfig(folder=recipe.output, output=None)).path,
    )


def _warnings_of(recipe: Recipe, stages: Sequence[Stage]) -> list[str]:
    """What the stages said of responses, pairs and students, as it follows from what they left."""
    from dpkd_offline.generation.health import dataset_warnings

    warnings = dataset_warnings(recipe.output / "dataset")
    for stage in stages:
        if isinstance(stage.config, TrainConfig):
            training = read_model(stage.config.output / "training.json", TrainingRecord)
            title = "" if stage.section == "train" else f"{stage.title}: "
            warnings += [f"{title}step {found.step}: {found.warning}" for found in training.warnings]
    return warnings


def _judgement_of(stages: Sequence[Stage]) -> dict[str, Any] | None:
    """The results of `judge`, where the recipe has it."""
    return next(
        (read_json(s.config.folder / "results.json") for s in stages if isinstance(s.config, JudgeConfig)), None
    )


def _collect_results(
    recipe: Recipe, stages: Sequence[Stage], warnings: Sequence[str], judgement: Mapping[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The results of all evaluations, which results.json and results.md then hold, with warnings beside the student.

    In results.md the words and the table of a judge follow.
    """
    from dpkd_offline.evaluation.summary import difference_of  # which imports numpy

    folders = [stage.config.output for stage in stages if isinstance(stage.config, EvaluateConfig)]
    results = {folder.name: read_json(folder / "results.json") for folder in folders}
    root = recipe.output / "evaluation"
    for model, numbers in results.items():
        for name, of_set in numbers.get("sets", {"": numbers}).items():
            as_model(of_set, root / model / name / "results.json", EvaluationRecord)
            if model == AFTER:
                before, after, teacher = (root / other / name for other in (BEFORE, AFTER, TEACHER))
                of_set["difference"] = difference_of(before, after, teacher)
    if warnings and AFTER in results:
        results[AFTER]["warnings"] = list(warnings)
    if results:
        write_json(recipe.output / "results.json", results)
        judged = [] if judgement is None else ["", _judged(judgement)]
        write_atomically(recipe.output / "results.md", "\n".join([results_table(results), *judged, ""]).encode())
    return results


def _judged(judgement: Mapping[str, Any]) -> str:
    """What a judge says of the student, and what is to be known of that."""
    from dpkd_offline.evaluation.judge import summary  # which imports an engine's client

    before = None if judgement["form"] == "score" else "student-before"
    warnings = [f"warning: {warning}" for warning in judgement["warnings"]]
    return "\n".join([summary(judgement, "student-after", before), *(["", *warnings] if warnings else [])])


def run_stage(runner: Runner, recipe: Recipe, stage: Stage, number: int, file: Path | None) -> None:
    """Run a stage; `train` with its rounds."""
    if isinstance(stage.config, TrainConfig) and stage.config.regenerates:
        _train_in_rounds(runner, recipe, stage, number, file)
    else:
        runner.run(stage, number)


def _train_in_rounds(runner: Runner, recipe: Recipe, stage: Stage, number: int, file: Path | None) -> None:
    """Run `train`, and each time that it waits for a round, the stages that make that round."""
    train = stage.config
    assert isinstance(train, TrainConfig)
    last: dict[str, Any] | None = None
    while True:
        due = find_json(train.due)
        if due is not None:
            if due == last:  # the round is complete, and train does not see it
                raise StageFailed(Interrupted.exit_code)
            for part in round_stages(recipe, train, due, file):
                runner.run(part, number, round=due["round"])
            last = due
        if not runner.run(stage, number, may_wait=True):
            return


class Runner:
    """Runs stages as a user would, and writes a line for each into `stages.jsonl`.

    Args:
        output: the folder of the run.
        total: how many stages the recipe has.
        workloads: what decides how long stages take, by their titles.
        box: the GPUs that they use.
        label: what the stages are of, where a line about one has to say so.
    """

    def __init__(self, output: Path, total: int, workloads: Mapping[str, Workload], box: Box, label: str = "") -> None:
        self._output, self._total, self._workloads, self._label = output, total, workloads, label
        self._box = box
        self.seconds: dict[str, float] = {}  # of each stage by its title

    def run(self, stage: Stage, number: int, *, round: int | None = None, may_wait: bool = False) -> bool:
        """Run a stage in a process of its own. Returns whether it ended because it waits for a round.

        Args:
            number: of the stage in the recipe, from 1.
            round: the round that the stage belongs to, if `train` asked for one.
            may_wait: whether ending for that reason is no error.

        Raises:
            StageFailed: it ended with an error.
        """
        console.info(f"{self._label}[{number}/{self._total}] {stage.title}")
        final = self._settings_file(stage, number, round)
        settings = final.with_name(f"new-{final.name}")  # a stage may refuse to go on with other settings than it had
        values, secrets = _settings_of(stage)
        write_yaml(settings, values)
        options = ["--config", str(settings), "--section", stage.section]
        workload = None if _has_begun(stage) else self._workloads.get(stage.title)
        started = time.monotonic()
        code, peak_memory = _run(command_of(stage, options, self._box), {**secrets, **self._box.environment})
        seconds = time.monotonic() - started
        self.seconds[stage.title] = self.seconds.get(stage.title, 0.0) + seconds
        train = stage.config if isinstance(stage.config, TrainConfig) else None
        ruined = code == StudentRuined.exit_code and train is not None
        with disk_errors(final):
            if not code or ruined:
                settings.replace(final)
            elif code == MismatchError.exit_code or final.exists():
                settings.unlink()
        record_stage(self._output, stage.title, seconds, code, peak_memory, workload)
        waits = code == Interrupted.exit_code and train is not None and train.due.exists()
        if code and not ruined and not (waits and may_wait):
            raise stage_failed(stage.title, code)
        return waits

    def is_done(self, stage: Stage, number: int) -> bool:
        """Whether the stage has ended well with these settings, and what it made has not been removed since."""
        final = self._settings_file(stage, number)
        if not final.is_file() or not _has_begun(stage):
            return False
        return bool(read_yaml(final)[0] == redacted_value(_settings_of(stage)[0]))

    def _settings_file(self, stage: Stage, number: int, round: int | None = None) -> Path:
        """The settings with which a stage ended well."""
        prefix = f"{number:02d}" if round is None else f"{number:02d}-round-{round:03d}"
        return self._output / "stages" / f"{prefix}-{NO_FILE_NAME.sub('-', stage.title)}.yaml"


def command_of(stage: Stage, options: Sequence[str], box: Box) -> list[str]:
    """The command that runs a stage with these options: of `train` in a process on each GPU, where there are several.

    The other stages start copies of their models themselves, on the GPUs that they see.
    """
    command = [*STAGE, stage.command, *options]
    if isinstance(stage.config, TrainConfig) and (training := box.training_of(stage.config)).processes > 1:
        return launched(training.processes, training.way, command)
    return command


def _settings_of(stage: Stage) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a stage as its file has them, and the secrets that are not in it."""
    return set_aside({stage.section: stage.config.model_dump(mode="json", exclude_none=True)})


def stage_failed(title: str, code: int) -> StageFailed:
    """What a stage's exit code other than 0 is to `distill`; negative is the number of the signal that ended it."""
    if code > 0:
        return StageFailed(code)
    if -code in SIGNALS:  # before it could say so itself
        return StageFailed(Interrupted.exit_code, f"{title}: {reason(-code)}")
    why = " (often by the system, because memory ran out)" if -code == signal.SIGKILL else ""
    return StageFailed(128 - code, f"{title}: ended by {signal.Signals(-code).name}{why}")  # a shell's code for it


def _has_begun(stage: Stage) -> bool:
    """Whether an earlier call left a part of what a stage makes."""
    from dpkd_offline.dataset.dataset import Dataset

    config = stage.config
    if isinstance(config, JudgeConfig):
        return config.folder.exists()
    if isinstance(config, InitStudentConfig | SubsetConfig | TrainConfig | EvaluateConfig):
        return config.output.exists()
    assert isinstance(config, GenerateConfig | ScoreTeacherConfig)
    if not Dataset.exists(config.dataset):
        return False
    dataset = Dataset.open(config.dataset, config.student_name)
    if isinstance(config, ScoreTeacherConfig):
        return dataset.pairs(config.round).folder.exists()
    return dataset.responses(config.role, config.round).folder.exists()


def _run(command: Sequence[str], secrets: Mapping[str, str]) -> tuple[int, int]:
    """Run a command. Returns its exit code, and the most memory that was seen of it and its processes, in bytes.

    The command ends when this process does, however that ends, because its standard input is closed then. A signal that
    interrupts this process goes on to the command, whose end is waited for: training saves its state first.
    """
    environment = {**os.environ, **secrets, STAGE_OF: str(os.getpid())}
    peak_memory = 0
    with start(command, environment) as process:
        try:
            while True:
                try:
                    return process.wait(LOOK_SECONDS), peak_memory
                except subprocess.TimeoutExpired:
                    peak_memory = max(peak_memory, _memory_of(process.pid))
        except BaseException:
            process.terminate()
            process.wait()
            raise


def _memory_of(process: int) -> int:
    """Bytes that a process and those that it has started hold now. The system's own count of a peak would not do: it
    begins with what the process that forked had."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        for one in (parent := psutil.Process(process), *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
    return total


def end_with_parent() -> None:
    """In a stage: end with the process that started it, so that no two runs write one folder."""

    def watch() -> None:
        os.read(0, 1)  # returns when the other end is closed
        os._exit(Interrupted.exit_code)

    if STAGE_OF in os.environ:
        threading.Thread(target=watch, daemon=True).start()
