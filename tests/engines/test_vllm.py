"""The whole way with a real vLLM engine, as a user runs it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny import rows, write_jsonl

from dpkd_offline.dataset.dataset import Dataset

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_generate_score_train_evaluate(
    tmp_path: Path,
    teachers: dict[str, Path],
    students: dict[str, Path],
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    source, folder = write_jsonl(tmp_path / "p.jsonl", rows(30)), tmp_path / "ds"
    teacher, student, trained = teachers["gpt2"], students["gpt2"], tmp_path / "trained"
    engine = "--engine vllm --dtype float32 --max-length 256"
    sampling = f"--max-new-tokens 12 {engine}"
    commands = [
        f"generate --dataset {folder} --role teacher --model {teacher} --prompts {source} --shard-size 8 {sampling}",
        f"generate --dataset {folder} --role student --model {student} {sampling}",
        f"score-teacher --dataset {folder} --model {teacher} {engine}",
        f"train --dataset {folder} --student {student} --output {trained} --max-steps 3 --dtype float32",
        f"evaluate --model {trained} --prompts {source} --output {tmp_path / 'eval'} --seeds 1,2 --teacher {teacher} "
        + sampling,
    ]
    for command in commands:
        done = run_cli(*command.split())
        assert done.returncode == 0, done.stderr
    dataset = Dataset.open(folder)
    pairs = [pair for shard in range(dataset.plan.count) for pair in dataset.pairs(0).read(shard)]
    assert [pair.id for pair in pairs] == [f"row-{n}" for n in range(30)]
    for pair in pairs:
        assert len(pair.teacher_chosen_logps) == len(pair.chosen_ids)
        assert max(pair.teacher_rejected_logps) <= 0
    provenance = dataset.pairs(0).provenance() or {}
    assert (provenance["engine"], sorted(provenance["versions"])) == ("vllm", ["torch", "vllm"])
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (results["prompts"], results["made"]["settings"]["engine"]) == (30, "vllm")
