"""Commands on one output: killed at the n-th change that they make to files, and started together.

Each runs in a process forked from a server that has imported everything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from helpers.faults import FORKS
from helpers.tiny import files_of

Command = Callable[[Path], list[object]]  # from the output's path to the arguments
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
SPEEDS = ("tokens_per_s", "pairs_per_s", "waiting")


class Changes:
    """Counts what a process changes in a folder, and before the change of a number kills it, or lets it wait until
    a file is there."""

    def __init__(self, folder: Path, last: int | None, until: Path | None) -> None:
        self.count, self._folder, self._last, self._until = 0, str(folder), last, until
        fsync = os.fsync

        def counted(descriptor: int) -> None:
            self._next()
            fsync(descriptor)

        os.fsync = counted
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            if arguments[2] & WRITES and self._is_inside(arguments[0]):
                self._next()
        elif event in CHANGES and self._is_inside(arguments[0]):
            self._next()

    def _is_inside(self, path: object) -> bool:
        """Whether a path is in the folder; one that is relative to an open folder is, since rmtree opens it."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else "/"
        return not name.startswith("/") or name.startswith(self._folder)

    def _next(self) -> None:
        if self.count == self._last:
            if self._until is None:
                os.kill(os.getpid(), signal.SIGKILL)
            while not self._until.exists():
                time.sleep(0.01)
        self.count += 1


def _run(arguments: Sequence[str], folder: Path, last: int | None, out: Path, until: Path | None) -> None:
    """In a child: a command. Its messages go to `out`.err, the number of its changes to `out`.count."""
    import torch

    from dpkd_offline.cli import main

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = out.with_suffix(".err").open("w", buffering=1)
    sys.argv = ["dpkd-offline", *arguments]
    changes = Changes(folder, last, until)
    try:
        main()
    finally:
        out.with_suffix(".count").write_text(str(changes.count))


def start(
    arguments: Sequence[object], folder: Path, out: Path, last: int | None = None, until: Path | None = None
) -> BaseProcess:
    process = FORKS.Process(target=_run, args=([str(a) for a in arguments], folder, last, out, until))
    process.start()
    return process


def run(arguments: Sequence[object], folder: Path, out: Path, last: int | None = None) -> int:
    """The exit code of a command; it is killed before it makes a further change to the folder than `last` ones."""
    process = start(arguments, folder, out, last)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder; of metrics all but how fast it was."""
    files = files_of(folder)
    for name in files:
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in files[name].splitlines()]
            files[name] = json.dumps([{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]).encode()
    return files


def undisturbed(command: Command, notes: Path) -> tuple[dict[str, bytes], int]:
    """What a command leaves beside and in its output, and how many changes it makes."""
    folder = notes / "calm"
    folder.mkdir(parents=True)
    code = run(command(folder / "output"), folder, notes / "calm-run")
    assert code == 0, (notes / "calm-run.err").read_text()
    return content(folder), int((notes / "calm-run.count").read_text())


def after_kill(command: Command, at: int, notes: Path) -> tuple[int, int, dict[str, bytes]]:
    """A command killed before its change number `at`, and repeated: both exit codes, and what is left then."""
    folder = notes / str(at)
    folder.mkdir()
    arguments = command(folder / "output")
    killed = run(arguments, folder, notes / "killed", at)
    return killed, run(arguments, folder, notes / "again"), content(folder)


def together(
    commands: Sequence[Command], number: int, notes: Path, at: int | None = None
) -> tuple[list[int], dict[str, bytes], list[str]]:
    """Commands started at once on one output: their exit codes, what is left, and the last line of each.

    With `at` one that comes to its change of this number waits until another has ended, so that they do meet.
    """
    folder = notes / f"together-{number}"
    folder.mkdir(parents=True)
    outs = [notes / f"together-{number}-{which}" for which in range(len(commands))]
    ended = notes / f"together-{number}-ended"
    started = [
        start(command(folder / "output"), folder, out, at, ended) for command, out in zip(commands, outs, strict=True)
    ]
    connection.wait([process.sentinel for process in started], 300)
    ended.touch()
    for process in started:
        process.join(300)
    codes = [-1 if process.exitcode is None else process.exitcode for process in started]
    lines = [(out.with_suffix(".err").read_text().splitlines() or [""])[-1] for out in outs]
    return codes, content(folder), lines
