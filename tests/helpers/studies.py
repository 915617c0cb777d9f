"""Studies of tiny models: their recipes, and workers whose stages are forked, so that none waits for imports."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from helpers.faults import FORKS
from helpers.tiny import rows, write_jsonl

SPEEDS = ("tokens_per_s", "pairs_per_s", "waiting")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def write_study(folder: Path, teacher: Path, **changes: Any) -> Path:
    """A recipe with students, by default one that learns references and one that learns pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", rows(24))
    write_jsonl(folder / "test.jsonl", rows(36)[24:])
    small = {"engine": "transformers", "dtype": "float32", "max_length": 256}
    steps = {"max_steps": 3, "batch_size": 6, "dtype": "float32", "learning_rate": 1e-3, "save_every": 1}
    recipe = {
        "teacher": str(teacher),
        "output": str(folder / "study"),
        "init_student": {"layers": 2},
        "sft": {**steps, "max_steps": 2, "holdout": 0.2, "validate_responses": 2},
        "generate": {**small, "prompts": str(folder / "train.jsonl"), "max_new_tokens": 8, "shard_size": 8},
        "score_teacher": {**small, "top_k": 5},
        "train": {**steps, "holdout": 0.2, "validate_responses": 2},
        "evaluate": {**small, "prompts": str(folder / "test.jsonl"), "max_new_tokens": 8, "seeds": [1, 2]},
        "students": {"sft": {"train": {"objective": "sft"}}, "dpkd": {}},
        "seeds": [1, 2],
        "baseline": "sft",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return path


def _forked(command: Sequence[str], secrets: Mapping[str, str]) -> tuple[int, int]:
    """Run a stage in a process of its own that ends with this one, and has imported everything."""
    if (child := os.fork()) == 0:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        code = 1
        try:
            from dpkd_offline.cli import main

            os.environ.update(secrets)
            sys.argv = ["dpkd-offline", *command[3:]]
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 1 << 20


def _work(arguments: Sequence[str], printed: str) -> None:
    import torch

    from dpkd_offline.cli import main
    from dpkd_offline.pipeline import distill, study

    torch.set_num_threads(1)
    distill._run = _forked  # type: ignore[assignment]
    distill.stages_by_fork = study.stages_by_fork = nullcontext  # type: ignore[attr-defined]
    sys.stdout, sys.stderr = open(f"{printed}.out", "a", buffering=1), open(f"{printed}.err", "a", buffering=1)
    sys.argv = ["dpkd-offline", "distill", *arguments]
    main()


def start_worker(recipe: Path, *arguments: str, printed: Path) -> BaseProcess:
    """`distill` of a recipe or a study; what it prints goes to the files `printed`.out and .err."""
    process = FORKS.Process(target=_work, args=([str(recipe), *arguments], str(printed)))
    process.start()
    return process


def contents(folder: Path) -> dict[str, Any]:
    """What is in a study's files, but for what tells how long something took, by their names."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _content(path: Path) -> Any:
    if path.name == "stages.jsonl":
        return None
    if path.name == "metrics.jsonl":
        lines = (json.loads(line) for line in path.read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines]
    if path.name == "results.json":
        return _without_times(json.loads(path.read_text()))
    if path.name in ("results.md", "report.html", "report.md"):  # they have times, and a column as wide as they are
        return None
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key != "training_seconds"}
    return value
