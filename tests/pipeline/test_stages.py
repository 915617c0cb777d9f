"""What a recipe implies for its stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_recipe

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig, SubsetConfig
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.pipeline.stages import plan, round_stages


@pytest.mark.parametrize(
    ("changes", "tokens", "room"),
    [
        (["generate_teacher={prompts: p.jsonl, max_new_tokens: 48, max_length: 2000}"], 8, 256),  # generate says 8
        (["generate={prompts: p.jsonl, max_new_tokens: 48, max_length: 2000}"], 48, 2000),
        (["generate_teacher={prompts: p.jsonl, max_new_tokens: 48, max_length: 2000}", "generate={}"], 48, 2000),
        (["generate_teacher={prompts: p.jsonl, max_new_tokens: 48, max_length: 200}", "generate={}"], 48, 1024),
        (["generate_student={max_length: 300}", "generate={prompts: p.jsonl, max_new_tokens: 40}"], 40, 300),
    ],
)
def test_the_student_may_answer_as_long_as_the_teacher_unless_its_section_says_otherwise(
    changes: list[str], tokens: int, room: int, tmp_path: Path
) -> None:
    """In its first answers and in those of every round."""
    recipe = read_recipe(write_recipe(tmp_path, Path("big")), [*changes, "regenerate={every: 1}", "evaluate=null"])
    stages = {stage.title: stage.config for stage in plan(recipe)}
    train = stages["train"]
    assert isinstance(train, TrainConfig)
    later, _ = round_stages(recipe, train, {"round": 1, "student": "round-001"}, None)
    for config in (stages["generate: student"], later.config):
        assert isinstance(config, GenerateConfig)
        assert (config.max_new_tokens, config.max_length) == (tokens, room)


def test_a_subset_stands_between_scoring_and_training_whose_rounds_are_its_too(tmp_path: Path) -> None:
    changes = ["subset={pairs: best, min_gap: 0.1}", "generate.samples=2", "regenerate={every: 1}", "evaluate=null"]
    recipe = read_recipe(write_recipe(tmp_path, Path("big")), changes)
    stages = plan(recipe)
    assert [stage.command for stage in stages][-3:] == ["score-teacher", "subset", "train"]
    made, train = stages[-2].config, stages[-1].config
    assert isinstance(made, SubsetConfig) and isinstance(train, TrainConfig)
    assert (made.pairs, made.min_gap, made.output) == ("best", 0.1, train.dataset)
    assert made.dataset == tmp_path / "run" / "dataset" != train.dataset
    for stage in round_stages(recipe, train, {"round": 1, "student": "round-001"}, None):
        assert isinstance(stage.config, GenerateConfig | ScoreTeacherConfig)
        assert stage.config.dataset == train.dataset
    with pytest.raises(UsageError, match="subset is of one student; make the dataset of a study first"):
        read_recipe(write_recipe(tmp_path, Path("big")), [*changes, "students={a: {}}"])
