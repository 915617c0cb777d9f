"""What a command says: progress and messages for people on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

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
