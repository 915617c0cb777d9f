"""The other end of a pool, when calls follow each other closely: nothing is lost, and each has its own groups."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import pytest

from dpkd_offline.config.base import ModelOptions
from dpkd_offline.engines.base import GenerateRequest, Key
from dpkd_offline.engines.worker import Call, Worker
from dpkd_offline.models.info import ModelInfo


class Engine:
    """Answers with the argument of the call; none of the argument "wrong". Waits before each group until it may go."""

    def __init__(self) -> None:
        self.may_go = threading.Event()

    def generate(self, groups: Iterator[Sequence[GenerateRequest]], argument: Any) -> Iterator[tuple[Key, Any]]:
        for group in groups:
            assert self.may_go.wait(60)
            if argument == "wrong":
                raise ValueError("it is wrong")
            for request in group:
                yield request.key, argument


def ask(worker: Worker, number: int, argument: Any, *shards: int) -> list[Future[list[tuple[Key, Any]]]]:
    call = Call(number, "generate", argument)
    return [worker.start(call, [GenerateRequest((shard, 0), [5], seed=0)]) for shard in shards]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def worker(engine: Engine) -> Worker:
    return Worker(lambda *_: engine, ModelInfo("m"), ModelOptions())  # type: ignore[arg-type, return-value]


def test_what_is_asked_as_soon_as_an_error_is_told_is_answered(engine: Engine, worker: Worker) -> None:
    (failed,) = ask(worker, 0, "wrong", 0)
    asked = SimpleQueue[Future[Any]]()
    failed.add_done_callback(lambda _: asked.put(*ask(worker, 1, "right", 0)))  # before the worker goes on
    engine.may_go.set()
    with pytest.raises(ValueError, match="it is wrong"):
        failed.result(60)
    assert asked.get(timeout=60).result(60) == [((0, 0), "right")]


def test_groups_of_a_call_are_not_given_to_one_that_goes_on(engine: Engine, worker: Worker) -> None:
    given_up, follows = ask(worker, 0, "old", 0, 1, 2), ask(worker, 1, "new", 0, 1)
    engine.may_go.set()
    assert [answer.result(60)[0][1] for answer in (*given_up, *follows)] == ["old"] * 3 + ["new"] * 2


def test_an_error_is_told_of_each_group_of_its_call_and_of_no_other(engine: Engine, worker: Worker) -> None:
    failed, follows = ask(worker, 0, "wrong", 0, 1, 2), ask(worker, 1, "new", 1)
    engine.may_go.set()
    assert [str(answer.exception(60)) for answer in failed] == ["it is wrong"] * 3
    assert follows[0].result(60) == [((1, 0), "new")]
