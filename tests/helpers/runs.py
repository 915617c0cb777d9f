"""Small training runs, and what is read of their folders."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dpkd_offline.common.errors import Interrupted
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import claim, write_shard
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import trainer
from dpkd_offline.training.objectives import StepMetrics
from dpkd_offline.training.trainer import train
from helpers.tiny import rows, write_jsonl

NO_SPEEDS = dict.fromkeys(("tokens_per_s", "pairs_per_s", "waiting"), 0.0)  # metrics that depend on the machine


def train_config(dataset: Path, student: Path, output: Path, **changes: object) -> TrainConfig:
    values = {
        "dataset": dataset,
        "student": str(student),
        "output": output,
        "dtype": "float32",
        "batch_size": 6,
        "micro_batch_tokens": 400,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "holdout": 0.0,
        "beta": 0.1,
        "chosen_nll_weight": 0.0,
    }
    return TrainConfig.model_validate({**values, **changes})


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_model(str(folder), "float32").state_dict()


def log_prob(model: Any, prompt: list[int], response: list[int]) -> Tensor:
    """log q(y|x) by the library's own cross-entropy, one sequence at a time."""
    ids = torch.tensor([[*prompt, *response]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    return -model(input_ids=ids, labels=labels).loss * len(response)


def make_pairs(folder: Path, count: int, shard_size: int) -> Dataset:
    """Pairs without any model, as many as a test wants."""
    dataset = Dataset(
        folder, PromptSet("id", "s", "chat", "f", "t", "t", 400, "4", 5, {}), ShardPlan(count, shard_size)
    )
    table = dataset.pairs(0)
    model = {"name": "m", "revision": "1"}
    provenance = {"stage": "score-teacher", "model": model, "vocab_size": 400, "dtype": "float32", "engine": "e"}
    claim(table, {**provenance, "prompt_set": "id", "tokenizer_fingerprint": "t", "scored": "ids"})
    for shard in range(dataset.plan.count):
        first = shard * shard_size
        rows = [
            PreferencePair(
                id=str(n),
                prompt="",
                prompt_ids=[1] * (n % 5 + 1),
                reference=None,
                chosen="",
                chosen_ids=[2, 3],
                chosen_finish_reason="stop" if n % 4 else "length",
                rejected="",
                rejected_ids=[4, 5, 6],
                rejected_finish_reason="stop",
                teacher_chosen_logps=[-1.0, -0.5],
                teacher_rejected_logps=[-1.0, -2.0, -float(n)],
                chosen_exact=True,
                rejected_exact=True,
                behavior_rejected_logps=[-1.0] * 3,
                round=0,
            )
            for n in range(first, first + dataset.plan.rows_of(shard))
        ]
        write_shard(table, shard, rows)
    return dataset


def validations(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics_of(folder) if any(name.startswith("val_") for name in line)]


def train_until(config: TrainConfig, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be asked to end in step number `stop`."""
    original = trainer.Run.step

    def step(self: Any, number: int, *rest: Any) -> StepMetrics:
        if number == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Run, "step", step)
        with pytest.raises(Interrupted):
            train(config)


def write_recipe(folder: Path, teacher: Path) -> Path:
    write_jsonl(folder / "train.jsonl", rows(12))
    write_jsonl(folder / "test.jsonl", rows(18)[12:])
    small = {"engine": "transformers", "dtype": "float32", "max_length": 256}
    steps = {"max_steps": 2, "batch_size": 6, "dtype": "float32"}
    recipe = {
        "teacher": str(teacher),
        "output": str(folder / "run"),
        "init_student": {"layers": 2},
        "sft": steps,
        "generate": {**small, "prompts": str(folder / "train.jsonl"), "max_new_tokens": 8, "shard_size": 4},
        "score_teacher": small,
        "train": {**steps, "beta": 1.0},
        "evaluate": {**small, "prompts": str(folder / "test.jsonl"), "max_new_tokens": 8, "seeds": [1, 2]},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
