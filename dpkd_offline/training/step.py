"""A step of training: backward through the objective and the corpus, micro batch by micro batch, and an update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, distributed

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN
from dpkd_offline.models.batch import PromptAndResponses, pair_batch, send
from dpkd_offline.training import losses
from dpkd_offline.training.deepspeed import ZeroAdamW
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.objectives import (
    MicroBatch,
    StepMetrics,
    collate,
    facts_of,
    objective_of,
    rows_of,
    score_collated,
    word_facts_of,
)
from dpkd_offline.training.optimizer import MasterAdamW, learning_rate_at
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student, student_fault


class Sums:
    """Sums by name, of numbers that a device may still compute too; asked for once, since it waits for the answer."""

    def __init__(self) -> None:
        self._here: dict[str, float] = {}
        self._there: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            value = value.detach().double()
            self._there[name] = self._there[name] + value if name in self._there else value
        else:
            self._here[name] = self._here.get(name, 0.0) + value

    def read(self, processes: Processes, **same: Tensor | None) -> StepMetrics:
        """The sums over all processes, and numbers that are the same in each."""
        names, together = list(self._there), torch.stack(list(self._there.values()))
        if processes.count > 1:
            here = torch.tensor(list(self._here.values()), dtype=torch.float64)
            names, together = names + list(self._here), torch.cat([together, send(here, processes.device)])
            distributed.all_reduce(together)
        more = {name: value.double().view(1) for name, value in same.items() if value is not None}
        answers = torch.cat([together, *more.values()]).cpu().tolist()
        return {**self._here, **dict(zip([*names, *more], answers, strict=True))}


@dataclass(frozen=True)
class Ready:
    """A batch of examples, this process's micro batches of which lie where the student is."""

    examples: list[Example]
    micro_batches: list[tuple[MicroBatch, float]]  # and the weight that each counts with
    count: int  # what the loss is the mean over: the batch's pairs, or its response tokens
    tokens: int  # of its responses


