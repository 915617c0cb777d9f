"""Many workers as one engine: groups go to whoever has room, and those of a lost worker to others.

The stage stays the only one that writes: groups go out, results come back, so that workers need not see its files. The
stage waits on a queue, and never inside a library, so that a signal ends it at once.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.base import SamplingOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Completion, GenerateRequest, Key, Score, ScoreRequest
from dpkd_offline.engines.worker import Call

PATIENCE_SECONDS = 600.0  # without any worker, where lost ones come back
ASK_AGAIN_SECONDS = 3.0  # whether a lost worker is back
SAY_SECONDS = 60.0  # between lines while there is no worker
LOSSES = 3  # per worker, without a result in between: then it is the work that kills them
NEVER = float("inf")
BUFFERS = 2  # what a worker is given: so many groups, or so many times the requests that its engine works on at once


class WorkerLost(Exception):
    """A worker is no more; why, in words."""


class RemoteWorker(Protocol):
    """A worker in another process. Its answers are errors of the engine, or WorkerLost."""

    def address(self) -> Future[str]:
        """Where it runs, once it does."""
        ...

    def load(self) -> Future[tuple[str, dict[str, str]]]:
        """The name and versions of its engine, once that is loaded."""
        ...

    def run(self, call: Call, group: Sequence[Any]) -> Future[Sequence[tuple[Key, Any]]]:
        """A group's results, once all are complete."""
        ...


@dataclass(frozen=True)
class Kind:
    """Of the workers of a pool: what they are called, and how to find out what is wrong with them."""

    title: str
    come_back: bool  # a lost worker is started again
    if_none: str = ""  # what to look at where none of them comes back
    if_they_die: str = ""


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the pool sees it."""

    number: int
    remote: RemoteWorker
    address: str = ""  # empty while the worker does not run
    ready: bool = False  # its engine is loaded
    lost: bool = False  # at least once
    ask_at: float = 0.0  # when to ask whether it runs
    work: dict[int, Sequence[Any]] = field(default_factory=dict)  # groups by the number of their task


class WorkerPool:
    """Workers with an engine each, used as one."""

    def __init__(self, kind: Kind, workers: Sequence[RemoteWorker]) -> None:
        """Waits until one of them is ready, and raises what keeps the first from it."""
        self._kind = kind
        self._workers = [WorkerHandle(number, remote) for number, remote in enumerate(workers, start=1)]
        self._returned: deque[Sequence[Any]] = deque()  # groups of lost workers
        self._events: SimpleQueue[tuple[WorkerHandle, str | int, Future[Any]]] = SimpleQueue()
        self._numbers = itertools.count()
        self._last_alive = self._last_message = time.monotonic()
        self._losses = 0
        self.name = ""
        self.versions: dict[str, str] = {}
        while not self.name:
            self._handle_event()

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        return self._run("generate", sampling, groups)

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        return self._run("score", top_k, groups)

    def _run(
        self, verb: Literal["generate", "score"], argument: SamplingOptions | int, groups: Iterable[Sequence[Any]]
    ) -> Iterator[tuple[Key, Any]]:
        call = Call(next(self._numbers), verb, argument)
        self._returned.clear()
        for worker in self._workers:
            worker.work.clear()  # of a call that was given up
        coming = iter(groups)
        while self._hand_out(call, coming) or any(worker.work for worker in self._workers):
            yield from self._handle_event()

    def _hand_out(self, call: Call, coming: Iterator[Sequence[Any]]) -> bool:
        """Give groups to all workers that have room, those first that lost workers had; whether any may be left."""
        while worker := self._worker_with_room():
            group = self._returned.popleft() if self._returned else next(coming, None)
            if group is None:
                return False
            task = next(self._numbers)
            worker.work[task] = group
            self._ask(worker, task, worker.remote.run(call, group))
        return True

    def _worker_with_room(self) -> WorkerHandle | None:
        """Of the workers that can take one more group, the one with the least to do."""

        def has_room(worker: WorkerHandle) -> bool:
            requests = sum(map(len, worker.work.values()))
            return len(worker.work) < BUFFERS or requests < BUFFERS * ENGINES[self.name].in_flight

        free = [worker for worker in self._workers if worker.ready and has_room(worker)]
        return min(free, key=lambda worker: len(worker.work), default=None)

    def _ask(self, worker: WorkerHandle, task: str | int, answer: Future[Any]) -> None:
        answer.add_done_callback(lambda done: self._events.put((worker, task, done)))

    def _handle_event(self) -> Sequence[tuple[Key, Any]]:
        """Wait a moment for what comes from the workers; results, if it was results.

        Raises:
            UnavailableError: no worker was there for too long, or all that come die.
        """
        self._ask_lost_workers()
        try:
            worker, task, done = self._events.get(timeout=1.0)
        except Empty:
            return ()
        if isinstance(task, int) and task not in worker.work:
            return ()  # given to another, because the connection broke
        error = done.exception()
        if isinstance(error, WorkerLost):
            self._lose(worker, error)
        elif error is not None:
            raise error
        elif isinstance(task, int):
            self._losses = 0
            del worker.work[task]
            return done.result()  # type: ignore[no-any-return]
        elif task == "address":
            worker.address = done.result()
            self._ask(worker, "load", worker.remote.load())
        else:
            worker.ready = True
            console.info(f"{self._kind.title}: worker {worker.number} is ready on {worker.address}")
            self.name, self.versions = done.result()
        return ()

    def _lose(self, worker: WorkerHandle, error: WorkerLost) -> None:
        title, come_back = self._kind.title, self._kind.come_back
        if worker.address:
            lost = f"worker {worker.number} on {worker.address} is lost{'' if come_back else f': {error}'}"
            console.info(f"{title}: {lost}; {len(worker.work)} shards go to others")
            self._losses += 1
        self._returned.extend(worker.work.values())
        worker.work.clear()
        worker.address, worker.ready = "", False
        worker.ask_at = time.monotonic() + ASK_AGAIN_SECONDS if come_back else NEVER
        if come_back and self._losses >= LOSSES * len(self._workers):
            died = f"workers died {self._losses} times without finishing a shard"
            raise UnavailableError(f"{title}: {died}; {self._kind.if_they_die}") from error
        worker.lost = True
        if not come_back and all(worker.lost for worker in self._workers):
            raise UnavailableError(f"{title}: all workers are lost, the last one: {error}") from error

    def _ask_lost_workers(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not worker.address and worker.ask_at <= now:
                worker.ask_at = NEVER  # until this question is answered
                self._ask(worker, "address", worker.remote.address())
        if any(worker.address for worker in self._workers):
            self._last_alive = self._last_message = now
        elif now - self._last_alive > PATIENCE_SECONDS:
            raise UnavailableError(
                f"{self._kind.title}: no worker for {PATIENCE_SECONDS / 60:.0f} minutes; {self._kind.if_none}"
            )
        elif now - self._last_message > SAY_SECONDS:
            self._last_message = now
            console.info(f"{self._kind.title}: no worker runs; waiting for nodes since {now - self._last_alive:.0f} s")
