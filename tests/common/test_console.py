from __future__ import annotations

import json
from pathlib import Path

from dpkd_offline.training.metrics_log import MetricsFile


def test_metrics_forget_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, loss=1.0 / step)
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed in the middle of a line
    with MetricsFile(path, 2) as metrics:
        metrics.write(step=3, loss=9.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 9.0},
    ]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with MetricsFile(path, 0):
        pass
    assert path.read_text() == ""


def test_the_validation_after_the_checkpoint_comes_again(tmp_path: Path) -> None:
    path, heard = tmp_path / "metrics.jsonl", []

    class Tracker:
        def log(self, values: dict[str, object], step: int | None = None) -> None:
            heard.append((step, values))

    lines = [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "val_loss": 1.0}]
    with MetricsFile(path, 0) as metrics:
        for line in lines:
            metrics.write(**line)
    with MetricsFile(path, 1, [Tracker()]) as metrics:
        metrics.write(step=1, val_loss=0.5)
    lines[-1]["val_loss"] = 0.5
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert heard == [(1, {"val_loss": 0.5})]
