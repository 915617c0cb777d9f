"""kill -9 in the middle, then the same command again: the same result as a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.faults import start
from helpers.tiny import TINY, files_of, rows, write_jsonl

pytestmark = pytest.mark.slow
KILLS = 4


def kill_when(arguments: list[object], reached: Callable[[], bool], delay: float) -> bool:
    """Start a command, SIGKILL it a moment after something happened. Whether it was still running then."""
    process = start(arguments)
    while process.is_alive() and not reached():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def finish(arguments: list[object]) -> None:
    process = start(arguments)
    process.join(300)
    assert process.exitcode == 0


def disturb(arguments: list[object], committed: Callable[[], int], random_: random.Random, total: int) -> int:
    """Kill a command a few times, each time a little further on, then let it end. How many kills hit."""
    hits = 0
    for kill in range(KILLS):
        goal = max(committed(), total * kill // KILLS)
        hits += kill_when(arguments, lambda goal=goal: committed() >= goal, random_.uniform(0, 0.02))
    finish(arguments)
    return hits


def count(folder: Path, pattern: str) -> Callable[[], int]:
    return lambda: len(list(folder.glob(pattern)))


def test_killed_data_stages_give_the_same_bytes(
    tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(60))
    random_ = random.Random(0)
    hits = 0
    for name in ("calm", "disturbed"):
        folder = tmp_path / name
        generate = ["--max-new-tokens", 16, "--shard-size", 3, "--batch-size", 2, "--dataset", folder, *TINY]
        stages: list[tuple[list[object], str]] = [
            (
                ["generate", "--role", "teacher", "--model", teachers["llama"], "--prompts", source, *generate],
                "responses/teacher",
            ),
            (["generate", "--role", "student", "--model", students["llama"], *generate], "responses/student/round-000"),
            (
                ["score-teacher", "--model", teachers["llama"], "--dataset", folder, "--batch-size", 1, *TINY],
                "pairs/round-000",
            ),
        ]
        for arguments, table in stages:
            if name == "calm":
                finish(arguments)
            else:
                hits += disturb(arguments, count(folder / table, "_manifest/[!.]*.json"), random_, 20)
    calm, disturbed = files_of(tmp_path / "calm"), files_of(tmp_path / "disturbed")
    # The claim holds the folder's name, which differs here; everything else is the same to the byte.
    calm, disturbed = (
        {k: v.replace(b'"calm"', b'"x"').replace(b'"disturbed"', b'"x"') for k, v in files.items()}
        for files in (calm, disturbed)
    )
    assert disturbed == calm
    assert hits >= 2 * KILLS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_polite_signal_ends_with_75_and_keeps_what_is_committed(
    number: signal.Signals, tmp_path: Path, teachers: dict[str, Path]
) -> None:
    source, folder = write_jsonl(tmp_path / "p.jsonl", rows(60)), tmp_path / "ds"
    where = ["--role", "teacher", "--model", teachers["llama"], "--prompts", source, "--dataset", folder]
    arguments = ["generate", *where, "--shard-size", 2, "--max-new-tokens", 48, *TINY]
    committed = count(folder / "responses/teacher", "_manifest/[!.]*.json")
    process = start(arguments, errors=tmp_path / "errors")
    while committed() < 2:
        assert process.is_alive()
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 75
    assert errors.splitlines()[-1].endswith("the same command goes on from what is committed")
    assert "Traceback" not in errors
    assert 2 <= committed() < 30
    finish(arguments)
    assert committed() == 30
