"""Rounds: how far the student has moved from the one that sampled y_s, and when it is to answer anew.

The trainer waits for a round at a defined step: it leaves a checkpoint and the student as it is then, and ends. When
the same command finds the round's pairs, sampled by that very student, it goes on with them. So every replay changes
rounds at the same step, however long a round took to make.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, MismatchError
from dpkd_offline.common.files import find_json, write_json
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.batch import micro_batches
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training import metrics_log
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_source
from dpkd_offline.training.objectives import OBJECTIVES, Y_S, StepMetrics, objective_of, rows_of, score
from dpkd_offline.training.stream import Example, Stream
from dpkd_offline.training.student import Student

DRIFT_EVERY = 20  # steps, where nobody says
CHUNK = 64  # examples in memory at once
READS_Y_S = replace(OBJECTIVES["seqkd"], sides=Y_S)


@torch.no_grad()
def drift_of(student: Student, examples: Iterable[Example], config: TrainConfig, processes: Processes) -> StepMetrics:
    """How far the student q is from b, the one that sampled y_s, judged by those y_s.

    Returns, with d = log b(y_s|x) - log q(y_s|x) of a whole response, in nats:
        drift_kl: mean d, an estimate of KL(b‖q) without bias if b sampled at temperature 1.
        drift_kl_error: its standard error.
        drift_kl_token: sum of d over the sum of |y_s|.
        drift_ess: effective sample size of the y_s as if q had sampled them, (Σw)²/Σw² with w = exp(-d), as a share of
            their number: 1 where q is b, 1/n where one of n responses outweighs all others.
        drift_responses: how many.
    """
    sums: StepMetrics = defaultdict(float)
    coming = iter(examples)
    while chunk := list(islice(coming, CHUNK)):
        groups = micro_batches(rows_of(chunk, READS_Y_S), student.shares, config.micro_batch_tokens, processes.count)
        for group in groups[processes.rank :: processes.count]:
            # Where there are fewer examples than processes, one that counts nothing: wrapped models call each other.
            scored = score(student, READS_Y_S, [chunk[i] for i in group or [0]], config)
            d = (scored.behavior_sums - scored.sums[:, 0]).double() * bool(group)
            weights = torch.exp(-d) * bool(group)
            for name, values in (("d", d), ("dd", d**2), ("w", weights), ("ww", weights**2)):
                sums[name] += float(values.sum())
            sums["tokens"] += float(scored.lengths.sum()) * bool(group)
            sums["n"] += len(group)
    sums = processes.sum(sums)
    n = sums["n"]
    mean = sums["d"] / n
    return {
        "drift_kl": mean,
        "drift_kl_error": math.sqrt(max(sums["dd"] / n - mean**2, 0.0) / max(n - 1, 1)),
        "drift_kl_token": sums["d"] / sums["tokens"],
        "drift_ess": sums["w"] ** 2 / sums["ww"] / n,
        "drift_responses": n,
    }


class Rounds:
    """What training does with rounds of the student's responses: nothing, where none are asked for."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        stream: Stream,
        student: Student,
        processes: Processes,
        first: int | None,
        total_steps: int,
        switches: list[int],
    ) -> None:
        """`first` is the round that the stream began with, `switches` the steps of those that came after it.

        Raises:
            DataError, Interrupted, MismatchError: a round that was in use is not there any more, or not the same.
        """
        self._config, self._dataset, self._stream = config, dataset, stream
        self._student, self._processes = student, processes
        self._first, self._total = first or 0, total_steps
        self._folder = config.due.parent
        of_epoch = math.ceil(len(stream) / config.batch_size)
        self._every = config.regenerate_every or of_epoch * (config.regenerate_epochs or 0)
        self._measure_every = config.drift_every or (DRIFT_EVERY if config.regenerates else 0)
        self.switches = switches
        self._taken = 0

    def go_on(self, step: int) -> None:
        """Take the rounds that began before a step."""
        for began in self.switches:
            if began < step:
                self._take(began)

    def after(
        self,
        step: int,
        metrics: metrics_log.MetricsFile,
        save: Callable[[Path, int], None],
        checkpoint: Callable[[int], None],
    ) -> bool:
        """Measure the drift after `step` steps, and begin the next round, if it is time. Returns whether one began.

        `save` writes the student into a folder, `checkpoint` the state of the run; all processes call them.

        Raises:
            DataError: the round's pairs cannot be used.
            Interrupted: it is not there yet.
            MismatchError: it is of another student than the one that waits for it.
        """
        if not self._measure_every:
            return False
        decided = self._taken < len(self.switches)  # by a process before this one
        may = self._config.regenerates and len(self.switches) < self._config.regenerate_rounds
        by_step = may and self._every and 0 < step < self._total and step % self._every == 0
        if not (decided or by_step or step % self._measure_every == 0 or step == self._total):
            return False
        drift = self._measure(step, metrics)
        above = self._config.regenerate_above
        by_drift = may and above is not None and 0 < step < self._total and drift["drift_kl_token"] > above
        if not (decided or by_step or by_drift):
            return False
        if not decided:
            self.switches.append(step)
            self._keep_student(step, save)
            checkpoint(step)
        self._take(step)
        self._measure(step, metrics)
        return True

    def _measure(self, step: int, metrics: metrics_log.MetricsFile) -> StepMetrics:
        facts = drift_of(self._student, self._stream.drift_examples(), self._config, self._processes)
        round = self._first + self._taken
        metrics.write(step=step, drift_round=round, **facts)
        console.info(
            f"drift after step {step}: round {round} is {facts['drift_kl_token']:.4f} nats a token away, "
            f"{facts['drift_kl']:.3f} ± {facts['drift_kl_error']:.3f} a response, effective sample size "
            f"{facts['drift_ess']:.0%}"
        )
        return facts

    def _keep_student(self, step: int, save: Callable[[Path, int], None]) -> None:
        """Write the student that is to answer, unless a process before this one did."""
        round = self._first + len(self.switches)
        folder = self._folder / f"round-{round:03d}"
        said = {"round": round, "step": step, "student": folder.name}
        whole = self._processes.first and find_json(folder / "round.json") == said
        if not self._processes.sum({"whole": float(whole)})["whole"]:
            save(folder, step)
            if self._processes.first:
                write_json(folder / "round.json", said)
        if self._processes.first:
            write_json(self._config.due, said)

    def _take(self, step: int) -> None:
        """Read pairs from the next round from here on; all processes do, or none."""
        round = self._first + self._taken + 1
        folder = self._folder / f"round-{round:03d}"
        table = self._dataset.pairs(round)
        there = table.provenance() is not None and not table.pending()
        if self._processes.sum({"there": float(there)})["there"] < self._processes.count:
            name = f" --student-name {self._dataset.student}" if self._dataset.student else ""
            raise Interrupted(
                f"round {round} is due after step {step}: let {folder} answer the prompts (generate --role student "
                f"--round {round}{name}), have it scored (score-teacher --round {round}{name}), and repeat this command"
            )
        made, student = table.require_provenance(), ModelInfo(str(folder)).identity
        if made["student"]["revision"] != student["revision"]:
            raise MismatchError(
                f"{table.folder / '_table.json'}: the student of round {round} is {made['student']['revision'][:19]}, "
                f"the one that waits for it, {folder}, is {student['revision'][:19]}"
            )
        reads, known = objective_of(self._config), self._student.vocab_size
        self._stream.add_round(pair_source(self._dataset, self._config, round, known, reads.top_k, reads.behavior))
        self._taken += 1
        if self._processes.first:
            self._config.due.unlink(missing_ok=True)
        console.info(f"round {round} of the student's responses from step {step} on")
