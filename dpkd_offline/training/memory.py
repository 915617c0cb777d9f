"""What a run takes of a GPU's memory: its micro batches are sized by a trial, and where memory runs out this says what
helps, and by how much."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError, UnavailableError, first_line, is_out_of_memory
from dpkd_offline.config.train import MOMENT_BYTES, TrainConfig
from dpkd_offline.models.batch import PromptAndResponses, pair_batch
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.objectives import objective_of
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.student import Student, layers_of, recompute_layers

GIB = 2**30
TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768)  # of a micro batch, where a trial chooses
TRIALS = (128, 128, 256, 1024, 4096)  # tokens of its micro batches; the first also makes what later ones find
MARGIN = 0.08  # of the memory, for what no trial shows: pieces that fit nowhere, longer rows, validation
Choices = dict[str, bool | int]  # what was chosen for settings that the config leaves open


class DeviceMemory(Protocol):
    """The memory of a device, in bytes."""

    def total(self) -> int: ...

    def available(self) -> int:
        """What this process may still take."""

    def peak_of(self, work: Callable[[], None]) -> int:
        """The most that some work took at once, beyond what was there before."""


class CudaMemory:
    """That of a GPU, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def total(self) -> int:
        total = torch.cuda.mem_get_info(self._device)[1]
        return int(total * torch.cuda.get_per_process_memory_fraction(self._device))

    def available(self) -> int:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        allocated, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        return min(free + reserved - allocated, self.total() - allocated)

    def peak_of(self, work: Callable[[], None]) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


