from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import from_recipe, read_recipe, recipe_of_student
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.pipeline.study import study_of

PIPELINES = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
RECIPE = """\
teacher: big
student: small
output: runs/x
generate:
  prompts: p.jsonl
train:
  beta: 0.2
  epochs: 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def test_defaults_then_recipe_then_flags(recipe: Path) -> None:
    flags = {"dataset": "d", "student": "s", "output": "o", "epochs": 7}
    config = from_recipe(TrainConfig, "train", recipe, flags)
    assert (config.beta, config.epochs, config.batch_size) == (0.2, 7, 8)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("beta: 0.2", "betta: 0.2", r"r\.yaml:7:3: train: unknown key 'betta'; did you mean 'beta'\?"),
        ("beta: 0.2", "beta: -1", r"r\.yaml:7:3: train: 'beta': input should be greater than 0"),
        ("epochs: 2", "epochs: many", r"r\.yaml:8:3: train: 'epochs': input should be a valid integer"),
        ("train:", "trian:", r"r\.yaml:6:1: unknown key 'trian'; did you mean 'train'\?"),
        ("  beta: 0.2\n  epochs: 2\n", "  - beta\n", r"r\.yaml:6:1: 'train': input should be a valid dictionary"),
        ("student: small\n", "", r"r\.yaml:1:1: give either student"),
        ("teacher: big", "teacher: [", r"r\.yaml:3:7: expected"),
        (RECIPE, "- a list\n", r"r\.yaml:1:1: expected a mapping of sections"),
        (
            "prompts: p.jsonl",
            "promtps: p.jsonl",
            r"r\.yaml:5:3: generate: unknown key 'promtps'; did you mean 'prompts'",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_placed(recipe: Path, before: str, after: str, message: str) -> None:
    recipe.write_text(RECIPE.replace(before, after))
    with pytest.raises(UsageError, match=message):
        plan(read_recipe(recipe), recipe)


STUDY = """\
students:
  kd:
    train: {objective: kd}
  bare:
    sft: null
    train:
      beta: 1.5
