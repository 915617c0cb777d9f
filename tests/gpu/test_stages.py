"""The stages of the command line on a GPU: what they compute is what a CPU computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import write_recipe
from helpers.tiny import command_line, generate_config, score_config

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import trainer
from dpkd_offline.training.checkpoint import Saving
from dpkd_offline.training.trainer import train

pytestmark = pytest.mark.gpu

STEPS = 6
WAYS: dict[str, tuple[dict[str, Any], float]] = {  # and by how much the loss of a step may differ
    "float32": ({"dtype": "float32"}, 1e-3),
    "compiled": ({"dtype": "float32", "compile": True}, 1e-3),
    "layers computed again": ({"dtype": "float32", "gradient_checkpointing": True}, 1e-3),
    "lora": ({"dtype": "float32", "lora_rank": 4}, 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, 5e-2),
    "dpkd-token": ({"dtype": "float32", "objective": "dpkd-token"}, 1e-3),
    "kd": ({"dtype": "float32", "objective": "kd"}, 1e-3),
}


def values_of(pairs: Path, models: tuple[Path, Path], output: Path, **changes: object) -> dict[str, Any]:
    return {
        "dataset": str(pairs),
        "student": str(models[1]),
        "output": output,
        "batch_size": 5,
        "micro_batch_tokens": 200,
        "learning_rate": 1e-3,
        "max_steps": STEPS,
        "holdout": 0.1,
        **changes,
    }


def pairs_of(dataset: Path) -> list[PreferencePair]:
    table = Dataset.open(dataset).pairs(0)
    return [pair for shard in range(table.plan.count) for pair in table.read(shard)]


def losses_of(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def on_cpu(values: dict[str, Any]) -> None:
    words: list[object] = ["train"]
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [value])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command_line(*words), check=True, env=environment, capture_output=True, timeout=300)


@pytest.mark.parametrize("way", WAYS)
def test_training_takes_the_steps_of_a_cpu(way: str, pairs: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    options, near = WAYS[way]
    on_device, on_host = tmp_path / "device", tmp_path / "cpu"
    train(TrainConfig.model_validate(values_of(pairs, models, on_device, **options)))
    plain = {k: v for k, v in options.items() if k not in ("compile", "gradient_checkpointing")}
    on_cpu(values_of(pairs, models, on_host, **plain))
    print(losses_of(on_device), losses_of(on_host))
    assert losses_of(on_device) == pytest.approx(losses_of(on_host), rel=near)


@pytest.mark.parametrize("background", [False, True])
def test_a_stopped_run_goes_on(
    background: bool, pairs: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = values_of(pairs, models, tmp_path / "calm", dtype="float32", save_every=2)
    train(TrainConfig.model_validate(values))

    class Stop(Exception):
        pass

    commit = Saving.commit

    def stop(saving: Saving) -> None:
        commit(saving)
        raise Stop

    values["output"] = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Saving, "commit", stop)
        patch.setattr(trainer, "copies_fit", lambda *_: background)
        train(TrainConfig.model_validate(values))
    train(TrainConfig.model_validate(values))
    expected, actual = (load_model(str(tmp_path / name), "float32") for name in ("calm", "stopped"))
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(tmp_path / "calm"), rel=1e-4)
    for (name, one), other in zip(expected.named_parameters(), actual.parameters(), strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-3, name


def test_stored_numbers_are_those_of_a_plain_pass(pairs: Path, models: tuple[Path, Path]) -> None:
    """In float64 on the CPU; of the samples, the log-probs that sampling noted."""
    verify(pairs)
    teacher, student = (load_model(str(m), "float32", device=torch.device("cpu")).double() for m in models)
    for pair in pairs_of(pairs)[:8]:
        for ids, stored, model in (
            (pair.chosen_ids, pair.teacher_chosen_logps, teacher),
            (pair.rejected_ids, pair.teacher_rejected_logps, teacher),
            (pair.rejected_ids, pair.behavior_rejected_logps, student),
        ):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*pair.prompt_ids, *ids]])).logits[0].log_softmax(-1)
            expected = logits[len(pair.prompt_ids) - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(stored).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_the_audit_agrees(dtype: str, near: float, source: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    generate(generate_config(tmp_path / "d", "teacher", models[0], prompts=str(source), dtype=dtype))
    generate(generate_config(tmp_path / "d", "student", models[1], dtype=dtype))
    audit = score_teacher(score_config(tmp_path / "d", models[0], dtype=dtype, audit=8)).audit
    assert audit is not None and audit["gap_abs_mean"] < near


def test_out_of_memory_is_one_line(
    pairs: Path, models: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., Any], only_gpu: None
) -> None:
    words: list[object] = ["train"]
    for key, value in values_of(pairs, models, tmp_path / "s").items():
        words += [f"--{key.replace('_', '-')}", value]
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.00012"}
    ended = run_cli(*words, env=environment)
    print(ended.stderr)
    assert ended.returncode == 69
    assert "memory" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr


def test_imports_leave_a_process_that_can_be_forked() -> None:
    """vLLM forks its engine, unless CUDA is in use."""
    code = (
        "import torch, dpkd_offline.cli, dpkd_offline.generation.generate, dpkd_offline.training.trainer;"
        "from dpkd_offline.models.loading import load_model;"
        "assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork();"
        "import os; pid = os.fork();"
        "torch.zeros(1, device='cuda' if torch.cuda.is_available() else 'cpu') if pid == 0 else None;"
        "os._exit(0) if pid == 0 else None;"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0"
    )
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def test_evaluate_answers(models: tuple[Path, Path], source: Path, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    how = [
        "--prompts",
        source,
        "--engine",
        "transformers",
        "--max-new-tokens",
        8,
        "--max-length",
        256,
        "--seeds",
        "1,2",
    ]
    ended = run_cli("evaluate", "--model", models[1], "--teacher", models[0], "--output", tmp_path / "e", *how)
    assert ended.returncode == 0, ended.stderr
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    print(results)
    assert results["teacher_nll"]["mean"] > 0


def test_distill_runs_its_stages(models: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """Each as a fork of a process that has imported torch and has not asked for CUDA."""
    ended = run_cli("distill", write_recipe(tmp_path, models[0]))
    print(ended.stderr)
    assert ended.returncode == 0
    student = tmp_path / "run" / "student"
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    print(json.loads((student / "training.json").read_text())["chosen"], lines[-2:])
    if torch.cuda.is_available():
        assert all(line["memory_gib"] > 0 and "mfu" in line for line in lines if "loss" in line)
        assert json.loads((student / "training.json").read_text())["chosen"]["micro_batch_tokens"] >= 1024
