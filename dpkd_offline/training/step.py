"""A step of training: backward through the objective and the corpus, micro batch by micro batch, and an update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN
from dpkd_offline.models.batch import PromptAndResponses, pair_batch
from dpkd_offline.training import losses
from dpkd_offline.training.deepspeed import ZeroAdamW
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.objectives import StepMetrics, facts_of, objective_of, rows_of, score, word_facts_of
from dpkd_offline.training.optimizer import MasterAdamW, learning_rate_at
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student, student_fault


class Sums:
    """Sums by name of numbers that a device may still compute; asked for once, since each answer waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> StepMetrics:
        values = list(self._sums.values())
        device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
        together = torch.stack([value.to(device, non_blocking=True) for value in values])
        return dict(zip(self._sums, together.tolist(), strict=True))


@dataclass
class Run:
    """All that the arithmetic of a step needs."""

    config: TrainConfig
    student: Student
    optimizer: MasterAdamW | ZeroAdamW
    processes: Processes
    corpus: Iterator[list[int]] | None  # blocks of token ids, for the language-modelling loss
    total_steps: int

    def step(self, step: int, examples: list[Example], control_flags: Callable[[], StepMetrics] = dict) -> StepMetrics:
        """One optimizer step on a batch, of which each process takes its part, micro batch by micro batch.

        Returns the metrics of the whole batch, and the sums of `control_flags` over the processes, which each asks for
        at the end of its step. Losses are in nats; `grad_norm` is that before clipping.

        Raises:
            DataError: a loss is not finite.
        """
        started = time.monotonic()
        sums = self._objective(step, examples, last=self.corpus is None)
        if self.corpus is not None:
            sums |= self._language_modelling(step, list(islice(self.corpus, self.config.lm_batch_size)))
        self.processes.sum_gradients(self.optimizer.gradients())
        learning_rate = learning_rate_at(step, self.total_steps, self.config)
        grad_norm = self.optimizer.step(learning_rate)
        metrics = self.processes.sum({**sums, **control_flags()})
        tokens, padding = metrics.pop("tokens"), metrics.pop("padding")
        seconds = time.monotonic() - started
        return {
            "loss": metrics["loss_kd"]
            + self.config.chosen_nll_weight * metrics.get("loss_nll", 0.0)
            + self.config.lm_weight * metrics.get("loss_lm", 0.0),
            **metrics,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_s": round(tokens / seconds, 1),
            "pairs_per_s": round(len(examples) / seconds, 2),
            "padding": round(padding / (tokens + padding), 4),
        }

    def _micro_batches(self, rows: list[PromptAndResponses]) -> list[tuple[list[int], float]]:
        most = self.processes.micro_batch_tokens(self.config)
        return self.processes.own_micro_batches(rows, self.student.shares, most)

    def _objective(self, step: int, examples: list[Example], last: bool) -> StepMetrics:
        """Backward through the objective. Returns this process's part of the metrics, which are sums over the batch."""
        objective = objective_of(self.config)
        rows = rows_of(examples, objective)
        # What the loss is the mean over: the batch's pairs, or its response tokens.
        count = len(rows) if objective.per == "pair" else sum(len(y) for _, responses in rows for y in responses)
        anchored = objective.per == "pair" and self.config.chosen_nll_weight > 0
        sums, facts = Sums(), []
        groups = self._micro_batches(rows)
        for n, (group, weight) in enumerate(groups, 1):
            part = [examples[i] for i in group]
            scored = score(self.student, objective, part, self.config)
            loss = objective.loss(scored).sum() * (weight / count)
            sums.add("loss_kd", loss)
            if anchored:
                nll = losses.chosen_nll(scored.sums[:, CHOSEN], scored.lengths[:, CHOSEN]).sum() * (weight / count)
                sums.add("loss_nll", nll)
                loss = loss + self.config.chosen_nll_weight * nll
            finite = torch.isfinite(scored.logps).all() & torch.isfinite(scored.top_logps).all()
            facts.append(torch.stack([torch.isfinite(loss), finite]))
            self.optimizer.backward(loss, last and n == len(groups))
            for name, value in facts_of(scored).items():
                sums.add(name, value * (weight / len(examples)))
            for name, value in word_facts_of(scored).items():
                sums.add(name, value * (weight / count))
            sums.add("tokens", scored.batch.tokens * weight)
            sums.add("padding", (scored.batch.input_ids.numel() - scored.batch.tokens) * weight)
        metrics = sums.read()
        if not math.isfinite(metrics["loss_kd"] + metrics.get("loss_nll", 0.0)):
            for (group, _), (loss_is, logps_are) in zip(groups, torch.stack(facts).tolist(), strict=True):
                if not loss_is:
                    raise DataError(self._not_finite(step, logps_are, ", ".join(examples[i].id for i in group)))
        return metrics

    def _language_modelling(self, step: int, blocks: list[list[int]]) -> StepMetrics:
        """Backward through λ L_pt, the language-modelling loss on blocks of the pre-training corpus."""
        rows: list[PromptAndResponses] = [(block[:1], [block[1:]]) for block in blocks]
        count = sum(len(block) - 1 for block in blocks)
        sums = Sums()
        groups = self._micro_batches(rows)
        for n, (group, weight) in enumerate(groups, 1):
            batch = pair_batch([rows[i] for i in group], self.student.shares).to(self.student.device)
            logps, _ = self.student(batch, batch.targets[:, None])
            loss = losses.lm_loss(logps) * (logps.numel() / count * weight)
            sums.add("loss_lm", loss)
            self.optimizer.backward(loss * self.config.lm_weight, n == len(groups))
        metrics = sums.read()
        if not math.isfinite(metrics["loss_lm"]):
            raise DataError(self._not_finite(step, False, "blocks of lm-corpus"))
        return metrics

    def _not_finite(self, step: int, logps_are_finite: bool, where: str) -> str:
        """Whose numbers they are. The stored ones were checked, with file, row and column, before the first step."""
        if logps_are_finite:
            why = f"the loss is not finite on {where}, although all log-probs are; take a smaller --beta or --tau"
        else:
            why = student_fault(self.student, self.config, step, where)
        return f"{why}; the last checkpoint is untouched"