@dataclass
class Run:
    """All that the arithmetic of a step needs."""

    config: TrainConfig
    student: Student
    optimizer: MasterAdamW | ZeroAdamW
    processes: Processes
    corpus: Iterator[list[int]] | None  # blocks of token ids, for the language-modelling loss
    total_steps: int

    def ready(self, examples: list[Example]) -> Ready:
        """What a step takes of a batch. A thread may call it while a step before is computed."""
        objective = objective_of(self.config)
        rows = rows_of(examples, objective)
        tokens = sum(len(y) for _, responses in rows for y in responses)
        groups = [
            (collate(objective, [examples[i] for i in group], self.student), weight)
            for group, weight in self._micro_batches(rows)
        ]
        return Ready(examples, groups, len(rows) if objective.per == "pair" else tokens, tokens)

    def step(self, step: int, ready: Ready, control_flags: Callable[[], StepMetrics] = dict) -> StepMetrics:
        """One optimizer step on a batch, of which each process takes its part, micro batch by micro batch.

        Returns the metrics of the whole batch, and the sums of `control_flags` over the processes, which each asks for
        at the end of its step. Losses are in nats; `grad_norm` is that before clipping. The device is waited for once,
        before the update, which it makes while the next step begins.

        Raises:
            DataError: a loss is not finite.
        """
        started = time.monotonic()
        sums = Sums()
        finite = self._objective(ready, sums, last=self.corpus is None)
        if self.corpus is not None:
            self._language_modelling(list(islice(self.corpus, self.config.lm_batch_size)), sums)
        self.optimizer.sum_gradients()
        for name, flag in control_flags().items():
            sums.add(name, flag)
        norm = self.optimizer.norm()
        metrics = sums.read(self.processes, grad_norm=norm)
        self._check(step, metrics, ready, finite)
        learning_rate = learning_rate_at(step, self.total_steps, self.config)
        metrics["grad_norm"] = self.optimizer.step(learning_rate, norm, metrics.pop("grad_norm", None))
        tokens, padding = metrics.pop("tokens"), metrics.pop("padding")
        seconds = time.monotonic() - started
        return {
            "loss": metrics["loss_kd"]
            + self.config.chosen_nll_weight * metrics.get("loss_nll", 0.0)
            + self.config.lm_weight * metrics.get("loss_lm", 0.0),
            **metrics,
            "learning_rate": learning_rate,
            "tokens_per_s": round(tokens / seconds, 1),
            "pairs_per_s": round(len(ready.examples) / seconds, 2),
            "padding": round(padding / (tokens + padding), 4),
        }

    def _micro_batches(self, rows: list[PromptAndResponses]) -> list[tuple[list[int], float]]:
        most = self.processes.micro_batch_tokens(self.config)
        return self.processes.own_micro_batches(rows, self.student.shares, most)

    def _objective(self, ready: Ready, sums: Sums, last: bool) -> list[Tensor]:
        """Backward through the objective. Returns of each micro batch whether its loss and its log-probs are finite."""
        objective, count, finite = objective_of(self.config), ready.count, []
        anchored = objective.per == "pair" and self.config.chosen_nll_weight > 0
        for n, (micro, weight) in enumerate(ready.micro_batches, 1):
            scored = score_collated(self.student, objective, micro, self.config)
            loss = objective.loss(scored).sum() * (weight / count)
            sums.add("loss_kd", loss)
            if anchored:
                nll = losses.chosen_nll(scored.sums[:, CHOSEN], scored.lengths[:, CHOSEN]).sum() * (weight / count)
                sums.add("loss_nll", nll)
                loss = loss + self.config.chosen_nll_weight * nll
            logps_are = torch.isfinite(scored.logps).all() & torch.isfinite(scored.top_logps).all()
            finite.append(torch.stack([torch.isfinite(loss), logps_are]))
            self.optimizer.backward(loss, last and n == len(ready.micro_batches))
            for name, value in facts_of(scored).items():
                sums.add(name, value * (weight / len(ready.examples)))
            for name, value in word_facts_of(scored).items():
                sums.add(name, value * (weight / ready.tokens))
            sums.add("tokens", micro.batch.tokens * weight)
            sums.add("padding", micro.padding * weight)
        return finite

    def _language_modelling(self, blocks: list[list[int]], sums: Sums) -> None:
        """Backward through λ L_pt, the language-modelling loss on blocks of the pre-training corpus."""
        rows: list[PromptAndResponses] = [(block[:1], [block[1:]]) for block in blocks]
        count = sum(len(block) - 1 for block in blocks)
        groups = self._micro_batches(rows)
        for n, (group, weight) in enumerate(groups, 1):
            batch = pair_batch([rows[i] for i in group], self.student.shares).to(self.student.device)
            logps, _ = self.student(batch, batch.targets[:, None])
            loss = losses.lm_loss(logps) * (logps.numel() / count * weight)
            sums.add("loss_lm", loss)
            self.optimizer.backward(loss * self.config.lm_weight, n == len(groups))

    def _check(self, step: int, metrics: StepMetrics, ready: Ready, finite: list[Tensor]) -> None:
        """Raise a DataError where a loss is not finite; in the process that has it, for which the others wait."""
        if not math.isfinite(metrics["loss_kd"] + metrics.get("loss_nll", 0.0)):
            for (micro, _), (loss_is, logps_are) in zip(ready.micro_batches, torch.stack(finite).tolist(), strict=True):
                if not loss_is:
                    raise DataError(self._not_finite(step, logps_are, ", ".join(e.id for e in micro.examples)))
            self.processes.wait()
        if not math.isfinite(metrics.get("loss_lm", 0.0)):
            raise DataError(self._not_finite(step, False, "blocks of lm-corpus"))

    def _not_finite(self, step: int, logps_are_finite: bool, where: str) -> str:
        """Whose numbers they are. The stored ones were checked, with file, row and column, before the first step."""
        if logps_are_finite:
            why = f"the loss is not finite on {where}, although all log-probs are; take a smaller --beta or --tau"
        else:
            why = student_fault(self.student, self.config, step, where)
        return f"{why}; the last checkpoint is untouched"
