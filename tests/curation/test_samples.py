"""Commands on a dataset of several samples: each table is carried, named and read as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from helpers.runs import train_config
from helpers.tiny import files_of, generate_config, rows, score_config, write_jsonl

from dpkd_offline.config.data import ExportConfig, MergeConfig, SubsetConfig
from dpkd_offline.curation.export_pairs import export_pairs
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.merge import merge, subset
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.sharing.pull import pull
from dpkd_offline.sharing.push import push
from dpkd_offline.training.preflight import preflight

OTHERS = "has 3 samples of responses, of which the first is read"


def make(folder: Path, first: int, students: int, models: tuple[Path, Path]) -> Path:
    """Twelve prompts with three samples of the teacher, and some of the student."""
    source = write_jsonl(folder.with_suffix(".jsonl"), rows(first + 12)[first:])
    generate(generate_config(folder, "teacher", models[0], prompts=str(source), samples=3))
    generate(generate_config(folder, "student", models[1], samples=students))
    score_teacher(score_config(folder, models[0], top_k=3))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Path], students: dict[str, Path]) -> list[Path]:
    root, models = tmp_path_factory.mktemp("parts"), (teachers["llama"], students["llama"])
    return [make(root / f"part-{n}", 12 * n, 3 - n, models) for n in range(2)]


def test_the_card_names_each_sample_and_datasets_reads_it(parts: list[Path], tmp_path: Path) -> None:
    for config, sample in (("pairs", 0), ("pairs-sample-2", 2), ("top_k-sample-1", 1)):
        kind = Dataset.top_k if config.startswith("top_k") else Dataset.pairs
        read = datasets.load_dataset(str(parts[1]), config, split="train", cache_dir=str(tmp_path / "cache"))
        table = kind(Dataset.open(parts[1], sample=sample), 0)
        assert read.to_list() == [row for n in range(table.plan.count) for row in table.read_arrow(n).to_pylist()]
    card = (parts[1] / "README.md").read_text()
    assert "`samples/002/pairs/round-000`: y_s is that of the first sample, and scored there" in card
    assert "with `sample-1` and so on behind it: other responses to the same prompts" in card
    tables = inspect(parts[1])["tables"]
    assert tables["samples/002/pairs/round-000"]["identical"] and "samples/002/responses/teacher" in tables


def test_samples_are_pushed_pulled_merged_and_subset(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(parts[1], str(tmp_path / "shared"))
    pull(str(tmp_path / "shared"), tmp_path / "pulled")
    assert files_of(tmp_path / "pulled") == files_of(parts[1])
    pull(str(tmp_path / "shared"), tmp_path / "one", ["samples/001"])
    assert {of.sample for of in Dataset.open(tmp_path / "one").samples()} == {0, 1}

    both = merge(MergeConfig(output=tmp_path / "both", parts=tuple(parts)))
    said = capsys.readouterr().err
    assert "samples/002/pairs/round-000 is left out: its y_t or y_s are of the first sample in some" in said
    assert {"samples/001/pairs/round-000", "samples/001/top_k/round-000"} <= {*both.tables}
    few = subset(SubsetConfig(dataset=parts[1], output=tmp_path / "few", limit=5))
    assert few.rows == 5 and "samples/002/pairs/round-000" in few.tables
    for folder in (tmp_path / "both", tmp_path / "few", tmp_path / "one"):
        verify(folder)
    seeds = [of.responses("teacher", 0).read(0) for of in Dataset.open(tmp_path / "both").samples()[:2]]
    assert [row.id for row in seeds[0]] == [row.id for row in seeds[1]] and seeds[0] != seeds[1]
    made = json.loads((tmp_path / "both/samples/001/pairs/round-000/_table.json").read_text())
    assert (made["sample"], made["student_sample"]) == (1, 1)


def test_train_and_export_say_that_they_read_the_first(
    parts: list[Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight(train_config(parts[0], students["llama"], tmp_path / "run"))
    assert capsys.readouterr().err.count(OTHERS) == 1
    export_pairs(ExportConfig(dataset=parts[0], output=tmp_path / "pairs.jsonl", format="jsonl"))
    assert capsys.readouterr().err.count(OTHERS) == 1
    alone = shutil.copytree(parts[0], tmp_path / "alone", ignore=shutil.ignore_patterns("samples"))
    export_pairs(ExportConfig(dataset=alone, output=tmp_path / "alone.jsonl", format="jsonl"))
    assert "samples" not in capsys.readouterr().err
    assert (tmp_path / "alone.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
