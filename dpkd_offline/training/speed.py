"""How much of its device a run uses: product rate, peak memory, the share of its time that it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.batch import PromptAndResponses
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.objectives import StepMetrics, objective_of, rows_of
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

T = TypeVar("T")
PRODUCT = 8192  # rows and columns of the matrices whose product says how fast a GPU is
TRIES = 12


class Meter:
    """Measures the steps of a run by the host's clock and what the allocator counts, so that no device is waited for.

    A GPU's product rate is measured when this is made.
    """

    def __init__(self, config: TrainConfig, student: Student, processes: Processes) -> None:
        self._config, self._student, self._count = config, student, processes.count
        self._device = processes.device
        self._cost = None if self._device.type == "cpu" or processes.zero else cost_of(student.model)
        self._rate = product_rate(self._device, getattr(torch, config.precision), PRODUCT) if self._cost else 0.0
        self._waited = 0.0  # seconds since the last step
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def waited_for(self, items: Iterator[T]) -> Iterator[T]:
        """The same items; how long each lets the run wait counts in its step."""
        while True:
            started = time.monotonic()
            item = next(items, None)
            self._waited += time.monotonic() - started
            if item is None:
                return
            yield item

    def of_step(self, examples: Sequence[Example], seconds: float) -> StepMetrics:
        """Of a step on these examples of all processes, which took so long once they were there."""
        metrics = {"waiting": round(self._waited / (self._waited + seconds), 4)}
        if self._cost:
            rows = rows_of(examples, objective_of(self._config))
            flops = self._cost.of(rows, self._student.shares) / self._count
            metrics["mfu"] = round(flops / (seconds * self._rate), 4)
        if self._device.type == "cuda":
            metrics["memory_gib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**30, 2)
        self._waited = 0.0
        return metrics


@dataclass(frozen=True)
class Cost:
    """FLOPs of forward and backward, without what is computed again."""

    token: float  # of all products with weights but the head's
    response_token: float  # of the head's
    pair: float  # of attention, of a query and a key

    def of(self, rows: Sequence[PromptAndResponses], shares: bool) -> float:
        """Of prompts with responses; a prompt counts once where that is how it is computed."""
        flops = 0.0
        for ids, responses in rows:
            prompt, lengths = len(ids), list(map(len, responses))
            times = 1 if shares else len(lengths)
            pairs = times * prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)
            flops += self.token * (times * prompt + sum(lengths)) + self.response_token * sum(lengths)
            flops += self.pair * pairs
        return flops


def cost_of(model: PreTrainedModel) -> Cost | None:
    """What a model costs; None of one whose tokens do not all go through all of its weights (experts).

    A weight takes part in one product forward and two backward, or in one backward where it is not trained. Attention
    counts as if each layer looked at everything before.
    """
    config: Any = model.config.get_text_config()
    if any("expert" in name for name, _ in model.named_parameters()):
        return None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings().weight
    trunk = 0
    for p in model.parameters():
        if p.ndim == 2 and p is not head and id(p) not in embeddings:
            trunk += p.numel() * (6 if p.requires_grad else 4)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * size
    return Cost(trunk, head.numel() * (6 if head.requires_grad else 4), 12 * width)


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of products of two square matrices, the best of some tries. The device is waited for."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(TRIES):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