baseline: kd
seeds: [1, 2]
"""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("  bare:", "  a/b:", r"r\.yaml:12:3: 'students\.a/b': 'a/b' names a folder: letters, digits"),
        ("  bare:", "  '..':", r"r\.yaml:12:3: 'students\.\.\.': '\.\.' names a folder"),
        ("  bare:", "  " + "x" * 41 + ":", r"r\.yaml:12:3: 'students\.x+': 'x+' names a folder.*40 at most"),
        ("  bare:", "  KD:", r"r\.yaml:9:1: 'students': 'kd' and 'KD' are one folder"),
        ("sft: null", "sfd: null", r"r\.yaml:13:5: unknown key 'students\.bare\.sfd'; did you mean 'sft'\?"),
        ("sft: null", "generate: null", r"r\.yaml:13:5: 'students\.bare\.generate': of .* the others are"),
        ("beta: 1.5", "betta: 1.5", r"r\.yaml:15:7: students\.bare\.train: unknown key 'betta'; did you mean 'beta'\?"),
        ("beta: 1.5", "beta: -1", r"r\.yaml:15:7: students\.bare\.train: 'beta': input should be greater than 0"),
        ("beta: 1.5", "seed: 3", r"r\.yaml:9:1: 'students': 'bare\.train\.seed': .* say them in seeds"),
        ("epochs: 2", "epochs: x", r"r\.yaml:8:3: train: 'epochs': input should be a valid integer"),
        ("sft: null", "student: null", r"r\.yaml:12:3: students\.bare: give either student"),
        ("sft: null", "regenerate: {when: steps}", r"r\.yaml:13:5: .*'regenerate': when: steps needs every"),
        ("baseline: kd", "baseline: KD", r"r\.yaml:16:1: 'baseline': no student is called 'KD'.*there is: kd and bare"),
        ("seeds: [1, 2]", "seeds: [1, 1]", r"r\.yaml:17:1: 'seeds': 1 stands there twice"),
        ("epochs: 2", "seed: 2", r"r\.yaml:17:1: 'seeds': say it here or in train\.seed"),
        ("seeds: [1, 2]", "paper: bert", r"r\.yaml:17:1: 'paper': input should be 'gpt2' or 'opt'"),
        ("  kd:\n    train: {objective: kd}\n  bare:\n    sft: null\n    train:\n      beta: 1.5\n", "", "students"),
    ],
)
def test_what_is_wrong_in_a_student_is_placed(recipe: Path, before: str, after: str, message: str) -> None:
    recipe.write_text((RECIPE + STUDY).replace(before, after))
    with pytest.raises(UsageError, match=message):
        study_of(read_recipe(recipe), recipe)


def test_what_is_of_a_study_needs_students(recipe: Path) -> None:
    for key in ("seeds=[1]", "baseline=a", "paper=opt"):
        with pytest.raises(UsageError, match=rf"'{key.partition('=')[0]}': is of a study, and there are no students"):
            read_recipe(recipe, [key])
    alone = study_of(read_recipe(recipe, ["students={a: null}", "train.seed=4"]), recipe)
    assert (alone.layout.seeds, alone.layout.baseline) == ([4], None)


def test_a_student_is_the_recipe_with_its_changes(recipe: Path) -> None:
    recipe.write_text(RECIPE + "sft: {epochs: 1, batch_size: 4}\nregenerate: {when: steps, every: 5}\n")
    changes = {
        "same": None,
        "other": {"sft": {"epochs": 3}, "train": {"epochs": 9}, "regenerate": {"every": 7}},
        "cut": {"init_student": {"layers": 2}, "sft": None, "regenerate": None},
    }
    study = read_recipe(recipe, [f"students={json.dumps(changes)}"])
    same, other, cut = (recipe_of_student(study, name, 3) for name in changes)
    assert (same.train, same.sft, same.students) == (
        {"beta": 0.2, "epochs": 2, "seed": 3},
        {"epochs": 1, "batch_size": 4},
        None,
    )
    assert (other.train["epochs"], other.train["beta"], other.sft) == (9, 0.2, {"epochs": 3, "batch_size": 4})
    assert other.regenerate is not None and (other.regenerate.when, other.regenerate.every) == ("steps", 7)
    assert (cut.student, cut.init_student, cut.sft, cut.regenerate) == (None, {"layers": 2}, None, None)


def test_a_single_command_reads_its_section_with_the_same_errors(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("beta", "betta"))
    with pytest.raises(UsageError, match=r"r\.yaml:7:3: train: unknown key 'betta'"):
        from_recipe(TrainConfig, "train", recipe, {"dataset": "d", "student": "s", "output": "o"})
    with pytest.raises(UsageError, match="no section 'evaluate'"):
        from_recipe(EvaluateConfig, "evaluate", recipe, {})


def test_set_changes_a_value_of_a_recipe(recipe: Path) -> None:
    changed = read_recipe(
        recipe, ["train.beta=0.5", "output=elsewhere", "evaluate.prompts=t.jsonl", "evaluate.seeds=[1,2]"]
    )
    assert (changed.train["beta"], changed.output) == (0.5, Path("elsewhere"))
    assert changed.evaluate == {"prompts": "t.jsonl", "seeds": [1, 2]}
    for wrong in ("train.beta", "=3", "teacher.x=1"):
        with pytest.raises(UsageError, match="--set"):
            read_recipe(recipe, [wrong])


def test_a_recipe_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_every_stage_has_a_config(path: Path) -> None:
    recipe = read_recipe(path)
    stages = plan(recipe, path)
    assert [s.command for s in stages if s.command not in ("evaluate", "judge")][-4:] in (
        ["generate", "generate", "score-teacher", "train"],
        ["train", "generate", "score-teacher", "train"],
    )
    assert recipe.students is None or study_of(recipe, path).layout.students.keys() == recipe.students.keys()


def test_the_recipes_of_the_paper_are_there() -> None:
    assert {"demo", "paper-gpt2", "paper-opt", "qwen3"} <= {path.stem for path in PIPELINES}
