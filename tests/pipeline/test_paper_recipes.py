"""The paper's recipes, on stand-ins of the published layouts and of the models."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.tiny import rows, write_jsonl

from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.pipeline.study import study_of
from dpkd_offline.pipeline.study_plan import plan_of_study, table_of_study

PIPELINES = Path(__file__).parents[2] / "pipelines"
CONTEXT = {"gpt2": "n_positions", "opt": "max_position_embeddings"}


def publish(folder: Path) -> None:
    """Dolly, Self-Instruct and Super-Natural Instructions as they are published, and a corpus."""
    row, *others = rows(60)
    dolly = [
        {"instruction": r["instruction"], "context": r["input"], "response": r["reference"], "category": "open_qa"}
        for r in (row, row | {"reference": f"{row['reference']} It is asked twice."}, *others)
    ]
    write_jsonl(folder / "databricks-dolly-15k.jsonl", dolly)
    instances = [{"input": others[0]["instruction"], "output": "Yes."}]  # as in the first instance of task1_tea
    task = {"id": "user_oriented_task_0", "motivation_app": "Gmail", "instruction": "Do.", "instances": instances}
    write_jsonl(folder / "user_oriented_instructions.jsonl", [task])
    (folder / "ni" / "tasks").mkdir(parents=True)
    (folder / "ni" / "splits" / "default").mkdir(parents=True)
    (folder / "ni" / "splits" / "default" / "test_tasks.txt").write_text("task1_tea\n")
    instances = [
        {"id": f"task1-{n}", "input": r["instruction"], "output": [r["reference"]]} for n, r in enumerate(others)
    ]
    (folder / "ni" / "tasks" / "task1_tea.json").write_text(json.dumps({"Definition": ["Do."], "Instances": instances}))
    (folder / "data" / "paper").mkdir(parents=True)
    for corpus in ("openwebtext", "roberta-corpus"):
        write_jsonl(folder / "data" / "paper" / f"{corpus}.jsonl", [{"text": r["reference"]} for r in others])


@pytest.mark.parametrize("paper", ["gpt2", "opt"])
def test_a_dry_run_of_the_papers_recipe_prints_every_student(
    paper: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(PIPELINES))
    publish(tmp_path)
    script = importlib.import_module("paper_prompts")
    for name, source in (("dolly", "databricks-dolly-15k.jsonl"), ("selfinst", "user_oriented_instructions.jsonl")):
        assert script.main([name, source, "data/paper", "--held-out", "5"]) == 0
    assert script.main(["sni", "ni", "data/paper"]) == 0

    model = Path(shutil.copytree(teachers[paper], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {CONTEXT[paper]: 1024}))  # a dry run reads no weights
    file = PIPELINES / f"paper-{paper}.yaml"
    students = yaml.safe_load(file.read_text())["students"]
    others = [f"students.{name}.student=model" for name, changes in students.items() if "student" in changes]
    recipe = read_recipe(file, ["teacher=model", "student=model", *others])
    study = study_of(recipe, file)
    table = table_of_study(study, plan_of_study(study, file), [])
    costs = {line.split("|")[1].strip(): line.split("|")[2:5] for line in table.splitlines() if line.startswith("| ")}
    for name in students:
        assert all(cell.strip() for cell in costs[name]), name  # sequences, tokens, disk
    assert "3 seeds, from start-1: train, evaluate: student after, judge" in table
