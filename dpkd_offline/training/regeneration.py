"""Rounds: how far the student has moved from the one that sampled y_s, and when it is to answer anew.

The trainer waits for a round at a defined step: it leaves a checkpoint and the student as it is then, and ends. When
the same command finds the round's pairs, sampled by that very student, it goes on with them. So every replay changes
rounds at the same step, however long the making of a round took.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, MismatchError
from dpkd_offline.common.files import find_json, write_json
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_source
from dpkd_offline.training.health import Health
from dpkd_offline.training.metrics_log import MetricsFile
from dpkd_offline.training.objectives import OBJECTIVES, Y_S, StepMetrics, objective_of, rows_of, score
from dpkd_offline.training.stream import Example, Stream
from dpkd_offline.training.student import Student

DRIFT_EVERY = 20  # steps, by default
CHUNK = 64  # examples in memory at once
READS_Y_S = replace(OBJECTIVES["seqkd"], sides=Y_S)


@torch.no_grad()
def measure_drift(
    student: Student, examples: Iterable[Example], config: TrainConfig, processes: Processes
) -> StepMetrics:
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
    remaining = iter(examples)
    while chunk := list(islice(remaining, CHUNK)):
        rows = rows_of(chunk, READS_Y_S)
        for group, weight in processes.own_micro_batches(rows, student.shares, processes.micro_batch_tokens(config)):
            scored = score(student, READS_Y_S, [chunk[i] for i in group], config)
            d = (scored.behavior_sums - scored.sums[:, 0]).double() * weight
            weights = torch.exp(-d) * weight
            for name, values in (("d", d), ("dd", d**2), ("w", weights), ("ww", weights**2)):
                sums[name] += float(values.sum())
            sums["tokens"] += float(scored.lengths.sum()) * weight
            sums["n"] += len(group) * weight
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


@dataclass
class Rounds:
    """Measures the drift every so many steps, and begins rounds of new responses; where none are asked for, nothing."""

    config: TrainConfig
    dataset: Dataset
    stream: Stream
    student: Student
    processes: Processes
    health: Health
    first: int  # the round that the stream began with
    total_steps: int
    switches: list[int]  # after how many steps each round after the first began, or is to begin
    in_use: int = 0  # how many of these rounds the stream has

    @property
    def every(self) -> int:
        """Steps between rounds; 0 where steps do not decide."""
        of_epochs = self.stream.batches_per_epoch(self.config.batch_size) * (self.config.regenerate_epochs or 0)
        return self.config.regenerate_every or of_epochs

    @property
    def measure_every(self) -> int:
        """Steps between measures of the drift; 0 where it is not measured."""
        return self.config.drift_every or (DRIFT_EVERY if self.config.regenerates else 0)

    def catch_up(self, step: int) -> None:
        """Take the rounds that began before a step.

        Raises:
            DataError, Interrupted, MismatchError: a round that was in use is not there any more, or not the same.
        """
        for switch in self.switches:
            if switch < step:
                self._take(switch)

    def after(
        self,
        step: int,
        metrics_file: MetricsFile,
        save_student: Callable[[Path, int], None],
        save_checkpoint: Callable[[int], None],
    ) -> bool:
        """Measure the drift after `step` steps, and begin the next round, if it is time. Returns whether one began.

        `save_student` writes it into a folder, `save_checkpoint` the state of the run; all processes call them.

        Raises:
            DataError: the round's pairs cannot be used.
            Interrupted: it is not there yet.
            MismatchError: it is of another student than the one that waits for it.
        """
        if not self.measure_every:
            return False
        decided = self.in_use < len(self.switches)  # before this process began
        may_begin = self.config.regenerates and len(self.switches) < self.config.regenerate_rounds
        may_begin = may_begin and 0 < step < self.total_steps
        is_time = may_begin and self.every > 0 and step % self.every == 0
        if not (decided or is_time or step % self.measure_every == 0 or step == self.total_steps):
            return False
        drift, above = self._measure(step, metrics_file), self.config.regenerate_above
        is_far = may_begin and above is not None and drift["drift_kl_token"] > above
        if not (decided or is_time or is_far):
            return False
        if not decided:
            self.switches.append(step)
            self._keep_student(step, save_student)
            save_checkpoint(step)
        self._take(step)
        self._measure(step, metrics_file)
        return True

    def _measure(self, step: int, metrics_file: MetricsFile) -> StepMetrics:
        drift = measure_drift(self.student, self.stream.drift_examples(), self.config, self.processes)
        round = self.first + self.in_use
        metrics_file.write(step=step, drift_round=round, **drift)
        findings = self.health.read({"step": step, **drift})
        console.info(
            f"drift after step {step}: round {round} is {drift['drift_kl_token']:.4f} nats a token away, "
            f"{drift['drift_kl']:.3f} ± {drift['drift_kl_error']:.3f} a response, effective sample size "
            f"{drift['drift_ess']:.0%}"
        )
        for finding in findings:
            console.info(f"warning: {finding}")
        return drift

    def _student_folder(self, round: int) -> Path:
        """Where the student lies that answers the prompts of a round."""
        return self.config.due.parent / f"round-{round:03d}"

    def _keep_student(self, step: int, save_student: Callable[[Path, int], None]) -> None:
        """Write the student that is to answer, unless an earlier process did, and which round is due."""
        round = self.first + len(self.switches)
        folder = self._student_folder(round)
        due = {"round": round, "step": step, "student": folder.name}
        is_kept = self.processes.first and find_json(folder / "round.json") == due
        if not self.processes.sum({"is_kept": float(is_kept)})["is_kept"]:
            save_student(folder, step)
            if self.processes.first:
                write_json(folder / "round.json", due)
        if self.processes.first:
            write_json(self.config.due, due)

    def _take(self, step: int) -> None:
        """Read pairs from the next round from here on; all processes do, or none."""
        round = self.first + self.in_use + 1
        self._require_round(round, step)
        reads, vocab_size = objective_of(self.config), self.student.vocab_size
        self.stream.add_round(pair_source(self.dataset, self.config, round, vocab_size, reads.top_k, reads.behavior))
        self.in_use += 1
        if self.processes.first:
            self.config.due.unlink(missing_ok=True)
        console.info(f"round {round} of the student's responses from step {step} on")

    def _require_round(self, round: int, step: int) -> None:
        """Raise Interrupted where the pairs of a round are not complete, and MismatchError where they are of another
        student."""
        folder, table = self._student_folder(round), self.dataset.pairs(round)
        is_complete = table.provenance() is not None and not table.pending()
        if self.processes.sum({"is_complete": float(is_complete)})["is_complete"] < self.processes.count:
            name = f" --student-name {self.dataset.student}" if self.dataset.student else ""
            raise Interrupted(
                f"round {round} is due after step {step}: let {folder} answer the prompts (generate --role student "
                f"--round {round}{name}), have it scored (score-teacher --round {round}{name}), and repeat this command"
            )
        sampler, waiting = table.require_provenance()["student"], ModelInfo(str(folder)).identity
        if sampler["revision"] != waiting["revision"]:
            raise MismatchError(
                f"{table.folder / '_table.json'}: the student of round {round} is {sampler['revision'][:19]}, "
                f"the one that waits for it, {folder}, is {waiting['revision'][:19]}"
            )
