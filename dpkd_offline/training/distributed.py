"""Several processes that train one student: which one this is, sums over all, and how they end.

Accelerate's launcher, or torch's, starts them and tells them by the environment what they are.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError
from dpkd_offline.config.train import MICRO_BATCH_TOKENS, TrainConfig
from dpkd_offline.models.batch import PromptAndResponses, micro_batches
from dpkd_offline.models.loading import tell_deepspeed_the_device

BUCKET_BYTES = 32 * 2**20  # of gradients that are added up in one call
ALIGNED = 16  # numbers: kernels that work on a list of tensors are fastest where each begins at a multiple
PATIENCE = timedelta(hours=1)  # with a process that the others wait for, such as the one that writes
POLL_SECONDS, PATIENCE_POLLS = 0.5, 20
ONE_REQUEST_SECONDS = 1.0  # a launcher hands on what its whole group was sent: two signals that ask once
FAILURES, CODE, HEARD, LEFT = (f"dpkd_offline/{key}" for key in ("failures", "code", "heard", "left"))  # in the store


class Processes:
    """All processes of a run; a single one unless a launcher has started several.

    Used as a context: the first process that fails says why, and ends the others with its own exit code, wherever
    they wait for it.
    """

    def __init__(self) -> None:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # else some would load a model without its weights
        tell_deepspeed_the_device()
        started = distributed.is_initialized()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self.device: torch.device = state.device
        self.sharded: bool = self.count > 1 and bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))
        zero = bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))
        self.zero: bool = zero and self.count > 1
        if zero and not self.zero:
            console.info("one process has nothing to shard: it trains without DeepSpeed")
        self._over, self._failed = threading.Event(), False
        if self.count > 1:
            console.only_first(self.first)
            self._store = _get_default_store()
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            if not started:
                atexit.register(distributed.destroy_process_group)

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def micro_batch_tokens(self, config: TrainConfig) -> int:
        """The most tokens in a forward pass on this device."""
        return config.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]

    def own_micro_batches(
        self, rows: Sequence[PromptAndResponses], shares: bool, max_tokens: int
    ) -> list[tuple[list[int], float]]:
        """The micro batches of this process: the places of their rows, and the weight that they count with, 1.

        All processes have as many, since wrapped models call each other. Where there are fewer rows than processes,
        some repeat the first row with weight 0.
        """
        groups = micro_batches(rows, shares, max_tokens, self.count)[self.rank :: self.count]
        return [(group, 1.0) if group else ([0], 0.0) for group in groups]

    def sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sum of each number over the processes, in float64; all of them must have the same names."""
        if self.count == 1:
            return dict(numbers)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(values)
        return dict(zip(numbers, values.tolist(), strict=True))

    def smallest(self, number: float) -> float:
        """The smallest of what the processes give."""
        if self.count == 1:
            return number
        value = torch.tensor([number], dtype=torch.float64, device=self.device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MIN)
        return float(value)

    def wait(self) -> None:
        """Wait until all processes have come to this call."""
        self.sum({"arrived": 1.0})

    def from_first(self, key: str, value: Any) -> Any:
        """What the first process calls this with: a value that JSON holds. All of them must call it, once a key."""
        if self.first:
            self._store.set(f"dpkd_offline/{key}", json.dumps(value))
        self.wait()  # the store's own patience is short
        return json.loads(self._store.get(f"dpkd_offline/{key}"))

    def gather(self, value: str) -> list[str]:
        """What each process calls this with, in the order of their ranks."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values

    def __enter__(self) -> Processes:
        if self.count > 1:
            self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.count == 1:
            return
        if error is None:
            self.wait()  # a failure before this ends the others
            self._over.set()
            self._watcher.join()
            self.wait()  # the first holds the store, and leaves when nobody reads it any more
            return
        if self._store.add(FAILURES, 1) > 1:
            self._watcher.join()  # another was first, and the watcher ends this process
        self._failed = True
        self._store.set(CODE, str(error.exit_code if isinstance(error, DpkdError) else 1))
        self._leave()
        atexit.unregister(distributed.destroy_process_group)  # which would wait for the others

    def _watch(self) -> None:
        """End this process when another one fails."""
        while not self._over.wait(POLL_SECONDS) and not self._failed:
            if self._store.check([CODE]) and not self._failed:
                code = int(self._store.get(CODE))
                self._leave()
                os._exit(code)

    def _leave(self) -> None:
        """Wait until all know of a failure: who ends early breaks the connections of who does not know yet."""
        self._meet(HEARD, wait=True)
        self._meet(LEFT, wait=self.first)  # the first holds the store

    def _meet(self, key: str, wait: bool) -> None:
        arrived = self._store.add(key, 1)
        for _ in range(PATIENCE_POLLS if wait else 0):  # not for ever: one may be dead
            if arrived == self.count:
                return
            time.sleep(POLL_SECONDS)
            arrived = self._store.add(key, 0)


class GradientSums:
    """The gradients of a step, which are added up over the processes while a backward pass still makes more of them.

    They lie in buckets, in the order in which a backward pass makes them: that of the last layer first. A bucket is
    sent when all of it is made and those before it are sent, so that all processes send the same ones in one order.
    """

    def __init__(self, like: Sequence[Tensor], processes: Processes) -> None:
        self._processes = processes
        self._places = list(_buckets(like))
        self._buckets: list[Tensor] = []
        self.gradients = list(like)  # zeros of their shapes and dtypes, each a view of its bucket
        for places in self._places:
            sizes = [like[place].numel() for place in places]
            padded = [-(-size // ALIGNED) * ALIGNED for size in sizes]
            self._buckets.append(like[places[0]].new_zeros(sum(padded)))
            for place, size, part in zip(places, sizes, self._buckets[-1].split(padded), strict=True):
                self.gradients[place] = part[:size].view_as(like[place])
        self._missing = set(range(len(like)))  # places of those that are not made yet
        self._sent: list[distributed.Work] = []

    def made(self, place: int) -> None:
        """Take note that the gradient at a place is the sum of all micro batches of this process. Once a step."""
        if self._processes.count > 1:
            self._missing.remove(place)
            while len(self._sent) < len(self._buckets) and self._missing.isdisjoint(self._places[len(self._sent)]):
                self._send()

    def finish(self) -> None:
        """Send what no backward pass has reached, and have a sum over all processes at each place."""
        if self._processes.count > 1:
            while len(self._sent) < len(self._buckets):
                self._send()
            for work in self._sent:
                work.wait()
            self._sent, self._missing = [], set(range(len(self.gradients)))

    def _send(self) -> None:
        self._sent.append(distributed.all_reduce(self._buckets[len(self._sent)], async_op=True))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Their places, the last one first, in groups of at most BUCKET_BYTES of one dtype; a larger one by itself."""
    for _, alike in groupby(reversed(range(len(tensors))), key=lambda place: tensors[place].dtype):
        bucket: list[int] = []
        for place in alike:
            if bucket and sum(tensors[p].nbytes for p in (*bucket, place)) > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(place)
        yield bucket


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part, on the CPU then. All processes must call it."""
    if hasattr(tensor, "ds_id"):  # a parameter under ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@contextmanager
def collected_signals() -> Iterator[list[signal.Signals]]:
    """The signals that ask this process to end, for the end of a step; one that comes once more acts at once."""
    collected: list[signal.Signals] = []
    first = 0.0  # when the first came, in seconds

    def collect(number: int, _: object) -> None:
        nonlocal first
        if not collected:
            first = time.monotonic()
        elif time.monotonic() - first > ONE_REQUEST_SECONDS:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        collected.append(signal.Signals(number))

    may_set = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if may_set else ()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, collect)
        yield collected
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
