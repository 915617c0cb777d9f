"""Several copies of a model on one machine: an engine in a process of its own on every GPU, or group of GPUs.

The processes are started as programs, so that they import nothing of the one that starts them, and each sees its own
GPUs alone. Each leads a session of its own: a signal from a terminal or a cluster reaches only the process that started
them, and they end with it, however it ends, together with whatever their engines have started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.common.gpus import only, visible_gpus
from dpkd_offline.common.process import STDERR
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines.base import Completion, GenerateRequest, Key, LoadEngine, Score, ScoreRequest
from dpkd_offline.engines.replica import LOADED
from dpkd_offline.engines.worker import Call
from dpkd_offline.engines.worker_pool import Kind, WorkerLost, WorkerPool
from dpkd_offline.models.info import ModelInfo

# vLLM would bind the threads of each process to the same cores.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
KIND = Kind("replicas", come_back=False)
CLOSE_SECONDS = 30.0  # that an engine may take to give its memory back


@dataclass(frozen=True)
class Place:
    """Where a copy of a model is."""

    title: str
    environment: Mapping[str, str]


def replica_places(options: ModelOptions, groups: int | None = None) -> list[Place]:
    """A place for each copy of the model that the options ask for; one or none: the model runs in this process.

    Args:
        groups: of requests that will come; more copies would have nothing to do.

    Raises:
        UsageError: the machine has no GPUs for so many copies.
    """
    if options.replicas == 1:
        return []
    gpus, size = visible_gpus(), options.gpus_of_a_copy
    most = len(gpus) // size if gpus else 1
    wanted = most if options.replicas == "auto" else options.replicas
    if gpus and wanted > max(most, 1):
        raise UsageError(
            f"--replicas {wanted}: {wanted * size} GPUs are needed, {size} for each copy of the model, and there are "
            f"{len(gpus)}"
        )
    copies = wanted if groups is None else min(wanted, groups)
    if copies < 2:
        return []
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_fair_share(copies))}
    if not gpus:
        return [Place(f"process {n}", {**threads, **UNBOUND, **os.environ}) for n in range(1, copies + 1)]
    chosen = [gpus[n * size : (n + 1) * size] for n in range(copies)]
    return [Place(f"GPU {','.join(own)}", {**threads, **os.environ, **only(own)}) for own in chosen]


def _fair_share(copies: int) -> int:
    return max(1, torch.get_num_threads() // copies)


class ReplicasEngine:
    """The engine that the options name, once at each of several places on this machine."""

    def __init__(self, load: LoadEngine, model: ModelInfo, options: ModelOptions, places: Sequence[Place]) -> None:
        """`load` loads an engine in the process of a replica."""
        inner = {k: getattr(options, k) for k in ModelOptions.model_fields} | {"replicas": 1}
        arguments = load, model, ModelOptions.model_validate(inner)
        console.info(f"replicas: {len(places)} copies of the model, each in a process of its own")
        replicas = [Replica(place, number == 0) for number, place in enumerate(places)]
        self._replicas = replicas
        self._end = weakref.finalize(self, _end_all, replicas)
        try:
            for replica in replicas:
                replica.send(arguments)
            self._pool = WorkerPool(KIND, replicas)
        except BaseException:
            self._end()
            raise

    @property
    def name(self) -> str:
        return self._pool.name

    @property
    def versions(self) -> dict[str, str]:
        return self._pool.versions

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        return self._pool.generate(groups, sampling)

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        return self._pool.score(groups, top_k)

    def close(self) -> None:
        """Let all engines give their memory back, and end their processes."""
        for replica in self._replicas:
            replica.close()
        for replica in self._replicas:
            replica.end(CLOSE_SECONDS)


def _end_all(replicas: Sequence[Replica]) -> None:
    for replica in replicas:
        replica.end()


class Replica:
    """A process with a copy of the model, as a pool sees it."""

    def __init__(self, place: Place, speaks: bool) -> None:
        """`speaks`: whether it may say what there is to say of an engine, or another one does."""
        ours, theirs = socket.socketpair()
        program = [sys.executable, "-m", "dpkd_offline.engines.replica", str(theirs.fileno()), str(int(speaks))]
        with theirs:
            self._process = subprocess.Popen(
                program,
                env=dict(place.environment),
                stdin=subprocess.DEVNULL,
                stdout=STDERR,  # stdout is for results
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._title = place.title
        self._connection = Connection(ours.detach())
        self._tasks = count()
        self._answers: dict[int, Future[Any]] = {LOADED: Future()}
        self._loaded = self._answers[LOADED]
        self._lost = ""  # why, once it is
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._receive, name=f"replica on {place.title}", daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it has ended, which the thread that receives says
            self._connection.send(message)

    def address(self) -> Future[str]:
        answer: Future[str] = Future()
        answer.set_result(self._title)
        return answer

    def load(self) -> Future[tuple[str, dict[str, str]]]:
        return self._loaded

    def run(self, call: Call, group: Sequence[Any]) -> Future[Sequence[tuple[Key, Any]]]:
        task, answer = next(self._tasks), Future[Any]()
        with self._lock:
            if self._lost:
                answer.set_exception(WorkerLost(self._lost))
                return answer
            self._answers[task] = answer
        self.send((task, call, list(group)))
        return answer

    def _receive(self) -> None:
        """Hand on what the process says, until it ends."""
        reason = ""
        try:
            while not reason:
                task, result, error = self._connection.recv()
                if isinstance(error, UnavailableError) and task != LOADED:
                    reason = str(error)  # its engine is dead, and others may live
                elif error is not None:
                    self._answers.pop(task).set_exception(error)
                else:
                    self._answers.pop(task).set_result(result)
        except (EOFError, OSError):
            pass  # it has ended; how, the system knows
        finally:
            if reason:
                self._kill()
            ended = self._reap()
            with self._lock:
                self._lost = reason or ended
            for answer in self._answers.values():
                answer.set_exception(WorkerLost(self._lost))

    def _reap(self) -> str:
        """Wait for the end of the process, end what its engine has started, and say how it ended."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._kill()  # as long as its number is its own
        code = self._process.wait()
        if code >= 0:
            return f"its process ended with code {code}"
        why = " (often by the system, because memory ran out)" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{why}"

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all of them are dead
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ask it to close its engine and to end."""
        self.send(None)

    def end(self, seconds: float = 0.0) -> None:
        """End it and all that its engine has started; wait so long at most for it to do that itself."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._kill()
            self._thread.join()
