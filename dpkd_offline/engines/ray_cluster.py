"""Many workers through Ray: an actor with an engine of its own on every node or GPU, fed with groups by the stage.

The stage stays the only one that writes: groups go out, results come back, so that the nodes need not share the
dataset's file system. A lost worker costs what it had in work; others take that, and the worker is asked again until
Ray has restarted it. The driver waits on a queue and never inside Ray, whose own waiting swallows signals.
"""

from __future__ import annotations

import itertools
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Completion, GenerateRequest, Key, LoadEngine, Score, ScoreRequest
from dpkd_offline.engines.ray_worker import Call, Worker
from dpkd_offline.models.info import ModelInfo

PATIENCE_SECONDS = 600.0  # without any worker
ASK_AGAIN_SECONDS = 3.0  # whether a lost worker is back
SAY_SECONDS = 60.0  # between lines while there is no worker
LOSSES = 3  # per worker, without a result in between: then it is the work that kills them
BUFFERS = 2  # what a worker is given: so many groups, or so many times the requests that its engine works on at once


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it."""

    number: int
    actor: Any
    address: str = ""  # of its node; empty while the worker does not run
    ready: bool = False  # its engine is loaded
    ask_at: float = 0.0  # when to ask whether it runs
    work: dict[int, Sequence[Any]] = field(default_factory=dict)  # groups by the number of their task


class RayEngine:
    """The engine that the options name, once on every node or GPU of a Ray cluster."""

    def __init__(self, load: LoadEngine, model: ModelInfo, options: ModelOptions) -> None:
        """`load` loads an engine in the process of a worker."""
        self._connected = _connect()
        inner = {k: getattr(options, k) for k in ModelOptions.model_fields} | {"cluster": "none"}
        arguments = (load, model, ModelOptions.model_validate(inner))
        places = _places(options)
        self._workers = [WorkerHandle(n, _start(place, arguments)) for n, place in enumerate(places, start=1)]
        self._returned: deque[Sequence[Any]] = deque()  # groups of lost workers
        self._events: SimpleQueue[tuple[WorkerHandle, str | int, Future[Any]]] = SimpleQueue()
        self._numbers = itertools.count()
        self._last_alive = self._last_message = time.monotonic()
        self._losses = 0
        self.name = ""
        self._versions: dict[str, str] = {}
        console.info(f"ray: {len(self._workers)} workers, each with {_in_words(places[0])}")
        try:
            while not self.name:
                self._handle_event()
        except BaseException:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, str]:
        return {**self._versions, "ray": ray.__version__}

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        return self._run(Call(next(self._numbers), "generate", sampling), groups)

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        return self._run(Call(next(self._numbers), "score", top_k), groups)

    def _run(self, call: Call, groups: Iterable[Sequence[Any]]) -> Iterator[tuple[Key, Any]]:
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
            self._ask(worker, task, worker.actor.run.remote(call, group))
        return True

    def _worker_with_room(self) -> WorkerHandle | None:
        """Of the workers that can take one more group, the one with the least to do."""

        def has_room(worker: WorkerHandle) -> bool:
            requests = sum(map(len, worker.work.values()))
            return len(worker.work) < BUFFERS or requests < BUFFERS * ENGINES[self.name].in_flight

        free = [worker for worker in self._workers if worker.ready and has_room(worker)]
        return min(free, key=lambda worker: len(worker.work), default=None)

    def _ask(self, worker: WorkerHandle, task: str | int, reference: Any) -> None:
        reference.future().add_done_callback(lambda done: self._events.put((worker, task, done)))

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
        if isinstance(error, RayActorError | ObjectLostError):
            self._lose(worker, error)
        elif isinstance(error, RayTaskError):
            raise _cannot_start(error) if task == "address" else error.cause from error
        elif error is not None:
            raise error
        elif isinstance(task, int):
            self._losses = 0
            del worker.work[task]
            return done.result()  # type: ignore[no-any-return]
        elif task == "address":
            worker.address = done.result()
            self._ask(worker, "load", worker.actor.load.remote())
        else:
            worker.ready = True
            console.info(f"ray: worker {worker.number} is ready on {worker.address}")
            self.name, self._versions = done.result()
        return ()

    def _lose(self, worker: WorkerHandle, error: RayActorError | ObjectLostError) -> None:
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise _cannot_start(error) from error
        if worker.address:
            lost = f"worker {worker.number} on {worker.address} is lost"
            console.info(f"ray: {lost}; {len(worker.work)} shards go to others")
            self._losses += 1
        if self._losses >= LOSSES * len(self._workers):
            raise UnavailableError(
                f"ray: workers died {self._losses} times without finishing a shard; Ray's logs on the nodes say why "
                f"(often it is memory)"
            ) from error
        self._returned.extend(worker.work.values())
        worker.work.clear()
        worker.address, worker.ready, worker.ask_at = "", False, time.monotonic() + ASK_AGAIN_SECONDS

    def _ask_lost_workers(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if not worker.address and worker.ask_at <= now:
                worker.ask_at = float("inf")  # until this question is answered
                self._ask(worker, "address", worker.actor.address.remote())
        if any(worker.address for worker in self._workers):
            self._last_alive = self._last_message = now
        elif now - self._last_alive > PATIENCE_SECONDS:
            raise UnavailableError(
                f"ray: no worker for {PATIENCE_SECONDS / 60:.0f} minutes; `ray status` shows what the cluster has free"
            )
        elif now - self._last_message > SAY_SECONDS:
            self._last_message = now
            console.info(f"ray: no worker runs; waiting for nodes since {now - self._last_alive:.0f} s")

    def close(self) -> None:
        """End the workers and leave the cluster."""
        for worker in self._workers:
            ray.kill(worker.actor)
        if self._connected:
            ray.shutdown()


def _cannot_start(error: RayError) -> UnavailableError:
    reason = " ".join(str(error).split())[-300:]
    return UnavailableError(f"ray: a worker cannot start; has every node this version of dpkd-offline? …{reason}")


def _connect() -> bool:
    """Join the running cluster; whether that was this call's doing. UnavailableError where there is none."""
    if ray.is_initialized():
        return False
    start = "start one with `ray start --head` and set RAY_ADDRESS=HOST:6379 on other machines"
    try:
        address = ray._private.services.canonicalize_bootstrap_address_or_die("auto")
        host, _, port = address.rpartition(":")
        # Ray itself asks an address that does not answer for ever, deaf to signals.
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". Please")[0]
        raise UnavailableError(f"no Ray cluster: {reason}; {start}") from error
    # What Ray tells about lost nodes it would print among our results; we say it ourselves.
    ray._private.worker._worker_logs_enabled = False
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:  # another version of Ray or Python
        raise UnavailableError(f"the Ray cluster at {address}: {' '.join(str(error).split())[:300]}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # which Ray takes
    return True


@dataclass(frozen=True)
class Place:
    """Where a worker is meant to be, and what it takes there."""

    node: str
    gpus: int
    cpus: int


def _places(options: ModelOptions) -> list[Place]:
    """One per GPU (or as many GPUs as share a model) where the cluster has GPUs, else one per node, with its CPUs."""
    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = options.tensor_parallel_size if ENGINES[options.engine].splits_model else 1
    if any(resources.get("GPU") for _, resources in nodes):
        places = [
            Place(node, gpus, 1) for node, resources in nodes for _ in range(int(resources.get("GPU", 0)) // gpus)
        ]
        if not places:
            raise UnavailableError(f"ray: no node has the {gpus} GPUs of --tensor-parallel-size {gpus}")
        return places
    # Ray lets a worker compute with as many threads as it takes CPUs.
    places = [Place(node, 0, int(resources["CPU"])) for node, resources in nodes if resources.get("CPU", 0) >= 1]
    if not places:
        raise UnavailableError("ray: no node of the cluster has GPUs or CPUs to give")
    return places


def _in_words(place: Place) -> str:
    number, what = (place.gpus, "GPU") if place.gpus else (place.cpus, "CPU")
    return f"{number} {what}" + ("s" if number > 1 else "")


def _start(place: Place, arguments: tuple[LoadEngine, ModelInfo, ModelOptions]) -> Any:
    """A worker, at its place or, where that is gone, at another with as much."""
    actor = ray.remote(Worker).options(
        num_gpus=place.gpus,
        num_cpus=place.cpus,
        max_restarts=-1,
        max_task_retries=0,  # a task whose worker is lost goes to another at once
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=True),
    )
    return actor.remote(*arguments)
