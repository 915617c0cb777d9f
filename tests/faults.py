"""Processes that die or fail where a test wants them to: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

POINTS = ("before write", "half written", "before fsync", "before link", "before rename", "before folder fsync")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dpkd_offline.cli", "dpkd_offline.generation", "dpkd_offline.scoring", "faults"])


@contextmanager
def at_every_point(act: Callable[[str], None]) -> Iterator[None]:
    """Call `act` with the name of each point that a write passes, before what the name says happens."""
    opened, fsync, link, replace = Path.open, os.fsync, os.link, Path.replace

    class Torn:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def write(self, data: bytes) -> None:
            act("before write")
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            act("half written")
            self._file.write(data[len(data) // 2 :])

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = opened(path, mode, *rest, **named)
        return Torn(file) if mode == "xb" else file  # as files.write_atomically does

    def fsync_(descriptor: int) -> None:
        act("before folder fsync" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "before fsync")
        fsync(descriptor)

    def link_(*paths: Any) -> None:
        act("before link")
        link(*paths)

    def replace_(path: Path, target: Path) -> Path:
        act("before rename")
        return replace(path, target)

    Path.open, os.fsync, os.link, Path.replace = open_, fsync_, link_, replace_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Path.open, os.fsync, os.link, Path.replace = opened, fsync, link, replace  # type: ignore[method-assign]


def run_command(arguments: list[str], point: str | None, passes: int) -> None:
    """In a child: a command, SIGKILLed at the `passes`-th time that it comes to a point. Ends as the command does."""
    import torch

    from dpkd_offline.cli import main

    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")
    sys.argv = ["dpkd-offline", *arguments]
    left = passes

    def kill(here: str) -> None:
        nonlocal left
        left -= here == point
        if here == point and left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_every_point(kill):
        main()


def start(arguments: list[object], point: str | None = None, passes: int = 0) -> BaseProcess:
    process = FORKS.Process(target=run_command, args=([str(a) for a in arguments], point, passes))
    process.start()
    return process
