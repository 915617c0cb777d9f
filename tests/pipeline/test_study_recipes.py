"""The study of all objectives: its recipes, the rule that chooses learning rates, and its tables again."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from helpers.hand_study import write_study
from helpers.tiny import write_jsonl

from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.pipeline.study import study_of
from dpkd_offline.pipeline.study_layout import read_study
from dpkd_offline.pipeline.study_plan import plan_of_study
from dpkd_offline.pipeline.study_results import collect_results

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PIPELINES))
    return importlib.import_module("study_rates")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PIPELINES))
    return importlib.import_module("study_tables")


@pytest.mark.parametrize("name", ["study", "study-pilot"])
def test_a_recipe_plans_every_student_on_the_demos_prompts(
    name: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "data", "data")
    small = [f"teacher={teachers['llama']}", "init_student.layers=2", "generate.limit=40", "evaluate.limit=4"]
    limits = ["generate.max_prompt_tokens=150", "evaluate.max_prompt_tokens=150", "train.validate_max_new_tokens=32"]
    limits = [limit for limit in limits if name == "study" or "evaluate" not in limit]
    small = [word for word in small if name == "study" or "evaluate" not in word]
    short = ["generate.max_new_tokens=8", "generate_student.max_new_tokens=8"]
    recipe = read_recipe(PIPELINES / f"{name}.yaml", [*small, *limits, *short, "sft.max_length=256"])
    study = study_of(recipe, PIPELINES / f"{name}.yaml")
    plan = plan_of_study(study, PIPELINES / f"{name}.yaml")
    assert list(study.layout.starts) == ["start-1"]  # all from one model, with one set of y_s
    assert plan.works.keys() == {unit.title for unit in study.units}


def test_every_objective_is_in_the_study_and_all_see_as_many_pairs(rates: ModuleType) -> None:
    study, pilot = (yaml.safe_load((PIPELINES / f"{name}.yaml").read_text()) for name in ("study", "study-pilot"))
    trained = {name: {**study["train"], **(of.get("train") or {})} for name, of in study["students"].items()}
    assert {train.get("objective", "dpkd") for train in trained.values()} == OBJECTIVES.keys()
    long = {name for name in trained if name.endswith("-long")}
    assert len({(trained[name]["max_steps"], trained[name]["batch_size"]) for name in trained.keys() - long}) == 1
    assert len({train["holdout"] for train in trained.values()}) == 1
    for name in long:  # the same student, but for three times the steps
        short, other = trained[name.removesuffix("-long")], trained[name]
        assert other == {**short, "max_steps": 3 * short["max_steps"], "validate_every": 3 * short["validate_every"]}
    assert study["sft"]["holdout"] == study["train"]["holdout"]  # what is held out was never seen

    # The pilot is of the same students on the same data, and with its rates each student of the study has one.
    variants = {name for of in rates.VARIANTS.values() for name in of}
    assert {name.partition(".")[0] for name in pilot["students"]} | variants == study["students"].keys()
    for section in ("teacher", "init_student", "sft", "generate", "generate_student", "score_teacher"):
        assert pilot[section] == study[section]
    assert {key: pilot["train"][key] for key in ("max_steps", "batch_size", "holdout")} == {
        key: study["train"][key] for key in ("max_steps", "batch_size", "holdout")
    }
    for name, of in pilot["students"].items():
        student, _, rate = name.partition(".")
        own = {key: value for key, value in of["train"].items() if key != "learning_rate"}
        assert of["train"]["learning_rate"] == float(rate)
        expected = {"objective": "dpkd", **(study["students"][student].get("train") or {})}
        assert own == expected


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ({"1e-5": (9.0, 0.5, 0.3), "1e-4": (12.0, 0.5, 0.4), "1e-3": (10.0, 0.5, 0.6)}, "1e-4"),  # beyond one error
        ({"1e-5": (11.6, 0.5, 0.5), "1e-4": (12.0, 0.5, 0.4), "1e-3": (10.0, 0.5, 0.6)}, "1e-5"),  # within: the nearer
        ({"1e-5": (11.6, 0.5, None), "1e-4": (12.0, 0.5, None)}, "1e-4"),  # sft: Rouge-L alone
        ({"1e-4": (12.0, 0.5, 0.4), "1e-5": (12.0, 0.5, 0.4)}, "1e-5"),  # equal: the lower, as a number
    ],
)
def test_the_rule_of_choice(
    rates: ModuleType, measured: dict[str, tuple[float, float, float | None]], chosen: str
) -> None:
    names = (rates.ROUGE_L, rates.ERROR, rates.ACCEPTANCE)
    found = {
        rate: {key: value for key, value in zip(names, values, strict=True) if value is not None}
        for rate, values in measured.items()
    }
    assert rates.choose(found) == chosen


def test_rates_are_read_from_the_last_validation_of_each_seed(
    rates: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    students = ["dpkd.3e-5", "dpkd.1e-4", "sft.3e-5", "sft.1e-4"]
    write_study(tmp_path / "p", students, seeds=(0, 1), sets=("x",), baseline=None, paper=None)
    for name in students:
        for seed in (0, 1):
            folder = tmp_path / "p" / "students" / name / f"seed-{seed}" / "student"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "training.json").write_text(json.dumps({"run": "0", "steps": 2}))
            last = {"step": 2, "val_rouge_l": 10 + seed + ("1e-4" in name), "val_rouge_l_error": 0.4}
            last |= {"val_acceptance": 0.5} if name.startswith("dpkd") else {}
            write_jsonl(folder / "metrics.jsonl", [{"step": 0, "val_rouge_l": 99.0}, last, {"step": 3, "loss": 1.0}])
    assert rates.main([str(tmp_path / "p")]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| `")]
    assert rows == [
        ["`dpkd`", "10.50 ± 0.40, 50.0", "**11.50 ± 0.40, 50.0**"],
        ["`sft`", "10.50 ± 0.40", "**11.50 ± 0.40**"],
    ]
    words = printed.split("\n\n")[1].replace("\\\n", "").split()
    recipe = read_recipe(PIPELINES / "study.yaml", words[1::2])  # they are what distill takes
    assert recipe.students is not None and recipe.students["dpkd-beta-4"].train["learning_rate"] == 1e-4
    assert recipe.students["dpkd-two-rounds"].train == {"learning_rate": 1e-4}

    (tmp_path / "p" / "students" / "sft.1e-4" / "seed-1" / "student" / "training.json").unlink()
    assert rates.main([str(tmp_path / "p")]) == 3
    assert "sft.1e-4/seed-1/student: not trained to its end" in capsys.readouterr().err
    assert rates.main([str(tmp_path)]) == 3


def test_the_table_says_how_many_seeds_are_there(tables: ModuleType, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", ["sft", "rkl", "kd", "gkd", "dpkd"], seeds=(1, 2, 3), sets=("x",), paper=None)
    note = next(line for line in tables.tables(folder).splitlines() if "seeds of training" in line)
    assert "2 to 3 of 3 seeds of training" in note  # the last three each lack one
    for seed in (2, 3):
        for run in folder.glob(f"students/*/seed-{seed}"):
            shutil.rmtree(run)
    assert "1 seed of training: mean [95 % interval over prompts]" in tables.tables(folder)


def test_tables_again_are_those_of_distill_and_a_changed_file_is_seen(
    tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "s", ["sft", "rkl", "dpkd"], seeds=(1,), sets=("dolly",), paper=None)
    layout = read_study(folder)
    assert layout is not None
    collect_results(folder, layout)
    stored = (folder / "results.md").read_text()
    assert tables.main([str(folder), "--check"]) == 0
    assert capsys.readouterr().out == stored
    assert tables.main([str(folder), "--baseline", "rkl", "--check"]) == 0
    other = capsys.readouterr().out
    assert "minus `rkl`" in other and "minus `sft`" in stored and "minus `sft`" not in other

    assert tables.main([str(folder), "--baseline", "kd"]) == 2
    (folder / "results.md").write_text(stored.replace("1 seed of training", "2 seeds of training"))
    assert tables.main([str(folder), "--check"]) == 4
    assert "results.md, line " in capsys.readouterr().err
