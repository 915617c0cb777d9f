"""What a recipe implies for its stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import write_recipe

from dpkd_offline.config.data import GenerateConfig
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
