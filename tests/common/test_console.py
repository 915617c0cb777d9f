from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dpkd_offline.common import console
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


@pytest.mark.parametrize(
    ("level", "lines", "transformers"),
    [
        ("quiet", ["warning: w"], "error"),
        ("normal", ["a line", "warning: w", "work: 3/3 rows"], "error"),
        ("verbose", ["a line", "warning: w", "work: 3/3 rows"], "info"),
    ],
)
def test_a_process_says_as_much_as_the_one_that_started_it(
    level: str, lines: list[str], transformers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (console.VERBOSITY, *console.HIDDEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(console.VERBOSITY, "normal")  # so that it is as before after this test
    console.set_verbosity(level)  # type: ignore[arg-type]
    code = (
        "import os; from dpkd_offline.common import console; console.prepare_libraries(); console.info('a line')\n"
        "console.info('warning: w'); console.result(os.environ['TRANSFORMERS_VERBOSITY'])\n"
        "with console.progress('work', 3, 'row') as p: p.advance(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert [line.split(" · ")[0] for line in done.stderr.splitlines()] == lines
    assert done.stdout == f"{transformers}\n"


def test_without_stderr_nothing_for_people_goes_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    console.info("a line")
    with console.progress("work", 3, "row") as shown:
        shown.advance(3)
    assert capsys.readouterr().out == ""


def test_what_the_user_set_of_the_libraries_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    console.prepare_libraries()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


@pytest.mark.filterwarnings("ignore:IProgress")
def test_a_notebook_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    with console.progress("work", 4, "row") as shown:
        shown.advance(4, {"loss": "1.0"})
    assert "work: 100%" in capsys.readouterr().err
