"""Many workers through Ray: an actor with an engine of its own on every node or GPU.

Nodes need not share the dataset's file system. A lost worker costs what it had in work; it is asked again until Ray has
restarted it. The driver never waits inside Ray, whose own waiting swallows signals.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, first_line
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Completion, GenerateRequest, Key, LoadEngine, Score, ScoreRequest
from dpkd_offline.engines.worker import Call, Worker
from dpkd_offline.engines.worker_pool import Kind, WorkerLost, WorkerPool
from dpkd_offline.models.info import ModelInfo

KIND = Kind(
    "ray",
    come_back=True,
    if_none="`ray status` shows what the cluster has free",
    if_they_die="Ray's logs on the nodes say why (often it is memory)",
)


class RayEngine:
    """The engine that the options name, once on every node or GPU of a Ray cluster."""

    def __init__(self, load: LoadEngine, model: ModelInfo, options: ModelOptions) -> None:
        """`load` loads an engine in the process of a worker."""
        self._connected = _connect()
        inner = {k: getattr(options, k) for k in ModelOptions.model_fields} | {"cluster": "none", "replicas": 1}
        arguments = (load, model, ModelOptions.model_validate(inner))
        places = _places(options)
        self._actors = [_start(place, arguments) for place in places]
        console.info(f"ray: {len(places)} workers, each with {_in_words(places[0])}")
        try:
            self._pool = WorkerPool(KIND, [RayWorker(actor) for actor in self._actors])
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return self._pool.name

    @property
    def versions(self) -> dict[str, str]:
        return {**self._pool.versions, "ray": ray.__version__}

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        return self._pool.generate(groups, sampling)

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        return self._pool.score(groups, top_k)

    def close(self) -> None:
        """End the workers and leave the cluster."""
        for actor in self._actors:
            ray.kill(actor)
        if self._connected:
            ray.shutdown()


@dataclass(frozen=True)
class RayWorker:
    """An actor as a pool sees it."""

    actor: Any

    def address(self) -> Future[str]:
        return _translated(self.actor.address.remote(), starting=True)

    def load(self) -> Future[tuple[str, dict[str, str]]]:
        return _translated(self.actor.load.remote())

    def run(self, call: Call, group: Sequence[Any]) -> Future[Sequence[tuple[Key, Any]]]:
        return _translated(self.actor.run.remote(call, group))


def _translated(reference: Any, starting: bool = False) -> Future[Any]:
    """What Ray answers, with errors as a pool knows them."""
    answer: Future[Any] = Future()

    def set_answer(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, RayActorError) and error.actor_init_failed:
            answer.set_exception(_cannot_start(error))
        elif isinstance(error, RayActorError | ObjectLostError):
            answer.set_exception(WorkerLost(first_line(error)))
        elif isinstance(error, RayTaskError):
            answer.set_exception(_cannot_start(error) if starting else error.cause)
        else:
            answer.set_exception(error)

    reference.future().add_done_callback(set_answer)
    return answer


class Actor:
    """A worker in a process of Ray's. Its methods are called several at a time."""

    def __init__(self, load: LoadEngine, model: ModelInfo, options: ModelOptions) -> None:
        self._worker = Worker(load, model, options)
        self._running: dict[tuple[int, Key], Future[list[tuple[Key, Any]]]] = {}

    async def address(self) -> str:
        """The node's name."""
        return socket.gethostname()

    async def load(self) -> tuple[str, dict[str, str]]:
        """Wait until the engine is loaded: its name and versions; UnavailableError, with the node, if it cannot be."""
        try:
            engine = await asyncio.wrap_future(self._worker.engine)
        except UnavailableError as error:
            raise UnavailableError(f"{error} (on node {socket.gethostname()})") from error
        return engine.name, engine.versions

    async def run(self, call: Call, group: Sequence[Any]) -> list[tuple[Key, Any]]:
        """A group's results, once all are complete."""
        place = call.number, group[0].key
        if place not in self._running:  # else the connection broke, and the same group comes again
            self._running[place] = self._worker.start(call, group)
        try:
            return await asyncio.wrap_future(self._running[place])
        finally:
            self._running.pop(place, None)


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
    actor = ray.remote(Actor).options(
        num_gpus=place.gpus,
        num_cpus=place.cpus,
        max_restarts=-1,
        max_task_retries=0,  # a task whose worker is lost goes to another at once
        scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=True),
    )
    return actor.remote(*arguments)
