"""Starts stages quickly: a process that has imported what they need, of which each stage is a fork.

That process computes nothing and never asks for CUDA, so that it has no threads but those of an allocator and of BLAS,
which are prepared for a fork. A stage is a process of its own: environment, signals, standard input, exit code.

Over a socket it is sent a stage's standard input, arguments and environment, and answers with the stage's process id
and, when the stage has ended, with its exit code. It ends when nobody holds the other end.
"""

from __future__ import annotations

import sys

from dpkd_offline.common import process

if __name__ == "__main__":
    process.begin()  # before the imports below, as in every command

import gc
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path

from dpkd_offline.common.console import prepare_libraries

STAGE = [sys.executable, "-m", "dpkd_offline.cli"]  # how the command of a stage begins that may be a fork
IMPORTED = (
    *("dpkd_offline.training.init_student", "dpkd_offline.training.trainer", "dpkd_offline.evaluation.evaluate"),
    *("dpkd_offline.generation.generate", "dpkd_offline.generation.score_teacher", "dpkd_offline.engines.transformers"),
    *("dpkd_offline.cli", "datasets", "rouge_score.rouge_scorer", "scipy.stats"),  # the last three are imported late
)
NUMBER = 4  # bytes of an answer
_starter: ContextVar[Starter | None] = ContextVar(
    "starter", default=None
)  # of each thread, since it starts one at a time


@contextmanager
def stages_by_fork() -> Iterator[None]:
    """A context in which `start` forks stages. What they need is imported while it goes on."""
    starter = Starter()
    token = _starter.set(starter)
    try:
        yield
    finally:
        _starter.reset(token)
        starter.close()


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked:
    """Start a command, by a fork if it is a stage that needs no launcher. Its standard input is closed when this
    process ends, and what it prints is dropped."""
    starter = _starter.get()
    if starter is not None and list(command[: len(STAGE)]) == STAGE:
        return starter.start(command[len(STAGE) :], environment)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)


class Starter:
    """The process that stages are forks of, as seen from outside."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Forked:
        read, write = os.pipe()
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, as the answer will say
            socket.send_fds(self._socket, [b"\n"], [read])
            self._socket.sendall(json.dumps([*arguments, dict(environment)]).encode() + b"\n")
        os.close(read)
        return Forked(self._socket, write)

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


class Forked:
    """A stage, with what `subprocess.Popen` has of it."""

    def __init__(self, answers: socket.socket, stdin: int) -> None:
        self._answers, self._stdin = answers, stdin
        self._code: int | None = None
        self.pid = self._answer(None)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stdin)
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or minus the number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it has not ended within so many seconds.
        """
        if self._code is None:
            self._code = self._answer(timeout)
        return self._code

    def terminate(self) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def _answer(self, timeout: float | None) -> int:
        if not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(STAGE, timeout or 0.0)
        with suppress(ConnectionResetError):
            if answer := self._answers.recv(NUMBER, socket.MSG_WAITALL):
                return int.from_bytes(answer, signed=True)
        return -signal.SIGKILL  # nothing else ends the other process; the stage ends with its standard input


# --- the other process ------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    """Fork a stage for each request, one at a time. In the stage, raises the SystemExit of its command."""
    signal.pthread_sigmask(signal.SIG_BLOCK, process.SIGNALS)  # they are for the stage; this ends with who started it
    prepare_libraries()
    for name in IMPORTED:
        with suppress(ImportError):  # the stage that needs it says what is missing
            import_module(name)
    gc.collect()
    gc.freeze()  # or a collection in a stage would copy all pages
    lines = requests.makefile("rb")
    while True:
        _, files, _, _ = socket.recv_fds(requests, 1, 1)
        if not files:
            return
        *arguments, environment = json.loads(lines.readline())
        if (child := os.fork()) == 0:
            lines.close()
            requests.close()
            _become(arguments, environment, files[0])
        os.close(files[0])
        requests.sendall(child.to_bytes(NUMBER))
        _, status = os.waitpid(child, 0)
        requests.sendall(os.waitstatus_to_exitcode(status).to_bytes(NUMBER, signed=True))


def _become(arguments: list[str], environment: Mapping[str, str], stdin: int) -> None:
    """Be the stage from here on."""
    os.dup2(stdin, process.STDIN)
    os.close(stdin)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["dpkd-offline", *arguments]
    with suppress(OSError):  # elsewhere than on Linux
        Path("/proc/self/comm").write_text(f"dpkd {arguments[0]}")  # what `ps` and `top` show
    signal.pthread_sigmask(signal.SIG_UNBLOCK, process.SIGNALS)
    import_module("dpkd_offline.cli").main()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
