from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from helpers.runs import write_recipe
from helpers.tiny import files_of

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.dry_run import plan_of_work
from dpkd_offline.prompts.reader import PromptReport, read_prompts


def test_a_dry_run_counts_what_the_stages_will_do(
    tmp_path: Path, teachers: dict[str, Path], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = write_recipe(tmp_path, teachers["llama"])
    recipe = yaml.safe_load(path.read_text())
    recipe["regenerate"] = {"when": "steps", "every": 1, "rounds": 2, "share": 0.5}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    works = {work.stage: work for work in plan_of_work(read_recipe(path), path).works}
    model = ModelInfo(str(teachers["llama"]))
    prompts = list(read_prompts(str(tmp_path / "train.jsonl"), PromptOptions(), model, PromptReport()))  # type: ignore[call-arg]
    read = sum(len(p.prompt_ids) for p in prompts)
    assert (works["generate: teacher"].sequences, works["generate: teacher"].tokens) == (12, 12 * 8)
    assert (works["score-teacher"].sequences, works["score-teacher"].tokens) == (24, read + 2 * 12 * 8)
    assert (works["generate: student, round 2"].sequences, works["generate: student, round 2"].tokens) == (6, 6 * 8)
    assert works["score-teacher, round 1"].sequences == 6
    assert works["train"].sequences == 2 * 6
    assert works["evaluate: teacher"].sequences == 6 * 2
    before = files_of(tmp_path)
    done = run_cli("distill", path, "--dry-run")
    assert (done.returncode, files_of(tmp_path)) == (0, before)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [*works, "in all"]


def test_a_student_that_could_not_be_trained_or_saved_is_found_in_the_plan(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teachers["llama"], tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (teacher / "config.json").write_text(json.dumps(config))
    path = write_recipe(tmp_path, teacher)
    with pytest.raises(UnavailableError, match=r"quantised \(gptq\), and such weights cannot be trained"):
        plan_of_work(read_recipe(path), path)
