"""Console and metrics: people's progress goes to stderr, data to stdout or a file."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from dpkd_offline.files import disk_errors, write_atomically

LINE_EVERY_SECONDS = 15.0  # where stderr is a file or a pipe, progress is a line now and then
_silent = False  # in all processes of a run but the first


def only_first(first: bool) -> None:
    """Of several processes, let the first one speak."""
    global _silent
    _silent = not first


def info(message: str) -> None:
    """One line for people."""
    if not _silent:
        tqdm.write(message, file=sys.stderr)


def result(value: object) -> None:
    """What a command prints to stdout."""
    if not _silent:
        print(value)


class Progress:
    """A bar on a terminal, a line every so often elsewhere."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self._live = sys.stderr.isatty() and not _silent
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, disable=not self._live, dynamic_ncols=True)
        self._started = self._last = time.monotonic()
        self._first = done

    def advance(self, n: int = 1, facts: Mapping[str, str] | None = None) -> None:
        """n more units done; facts are shown beside them."""
        self._done += n
        if self._live:
            self._bar.update(n)
            self._bar.set_postfix(facts, refresh=False)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SECONDS or self._done >= self._total:
            self._last = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            shown = " ".join(f"{k}={v}" for k, v in (facts or {}).items())
            line = f"{self._label}: {self._done}/{self._total} {self._unit}s · {rate:.2f}/s · {left:.0f} s left"
            info(f"{line} · {shown}" if shown else line)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """`with progress("score", rows, "row") as p: p.advance(8)`."""
    shown = Progress(label, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()


class Tracker(Protocol):
    """What Accelerate's trackers do."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, a validation (`val_…`), and a measure of the drift (`drift_…`).

    Re-opened at a step, it forgets what came after that step: also its validation and drift, which come again.
    `trackers` hear all that is written. What fails to be written is a StorageError. Without a path it is of a process
    that does not write.
    """

    def __init__(self, path: Path | None, resume_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers, self._path = trackers, path
        self.kept: list[dict[str, Any]] = []  # what stood in the file, up to that step
        if path is None:
            return
        if resume_step and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            values = [json.loads(line) for line in lines if line.endswith(b"\n")]
            self.kept = [line for line in values if _is_before(line, resume_step)]
        write_atomically(path, b"".join((json.dumps(line) + "\n").encode() for line in self.kept))
        self._file = path.open("ab", buffering=0)  # nothing stays behind that would be written later

    def write(self, **values: Any) -> None:
        if self._path is None:
            return
        line = (json.dumps(values) + "\n").encode()
        with disk_errors(self._path):
            while line:
                line = line[self._file.write(line) :]
        step = values.pop("step")
        for tracker in self._trackers:
            tracker.log(values, step)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        assert self._path is not None
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._path is not None:
            self._file.close()


def _is_before(values: Mapping[str, Any], step: int) -> bool:
    comes_again = any(key.startswith(("val_", "drift_")) for key in values)
    return bool(values["step"] < step or (values["step"] == step and not comes_again))
