"""The process of a command: its signals, its streams, and how it ends.

A program calls `begin` before it imports anything that takes time. Used as a library, the package leaves signals,
streams and the end of the process to whoever imports it.
"""

from __future__ import annotations

import atexit
import io
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

from dpkd_offline.common.errors import Interrupted, ReaderGone, Stopped, StorageError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last two are what a cluster sends
ONE_REQUEST_SECONDS = 1.0  # two signals within it ask once
IMPORTING = "<frozen importlib._bootstrap>"
STDIN, STDOUT, STDERR = range(3)
_stopped_at: float | None = None  # when the signal came that ends the command
_begun = False  # whether this is a program
_code: int | None = None  # of a program, once its command is done


def begin() -> None:
    """Of a program, first of all: signals end it with one line, and its streams and its end are as below.

    Until `catch_signals` a signal ends the process at once, since nothing has begun.
    """
    global _begun
    for number in SIGNALS:
        signal.signal(number, lambda number, _: _stop_now(number))
    _begun = True
    # Hooks run in the reverse order, so this one is the last, after those of all libraries.
    atexit.register(_leave)
    closed = _open_closed_streams()
    sys.stdout, sys.stderr = _stream(STDOUT), _stream(STDERR)
    if STDOUT in closed:
        sys.stderr.write("dpkd-offline: stdout is closed, so that no result could be written; nothing has run\n")
        os._exit(StorageError.exit_code)


def is_program() -> bool:
    """Whether this process is ours: nothing is in it, and nothing comes after it, but a command."""
    return _begun


def catch_signals() -> None:
    """Let a signal raise Stopped in the main thread, so that the command can end what it has begun.

    What libraries would make of that is prevented: in the middle of an import, where they take any exception for a
    missing library, and where Python itself drops exceptions (`__del__`, callbacks), the process ends at once.
    """
    global _stopped_at
    _stopped_at = None
    for number in SIGNALS:
        signal.signal(number, _stop)
    hook = sys.unraisablehook

    def unraisable(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Stopped):
            end_now(str(dropped.exc_value))
        hook(dropped)

    sys.unraisablehook = unraisable


def done(code: int) -> None:
    """The command is done, and this is its exit code, whatever comes now."""
    global _code
    if _begun:
        _code = code


def reason(number: int) -> str:
    """What a signal means for the command."""
    return f"stopped by {signal.Signals(number).name}; the same command goes on from what is committed"


def end_now(message: str) -> NoReturn:
    """End the process with one line and the code of an interruption, and all processes that it started."""
    line = f"dpkd-offline: {message}\n".encode()
    try:
        os.write(STDERR, line)  # not through the stream, which the signal may have come in the middle of
    except OSError:
        pass  # nobody reads it; the exit code says it, too
    if processes := sys.modules.get("multiprocessing"):
        for child in getattr(processes, "active_children", list)():  # it may be half imported
            child.terminate()
    os._exit(Interrupted.exit_code)


def die_of_closed_pipe() -> NoReturn:
    """End as a program does that writes into a pipe which nobody reads: quietly, by SIGPIPE."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
    os._exit(ReaderGone.exit_code)  # where the signal is blocked


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped_at
    if _code is not None:
        os._exit(_code)  # all is written
    again = _stopped_at is not None and time.monotonic() - _stopped_at > ONE_REQUEST_SECONDS
    if again or _is_importing(frame):
        _stop_now(number)
    if _stopped_at is None:
        _stopped_at = time.monotonic()
        raise Stopped(reason(number))


def _stop_now(number: int) -> None:
    end_now(reason(number))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False


def _leave() -> None:
    """End the process without taking the interpreter down.

    Everything is closed by now: commands close what they open, threads have been waited for, and hooks have run. What
    is left out is the interpreter's own end, in which threads of libraries (Arrow's, torch's, a tokenizer's) are still
    there, may touch what Python owns, and then abort the process: a command that is done would end with 134.
    """
    if _code is not None:
        os._exit(_code)


def _open_closed_streams() -> set[int]:
    """Open /dev/null in place of closed streams, which are returned: else the next file that is opened takes their
    place, and gets what is printed."""
    closed = set()
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            assert opened == number
            os.set_inheritable(number, True)
    return closed


class _Output(io.FileIO):
    """stdout or stderr. What the disk or the reader does to it is an error of ours."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except BrokenPipeError as error:
            raise ReaderGone from error
        except OSError as error:
            name = "stdout" if self.fileno() == STDOUT else "stderr"
            raise StorageError(f"{name}: cannot be written: {error.strerror or error}") from error


def _stream(number: int) -> io.TextIOWrapper:
    """stdout or stderr, in which a character that its encoding lacks is escaped."""
    before = sys.stdout if number == STDOUT else sys.stderr
    encoding = before.encoding if isinstance(before, io.TextIOWrapper) else "utf-8"
    raw = _Output(number, "w", closefd=False)
    in_lines = number == STDERR or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=in_lines)
