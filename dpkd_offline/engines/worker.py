"""The other end of a pool: an engine in a process of its own, which takes groups as they come.

Whatever groups are there go through the engine in one stream, so that it mixes them as it would in one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines.base import Engine, Key, LoadEngine
from dpkd_offline.models.info import ModelInfo


@dataclass(frozen=True)
class Call:
    """One use of a verb: what all of its groups have in common."""

    number: int
    verb: Literal["generate", "score"]
    argument: SamplingOptions | int


@dataclass
class Job:
    """A group and its results so far."""

    call: Call
    group: Sequence[Any]
    results: list[tuple[Key, Any]] = field(default_factory=list)
    done: Future[list[tuple[Key, Any]]] = field(default_factory=Future)

    @property
    def shard(self) -> int:
        key: Key = self.group[0].key
        return key[0]


class Worker:
    """An engine that has a thread to itself, and the groups that wait for it."""

    def __init__(self, load: LoadEngine, model: ModelInfo, options: ModelOptions) -> None:
        self._thread = ThreadPoolExecutor(1)
        self.engine: Future[Engine] = self._thread.submit(load, model, options)
        self._waiting: deque[Job] = deque()

    def start(self, call: Call, group: Sequence[Any]) -> Future[list[tuple[Key, Any]]]:
        """A group's results, once all are complete."""
        job = Job(call, group)
        self._waiting.append(job)
        self._thread.submit(self._stream, call)
        return job.done

    def _stream(self, call: Call) -> None:
        """Run the engine on all groups of a call that wait and that come meanwhile, each of which has asked for this.

        Another call can come before this one ends: where it has failed, or was given up.
        """
        running: dict[int, Job] = {}

        def waits() -> bool:
            return bool(self._waiting) and self._waiting[0].call.number == call.number

        def groups() -> Iterator[Sequence[Any]]:
            while waits() or running:
                if waits():
                    job = self._waiting.popleft()
                    running[job.shard] = job
                    yield job.group
                else:
                    yield ()

        try:
            results = getattr(self.engine.result(), call.verb)(groups(), call.argument)
            for key, result in results:
                job = running[key[0]]
                job.results.append((key, result))
                if len(job.results) == len(job.group):
                    del running[key[0]]
                    job.done.set_result(job.results)
        except Exception as error:  # the driver's to hear, for each group
            failed = list(running.values())
            while waits():
                failed.append(self._waiting.popleft())
            for job in failed:
                job.done.set_exception(error)
