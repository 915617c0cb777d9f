"""`distill`: a whole experiment from one recipe, each stage in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd_offline import log
from dpkd_offline.config import (
    Config,
    EvaluateConfig,
    GenerateConfig,
    InitStudentConfig,
    Recipe,
    ScoreTeacherConfig,
    TrainConfig,
    write_yaml,
)
from dpkd_offline.errors import Interrupted, StageFailed, StudentRuined, UsageError
from dpkd_offline.files import find_json, read_json, write_atomically, write_json
from dpkd_offline.health import BROKEN
from dpkd_offline.recipes import recipe_section
from dpkd_offline.remote import RemotePath

NO_FILE_NAME = re.compile(r"[^a-z0-9-]+")
STAGE_OF = "DPKD_OFFLINE_STAGE_OF"  # set in a stage's environment: who started it


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


def distill(recipe: Recipe, file: Path | None = None) -> Path:
    """Run every stage of a recipe that is not done yet; returns the folder of the trained student.

    Where training stopped because the student got worse, the best one is that student, and the stages after it run.

    Raises:
        UsageError: a section of the recipe is wrong; nothing has run.
        StageFailed: a stage ended with an error, which it has printed; the same call goes on there.
    """
    stages = plan(recipe, file)
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # each stage is told its share, which is all of it
        log.info("SLURM array: distill runs its whole recipe in every worker; generate and score-teacher share shards")
    for number, stage in enumerate(stages, start=1):
        place, shown = f"{number:02d}", f"[{number}/{len(stages)}]"
        if isinstance(stage.config, TrainConfig) and stage.config.regenerates:
            _train_in_rounds(recipe, stage, place, shown, file)
        else:
            _run_stage(recipe, stage, place, shown)
    results = {}
    for stage in stages:
        if isinstance(stage.config, EvaluateConfig):
            results[stage.config.output.name] = read_json(stage.config.output / "results.json")
    if results:
        write_json(recipe.output / "results.json", results)
        write_atomically(recipe.output / "results.md", (table(results) + "\n").encode())
    return recipe.output / "student"


def _train_in_rounds(recipe: Recipe, stage: Stage, place: str, shown: str, file: Path | None) -> None:
    """Run `train`, and each time that it waits for a round, what makes that round."""
    train = stage.config
    assert isinstance(train, TrainConfig)
    made: dict[str, Any] | None = None
    while True:
        due = find_json(train.due)
        if due is not None:
            if due == made:  # it is there, and train does not see it
                raise StageFailed(Interrupted.exit_code)
            for part in _round(recipe, train, due, file):
                _run_stage(recipe, part, f"{place}-round-{due['round']:03d}", shown)
            made = due
        if not _run_stage(recipe, stage, place, shown, may_wait=True):
            return


def _round(recipe: Recipe, train: TrainConfig, due: Mapping[str, Any], file: Path | None) -> list[Stage]:
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


def _run_stage(recipe: Recipe, stage: Stage, place: str, shown: str, may_wait: bool = False) -> bool:
    """Run a stage in a process of its own. Returns whether it ended because it waits for a round.

    `stages.jsonl` has a line for each that ran, with its seconds.

    Raises:
        StageFailed: it ended with an error.
    """
    log.info(f"{shown} {stage.title}")
    settings = recipe.output / "stages" / f"{place}-{NO_FILE_NAME.sub('-', stage.title)}.yaml"
    write_yaml(settings, {stage.section: stage.config.model_dump(mode="json", exclude_none=True)})
    options = ["--config", str(settings), "--section", stage.section]
    started = time.monotonic()
    code = _run([sys.executable, "-m", "dpkd_offline.cli", stage.command, *options])
    with (recipe.output / "stages.jsonl").open("a", encoding="utf-8") as file:
        seconds = round(time.monotonic() - started, 1)
        file.write(json.dumps({"stage": stage.title, "seconds": seconds, "exit_code": code}) + "\n")
    waits = code == Interrupted.exit_code and isinstance(stage.config, TrainConfig) and stage.config.due.exists()
    ruined = code == StudentRuined.exit_code and isinstance(stage.config, TrainConfig)
    if code and not ruined and not (waits and may_wait):
        raise StageFailed(code if code > 0 else 128 - code)  # as a shell says of a signal
    return waits


def _run(command: Sequence[str]) -> int:
    """Run a stage; it ends when this process does, however that ends, because its standard input does.

    What interrupts this process is handed on, and waited for: training saves its state first.
    """
    environment = {**os.environ, STAGE_OF: str(os.getpid())}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            return process.wait()
        except Interrupted:
            process.terminate()
            process.wait()
            raise


def end_with_parent() -> None:
    """In a stage: watch for the end of the process that started it, so that no two runs write one folder."""

    def watch() -> None:
        os.read(0, 1)  # returns when the other end is closed
        os._exit(Interrupted.exit_code)

    if STAGE_OF in os.environ:
        threading.Thread(target=watch, daemon=True).start()


COLUMNS = {
    "rouge_l": ("Rouge-L", ".2f"),
    "exact_match": ("exact match", ".2f"),
    "teacher_nll": ("teacher NLL/token", ".3f"),
    "reward": ("implicit reward", ".4f"),
    "tokens": ("tokens", ".1f"),
}


QUALITY = {"rouge_l": 1, "teacher_nll": -1}  # whether more of it is better


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results of several models as a Markdown table: mean ± spread over the seeds."""
    first = next(iter(results.values()))
    shown = {name: column for name, column in COLUMNS.items() if name in first}
    lines = [["model", *(title for title, _ in shown.values()), "cut off"]]
    for model, r in results.items():
        cells = [f"{r[name]['mean']:{form}} ± {r[name]['spread']:{form}}" for name, (_, form) in shown.items()]
        lines.append([model.replace("-", " "), *cells, f"{r['truncated']:.0%}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    prompts, seeds = first["prompts"], len(first["seeds"])
    note = f"{prompts} held-out prompts, {seeds} seeds: mean ± standard deviation over seeds"
    verdict = []
    if {"student-before", "student-after"} <= results.keys():
        verdict = ["", verdict_of(results["student-before"], results["student-after"])]
    return "\n".join([*rows, "", note, *verdict])


def verdict_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Whether a student is better or worse than it was, by each measure that is of quality.

    A difference counts where it is more than two standard errors of the seeds' means; of one seed nothing is known.
    Responses that no longer end come first: what repeats itself until it is cut off may have more words of the
    reference in it, and be likelier for the teacher, than a response.
    """
    words = []
    if after["truncated"] - before["truncated"] > BROKEN:
        words = [f"worse: its responses no longer end ({before['truncated']:.0%} → {after['truncated']:.0%} cut off)"]
    for name, sign in QUALITY.items():
        if name in before and name in after:
            title, form = COLUMNS[name]
            seeds = len(after[name]["by_seed"])
            error = math.hypot(before[name]["spread"], after[name]["spread"]) / math.sqrt(seeds)
            gain = sign * (after[name]["mean"] - before[name]["mean"])
            word = "better" if gain > 0 else "worse"
            if seeds < 2 or abs(gain) <= 2 * error:
                word = "no different beyond noise"
            words.append(f"{word} in {title} ({before[name]['mean']:{form}} → {after[name]['mean']:{form}})")
    return f"The student after training is {', '.join(words)}."
