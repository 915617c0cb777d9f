"""The program of a replica: an engine that takes groups from the process which started it, and ends with that."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError
from dpkd_offline.engines.base import Engine
from dpkd_offline.engines.worker import Worker

LOADED = -1  # in place of a task's number
CAN_BE_SENT = ("builtins", "torch")  # errors of these modules; those of others need not be what they were made of


class Answers:
    """The way back to the process that started this one: (task, result, error), from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()

    def loaded(self, done: Future[Engine]) -> None:
        if (error := done.exception()) is not None:
            self._send(LOADED, None, error)
        else:
            self._send(LOADED, (done.result().name, done.result().versions), None)

    def of_task(self, task: int, done: Future[Any]) -> None:
        error = done.exception()
        self._send(task, None if error else done.result(), error)

    def _send(self, task: int, result: Any, error: BaseException | None) -> None:
        try:
            with self._lock:
                self._connection.send((task, result, error and _as_sent(error)))
        except OSError:  # nobody is there any more
            end()


def _as_sent(error: BaseException) -> BaseException:
    """An error as another process can raise it; with its traceback, unless it is one that needs none."""
    if isinstance(error, DpkdError):
        return error
    where = "".join(traceback.format_exception(error))
    if type(error).__module__ not in CAN_BE_SENT:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In a replica:\n{where}")
    return error


def main(descriptor: int, speaks: bool) -> None:
    """Take groups until there are no more.

    Args:
        descriptor: of the socket to the process that started this one.
        speaks: whether to say what there is to say of the engine; otherwise another replica does.
    """
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    console.only_first(speaks)
    answers = Answers(connection)
    try:
        worker = Worker(*connection.recv())
        worker.engine.add_done_callback(answers.loaded)
        while (message := connection.recv()) is not None:
            task, call, group = message
            worker.start(call, group).add_done_callback(lambda done, task=task: answers.of_task(task, done))  # type: ignore[misc]
    except EOFError:
        end()
    if worker.engine.done() and worker.engine.exception() is None:
        worker.engine.result().close()
    end()  # not by the interpreter's own end, in which threads of libraries may abort


def end() -> NoReturn:
    """End this process and all that its engine has started."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] == "1")
