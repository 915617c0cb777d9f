"""`distill`: run a whole experiment from one recipe, each stage in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, StageFailed, StudentRuined
from dpkd_offline.common.files import find_json, read_json, write_atomically, write_json
from dpkd_offline.config.base import write_yaml
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.evaluation.table import results_table
from dpkd_offline.pipeline.stages import Stage, plan, round_stages

NO_FILE_NAME = re.compile(r"[^a-z0-9-]+")
STAGE_OF = "DPKD_OFFLINE_STAGE_OF"  # set in a stage's environment: who started it


def distill(recipe: Recipe, file: Path | None = None) -> Path:
    """Run every stage of a recipe that is not done yet; returns the folder of the trained student.

    Where training stopped because the student got worse, the best one is that student, and the stages after it run.

    Raises:
        UsageError: a section of the recipe is wrong; nothing has run.
        StageFailed: a stage ended with an error, which it has printed; the same call goes on there.
    """
    stages = plan(recipe, file)
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # each stage is told its share, which is all of it
        console.info(
            "SLURM array: distill runs its whole recipe in every worker; generate and score-teacher share shards"
        )
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
        write_atomically(recipe.output / "results.md", (results_table(results) + "\n").encode())
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
            for part in round_stages(recipe, train, due, file):
                _run_stage(recipe, part, f"{place}-round-{due['round']:03d}", shown)
            made = due
        if not _run_stage(recipe, stage, place, shown, may_wait=True):
            return


def _run_stage(recipe: Recipe, stage: Stage, place: str, shown: str, may_wait: bool = False) -> bool:
    """Run a stage in a process of its own. Returns whether it ended because it waits for a round.

    `stages.jsonl` has a line for each that ran, with its seconds.

    Raises:
        StageFailed: it ended with an error.
    """
    console.info(f"{shown} {stage.title}")
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