def device_memory(device: torch.device) -> DeviceMemory | None:
    """That of a GPU; None of a CPU, on which nothing is tried."""
    return CudaMemory(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class MicroBatchMemory:
    """What forward and backward of a micro batch take, in bytes; a line through what trials took."""

    fixed: float
    per_token: float

    def of(self, tokens: int) -> float:
        return self.fixed + self.per_token * tokens


@dataclass
class RunMemory:
    """The memory of a run, as far as it is known: used as a context, it explains where that runs out."""

    config: TrainConfig
    processes: Processes
    device: DeviceMemory | None = None  # None on a CPU
    student: Student | None = None
    micro_batch: MicroBatchMemory | None = None
    choices: Choices = field(default_factory=dict)

    def settle(self, student: Student, optimizer: MasterAdamW) -> TrainConfig:
        """Choose what the config leaves open, by a trial on a GPU; returns the config with it.

        All processes call it, and choose the same. On a CPU, and of what is chosen already, nothing changes.
        """
        recomputes, tokens = self.config.gradient_checkpointing, self.config.micro_batch_tokens
        if self.device is None or (recomputes is not None and tokens is not None):
            return self.config
        device, smallest = self.device, self.processes.smallest
        room = smallest(device.available() - optimizer.pending_bytes() - MARGIN * device.total())
        longest = self.config.max_length * len(objective_of(self.config).sides)
        chosen: Choices = {}
        self.micro_batch = self._try(student, optimizer, room)
        if recomputes is None:
            too_large = self.micro_batch.of(max(longest, tokens or 0)) > room
            chosen["gradient_checkpointing"] = too_large and bool(layers_of(student.model))
            if chosen["gradient_checkpointing"]:
                recompute_layers(student.model)
                self.micro_batch = self._try(student, optimizer, room)
        need = self.micro_batch
        if tokens is None:
            tokens = max([n for n in TOKENS if need.of(n) <= room], default=TOKENS[0])
            chosen["micro_batch_tokens"] = tokens
        again = ", with gradient checkpointing" if chosen.get("gradient_checkpointing") else ""
        console.info(
            f"micro batches of at most {tokens} tokens{again}: {need.of(tokens) / GIB:.1f} of {room / GIB:.1f} GiB"
        )
        if need.of(longest) > room:
            console.info(
                f"warning: the longest pair, of {longest} tokens, would take {need.of(longest) / GIB:.1f} GiB, and "
                f"{room / GIB:.1f} are free; a lower --max-length leaves such pairs out"
            )
        self.choose(chosen)
        return self.config

    def choose(self, choices: Choices) -> None:
        """Take these for what the config leaves open; what it says stays."""
        open_ones = {name: value for name, value in choices.items() if getattr(self.config, name) is None}
        self.choices |= open_ones
        self.config = self.config.model_copy(update=open_ones)

    def _try(self, student: Student, optimizer: MasterAdamW, room: float) -> MicroBatchMemory:
        """Of micro batches one larger than the other, as far as the last lets expect room for the next."""
        assert self.device is not None
        peaks: dict[int, float] = {}  # by tokens
        for tokens in TRIALS:
            if len(peaks) > 1 and _line(peaks).of(tokens) > room:
                break
            rows = _rows(tokens, self.config)
            batch = pair_batch(rows, student.shares)
            work = _Trial(student, optimizer, rows, objective_of(self.config).best, self.processes.sharded)
            peaks[batch.input_ids.numel()] = -self.processes.smallest(-self.device.peak_of(work))
        return _line(peaks)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A context in which an error that memory ran out becomes one line, with what would help.

        Raises:
            UnavailableError: memory ran out.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, DpkdError) or not is_out_of_memory(error):
                raise
            raise UnavailableError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        helps = [f"{option}{f' (saves about {_gib(saved)})' if saved else ''}" for option, saved in self._savings()]
        return f"memory ran out ({self._lack(error)}); it needs less with {', or '.join(helps)}"

    def _lack(self, error: Exception) -> str:
        """How much was needed and is there, as far as that is known."""
        asked = re.search(r"Tried to allocate ([\d.]+) (MiB|GiB)", str(error))
        if self.device is None or asked is None:
            return first_line(error)[:160].rstrip(" .")
        last = float(asked[1]) * (GIB if asked[2] == "GiB" else 2**20)
        total, used = self.device.total(), self.device.total() - self.device.available()
        return f"{_gib(used + last)} needed, {_gib(total)} there"

    def _savings(self) -> Iterator[tuple[str, float]]:
        """Options, and how many bytes of this process each saves; 0 where that is not known."""
        config, need, count = self.config, self.micro_batch, self.processes.count
        parameters = sum(p.numel() for p in self.student.parameters()) if self.student else 0
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad) if self.student else 0
        shards = count if self.processes.sharded or self.processes.zero else 1
        tokens = self.processes.micro_batch_tokens(config)
        if tokens > TRIALS[-3]:
            yield f"--micro-batch-tokens {tokens // 2}", need.per_token * (tokens - tokens // 2) if need else 0.0
        if not config.gradient_checkpointing:
            yield "--gradient-checkpointing", self._recomputed(tokens)
        if config.moments_dtype != "int8" and not self.processes.zero:
            saved = MOMENT_BYTES[config.moments_dtype] - MOMENT_BYTES["int8"]
            yield "--moments-dtype int8", saved * trained / shards
        if not config.lora_rank:
            state = 4 + 4 + MOMENT_BYTES[config.moments_dtype]  # master, gradient, moments
            yield "--lora-rank 16", state * trained / shards
        if config.precision == "float32":
            yield "--dtype bfloat16", 0.0
        yield "a lower --max-length", 0.0
        if shards == 1 and not config.lora_rank and self.device is not None:
            state = 2 + 4 + 4 + MOMENT_BYTES[config.moments_dtype]
            yield "FSDP on two GPUs", state * parameters / 2

    def _recomputed(self, tokens: int) -> float:
        """Bytes that gradient checkpointing saves: all that layers keep but their inputs, but for one layer."""
        if self.micro_batch is None or self.student is None:
            return 0.0
        config: Any = self.student.model.config.get_text_config()
        layers, width = config.num_hidden_layers, 4 if self.config.precision == "float32" else 2
        kept = layers * config.hidden_size * width
        saved: float = max(self.micro_batch.per_token * (1 - 1 / layers) - kept, 0.0) * tokens
        return saved


def _line(peaks: Mapping[int, float]) -> MicroBatchMemory:
    """Through the two largest of some trials; from nothing to the first."""
    (small, low), (large, high) = sorted({0: 0.0, **peaks}.items())[-2:]
    slope = max(high - low, 0.0) / (large - small)
    return MicroBatchMemory(high - slope * large, slope)


@dataclass(frozen=True)
class _Trial:
    """Forward and backward of a micro batch, of which no gradient remains."""

    student: Student
    optimizer: MasterAdamW
    rows: list[PromptAndResponses]
    best: bool  # whether the objective reads the student's likeliest tokens
    last: bool

    def __call__(self) -> None:
        batch = pair_batch(self.rows, self.student.shares).to(self.student.device)
        logps, _ = self.student(batch, batch.targets[:, None], self.best)
        self.optimizer.backward(logps.mean(), self.last)
        self.optimizer.discard_gradients()


def _rows(tokens: int, config: TrainConfig) -> list[PromptAndResponses]:
    """Prompts with responses, of about so many tokens together, and none of them longer than a real one may be."""
    parts = 1 + len(objective_of(config).sides)
    size = max(min(config.max_length // 2, tokens // parts), 1)
    count = max(tokens // (size * parts), 1)
    ids = [n % 100 for n in range(size)]
    return [(ids, [ids] * (parts - 1)) for _ in range(count)]


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"
