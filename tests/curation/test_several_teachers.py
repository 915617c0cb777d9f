"""Datasets of different teachers as one: each row is its teacher's, and nobody else's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import metrics_of, train_config
from helpers.tiny import build_model, generate_config, replace_shard, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import MergeConfig, SubsetConfig
from dpkd_offline.curation.inspect import inspect, inspection_table
from dpkd_offline.curation.merge import merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.trainer import train

SOURCES = {"llama": rows(14), "other": rows(24)[9:]}  # of both are the rows 9 to 13


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path]) -> dict[str, Path]:
    """Two teachers of one tokenizer."""
    return {"llama": teachers["llama"], "other": build_model("llama", tmp_path_factory.mktemp("other") / "other", 5)}


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], students: dict[str, Path]
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    for name, teacher in models.items():
        source = write_jsonl(root / f"{name}.jsonl", SOURCES[name])
        generate(generate_config(root / name, "teacher", teacher, prompts=str(source), shard_size=6))
        generate(generate_config(root / name, "student", students["llama"]))
        score_teacher(score_config(root / name, teacher, top_k=3))
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, Path]) -> Path:
    output = tmp_path_factory.mktemp("both") / "both"
    config = MergeConfig(output=output, parts=tuple(parts.values()), several_teachers=True, shard_size=5)
    return merge(config).path


def rows_of(table: Any) -> list[Any]:
    return [row for shard in range(table.plan.count) for row in table.read(shard)]


def revisions(models: dict[str, Path]) -> dict[str, str]:
    return {name: ModelInfo(str(path)).identity["revision"] for name, path in models.items()}


def test_each_row_says_whose_it_is(both: Path, parts: dict[str, Path], models: dict[str, Path]) -> None:
    dataset, names = Dataset.open(both), revisions(models)
    originals = {name: {row.id: row for row in rows_of(Dataset.open(path).pairs(0))} for name, path in parts.items()}
    expected = ["llama"] * 14 + ["other"] * 10
    for table in (dataset.responses("teacher", 0), dataset.pairs(0)):
        assert [row.teacher for row in rows_of(table)] == [names[name] for name in expected]
    for pair, name in zip(rows_of(dataset.pairs(0)), expected, strict=True):
        own = originals[name][pair.id]
        assert pair.teacher_chosen_logps == own.teacher_chosen_logps and pair.chosen_ids == own.chosen_ids
    assert list(verify(both).rows) == [
        *("prompts", "responses/teacher", "responses/student/round-000", "pairs/round-000")
    ]
    for text in (inspection_table(inspect(both)), (both / "README.md").read_text()):
        for name, count in (("llama", 14), ("other", 10)):
            assert f"{count} rows" in text and names[name][:19] in text and name in text
    front = (both / "README.md").read_text().split("---")[1]
    assert "teacher:\n- llama\n- other\n" in front


def test_without_the_flag_the_refusal_names_it(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"model\.revision is .*--several-teachers keeps the rows of all"):
        merge(MergeConfig(output=tmp_path / "out", parts=tuple(parts.values())))


def test_parts_of_parts_keep_their_teachers(
    both: Path, parts: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    names = revisions(models)
    few = subset(SubsetConfig(dataset=both, output=tmp_path / "few", share=0.5)).path
    again = merge(
        MergeConfig(output=tmp_path / "again", parts=(few, parts["other"]), several_teachers=True, shard_size=3)
    ).path
    of_both = {row.id: row.teacher for row in rows_of(Dataset.open(both).pairs(0))}
    assert {row.id: row.teacher for row in rows_of(Dataset.open(few).pairs(0))}.items() <= of_both.items()
    for folder in (few, again):
        verify(folder)
    known = {row.id for row in rows_of(Dataset.open(few).pairs(0))}
    for row in rows_of(Dataset.open(again).pairs(0)):
        assert row.teacher == (of_both[row.id] if row.id in known else names["other"])


def test_verify_finds_a_row_with_the_wrong_teacher(both: Path, models: dict[str, Path], tmp_path: Path) -> None:
    other = revisions(models)["other"]
    for number, name in enumerate(("responses/teacher", "pairs/round-000")):
        folder = shutil.copytree(both, tmp_path / str(number))
        dataset = Dataset.open(folder)
        table: Any = (dataset.responses("teacher", 0), dataset.pairs(0))[number]
        shard = table.read_arrow(2)
        teachers = shard["teacher"].to_pylist()
        teachers[1] = other
        column = shard.schema.get_field_index("teacher")
        replace_shard(table, 2, shard.set_column(column, shard.schema.field("teacher"), [teachers]))
        with pytest.raises(DataError, match=rf"{name}/.*-00002-of-00005.parquet: row 1: column 'teacher' is not the"):
            verify(folder)
    path = folder / "pairs/round-000/_table.json"
    content = json.loads(path.read_text())
    content["teachers"][0]["rows"], content["teachers"][1]["rows"] = 12, 12
    path.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="which is no teacher of that part"):
        verify(folder)


def test_one_dataset_of_two_teachers_trains(
    both: Path, parts: dict[str, Path], models: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    student = students["llama"]
    train(train_config(both, student, tmp_path / "dpkd", batch_size=12, holdout=0.2))
    assert all(np.isfinite(line["loss"]) for line in metrics_of(tmp_path / "dpkd") if "loss" in line)
    assert "Teacher: `llama` (" in (tmp_path / "dpkd" / "README.md").read_text()
    for objective in ("kd", "minillm", "dpkd-token"):
        with pytest.raises(UsageError, match=r"several teachers .*matches the distribution of one"):
            train(train_config(both, student, tmp_path / "kd", objective=objective))
    with pytest.raises(MismatchError, match=r"are of several teachers .llama and other."):
        score_teacher(score_config(both, models["llama"], top_k=3))
    for options in ({"round": 1}, {"student_name": "second"}):
        with pytest.raises(MismatchError, match=r"are of several teachers .llama and other."):
            generate(generate_config(both, "student", student, **options))
