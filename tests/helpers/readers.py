"""Programs that know nothing of this one, reading its datasets and training on its exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import duckdb
import polars
import pyarrow.parquet as pq
import torch
import trl

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.objectives import OBJECTIVES, score
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

TABLES = {
    "prompts": "prompts",
    "teacher_responses": "responses/teacher",
    "student_responses": "responses/student/round-000",
    "pairs": "pairs/round-000",
}


def rows_by_reader(dataset: Path, config: str, cache: Path) -> dict[str, list[dict[str, Any]]]:
    """All rows of a table, as pyarrow, datasets, DuckDB and polars see them."""
    folder = dataset / TABLES[config]
    files = str(folder / "*.parquet")  # DuckDB and polars keep the order of rows, and take files by name
    return {
        "pyarrow": pq.read_table(folder).to_pylist(),
        "datasets": datasets.load_dataset(str(dataset), config, split="train", cache_dir=str(cache)).to_list(),
        "duckdb": duckdb.sql(f"FROM '{files}'").to_arrow_table().to_pylist(),
        "polars": polars.read_parquet(files).to_dicts(),
    }


def pairs_of(dataset: Path) -> list[PreferencePair]:
    table = Dataset.open(dataset).pairs(0)
    return [pair for shard in range(table.plan.count) for pair in table.read(shard)]


def our_losses(pairs: Sequence[PreferencePair], model: Path, batch: int) -> Iterator[float]:
    """The training's own loss of each batch, in float32."""
    config = TrainConfig(dataset=Path("unused"), student=str(model), output=Path("unused"), beta=0.1)
    examples = [
        Example(p.id, p.prompt_ids, (p.chosen_ids, p.rejected_ids), (p.teacher_chosen_logps, p.teacher_rejected_logps))
        for p in pairs
    ]
    objective, student = OBJECTIVES["dpkd"], Student(load_model(str(model), "float32"))
    for start in range(0, len(examples), batch):
        with torch.no_grad():
            losses = objective.loss(score(student, objective, examples[start : start + batch], config))
        yield float(losses.mean())


def trl_losses(exported: Path, model: Path, batch: int, folder: Path) -> list[float]:
    """TRL's loss of each batch: the code in an export's README, as it stands there, but for the two names it asks for.

    A learning rate of almost zero, so that all losses are those of one model. The trained model goes to `folder`.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    code = code.replace("THIS_FOLDER", str(exported)).replace("MODEL", str(model))
    real = trl.DPOConfig

    def config(**settings: Any) -> trl.DPOConfig:
        watched = {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "disable_tqdm": True}
        order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": batch, "num_train_epochs": 1}
        return real(**settings, **watched, **order, learning_rate=1e-12)

    names: dict[str, Any] = {}
    with chdir(folder), patch.object(trl, "DPOConfig", config):
        exec(compile(code, "README.md", "exec"), names)
    return [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
