from __future__ import annotations

from pathlib import Path

import pytest

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import Recipe, from_recipe, read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.pipeline.stages import plan

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
    assert [s.command for s in stages if s.command != "evaluate"][-4:] in (
        ["generate", "generate", "score-teacher", "train"],
        ["train", "generate", "score-teacher", "train"],
    )
    assert isinstance(recipe, Recipe)


def test_the_recipes_of_the_paper_are_there() -> None:
    assert {"demo", "gpt2", "opt", "qwen3"} <= {path.stem for path in PIPELINES}
