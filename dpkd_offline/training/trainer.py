"""`train`: optimize the student on precomputed pairs. Nothing here can load a teacher.

It reads downward: the set-up, and the main loop (`Loop`). The arithmetic of a step is in `step.py`.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dpkd_offline.common import console
from dpkd_offline.common.errors import Interrupted, StudentRuined
from dpkd_offline.common.files import find_model, read_model, write_json
from dpkd_offline.common.ownership import OutputFolder, output_folder
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict, write_yaml
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.loading import save_student
from dpkd_offline.training.checkpoint import (
    Position,
    Saving,
    copied_to_host,
    copies_fit,
    load_state,
    own_parts,
    restore_random,
    run_of_states,
    save_state,
)
from dpkd_offline.training.deepspeed import ZeroAdamW
from dpkd_offline.training.distributed import Processes, collected_signals
from dpkd_offline.training.export import Best, student_card
from dpkd_offline.training.health import Health
from dpkd_offline.training.memory import Choices, RunMemory, device_memory
from dpkd_offline.training.metrics_log import MetricsFile, trackers
from dpkd_offline.training.objectives import PAIR, StepMetrics, objective_of
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.preflight import RunInputs, corpus_of, preflight
from dpkd_offline.training.record import TrainingRecord, read_metrics
from dpkd_offline.training.regeneration import Rounds
from dpkd_offline.training.speed import Meter
from dpkd_offline.training.step import Ready, Run
from dpkd_offline.training.stream import prefetch
from dpkd_offline.training.student import load_student
from dpkd_offline.training.validation import Validation

# In the output folder.
RECORD, METRICS, CHECKPOINTS = "training.json", "metrics.jsonl", "checkpoints"
KIND = "trained student"  # is what it is
# Of a step's metrics, on the console.
SHOWN = ("loss", "reverse_kl", "reward_chosen", "reward_rejected", "margin", "accuracy")


@dataclass(frozen=True)
class TrainResult(Result):
    """A trained student: `path` is its folder, a Hugging Face model."""

    steps: int  # that were taken
    loss: float | None  # of the last step, in nats
    best: dict[str, Any] | None  # the best validation: `step`, numbers `val_…`, and `by`, the one that decides


def train(config: TrainConfig) -> TrainResult:
    """Train the student; returns its folder, a Hugging Face model, with what the run came to.

    The order of the pairs is a function of the seed, so that a run that was killed goes on from its last checkpoint
    to the same weights. A finished run is left as it is.

    Raises:
        DataError: the dataset is incomplete or damaged, or what a run has left.
        Interrupted: by a signal, after a checkpoint at the end of the step; or a round of responses is due.
        MismatchError: the student has another tokenizer, or the output folder belongs to another run.
        OutputBusy: another command writes it now.
        StorageError: the disk is full or fails; the last checkpoint is untouched.
        StudentRuined: with `stop_when_ruined`; the folder holds the best student, and a repeated call raises it again.
        UnavailableError: the student cannot be loaded.
        UsageError: the output folder holds something else.
    """
    with Processes() as processes, _owned_output(config, processes) as output:
        inputs = preflight(config)
        if output is not None:
            _claim(output, config, inputs)
        if _is_done(config, inputs):
            # A run that was killed may have left them.
            shutil.rmtree(config.output / CHECKPOINTS, ignore_errors=True)
        else:
            _train(config, inputs, processes)
    record = read_model(config.output / RECORD, TrainingRecord)
    if record.ruined:
        raise StudentRuined(record.ruined if processes.first else "")  # one process says it
    return _result(config, record)


def _owned_output(config: TrainConfig, processes: Processes) -> AbstractContextManager[OutputFolder | None]:
    """The output folder, which the first process of a run keeps for all of them."""
    if not processes.first:
        return nullcontext()
    return output_folder(config.output, KIND, "train", known=(RECORD, CHECKPOINTS))


def _claim(output: OutputFolder, config: TrainConfig, inputs: RunInputs) -> None:
    """Claim the output folder for this run, and remove what another one left there that does not count."""

    def known() -> str | None:
        record = find_model(config.output / RECORD, TrainingRecord)
        return record.run if record else run_of_states(config.output / CHECKPOINTS)

    begun = any((config.output / name).exists() for name in (RECORD, CHECKPOINTS))
    output.claim(inputs.run_id, known=known, begun=begun, afresh=not config.resume)


def _train(config: TrainConfig, inputs: RunInputs, processes: Processes) -> None:
    """Set up what the steps need, take them, and write the student."""
    memory = RunMemory(config, processes, device_memory(processes.device))
    with memory.explained():
        _take_all_steps(config, inputs, processes, memory)


def _take_all_steps(config: TrainConfig, inputs: RunInputs, processes: Processes, memory: RunMemory) -> None:
    run, position = set_up(config, inputs, processes, memory)
    start = position.step
    if processes.first:
        if not config.resume:
            (config.output / RECORD).unlink(missing_ok=True)
            shutil.rmtree(config.output / CHECKPOINTS, ignore_errors=True)
        write_yaml(config.output / "train.yaml", {"train": redacted_dict(config)})
    objective = objective_of(config)
    best = Best.open(config.output, inputs.run_id, config.resume, processes)
    health = Health(objective.sides == PAIR and not objective.measures, objective.measures)
    validation = Validation(
        run.config,
        inputs.held_out,
        run.student,
        inputs.student,
        processes,
        best,
        health,
        every=config.validate_every or inputs.stream.batches_per_epoch(config.batch_size),
        total_steps=run.total_steps,
    )
    validation.begin()
    rounds = Rounds(
        inputs.reading.model_copy(update=memory.choices),
        inputs.dataset,
        inputs.stream,
        run.student,
        processes,
        health,
        first=inputs.provenance["round"] or 0,
        total_steps=run.total_steps,
        switches=position.switches,
    )
    meter = Meter(run.config, run.student, processes)
    metrics_path = config.output / METRICS if processes.first else None
    with (
        trackers(config, inputs.run_id, start, processes.first) as tracked,
        MetricsFile(metrics_path, start, tracked) as metrics_file,
        console.progress(f"train ({config.objective})", run.total_steps, "step", start) as bar,
        collected_signals() as signals,
    ):
        loop = Loop(run, inputs, best, health, validation, rounds, metrics_file, bar, signals, memory.choices, meter)
        with closing(loop):
            steps, ruined = loop.take_steps(start)
            loop.finish(steps, ruined and config.stop_when_ruined)


def set_up(config: TrainConfig, inputs: RunInputs, processes: Processes, memory: RunMemory) -> tuple[Run, Position]:
    """The model and its optimizer, at the last checkpoint if there is one, and where that is."""
    torch.manual_seed(config.seed)
    total, dtype = inputs.total_steps(config), getattr(torch, config.precision)
    state = load_state(config.output / CHECKPOINTS, inputs.run_id, processes) if config.resume else None
    position, stored = state or (Position(0), None)
    memory.choose(position.choices)
    config = memory.config
    memory.student = student = load_student(config, processes, total)
    if config.compile is None:
        memory.choose({"compile": bool(student.compiled)})
    optimizer: MasterAdamW | ZeroAdamW
    if processes.zero:
        optimizer = ZeroAdamW(student, dtype, config, stored)
    else:
        optimizer = MasterAdamW(student, dtype, config, processes)
        if stored is not None:
            optimizer.restore(stored)
    if stored is not None:
        restore_random(stored)
        console.info(f"going on after step {position.step} of {total}")
    corpus = None
    if config.lm_corpus is not None:
        corpus = islice(corpus_of(config, inputs.student), position.step * config.lm_batch_size, None)
    if isinstance(optimizer, MasterAdamW):
        config = memory.settle(student, optimizer)
    return Run(config, student, optimizer, processes, corpus, total), position


@dataclass
class Loop:
    """The main loop of a run: its steps, and before each a validation or a new round of pairs, if it is time."""

    run: Run
    inputs: RunInputs
    best: Best
    health: Health
    validation: Validation
    rounds: Rounds
    metrics_file: MetricsFile
    bar: console.Progress
    signals: Sequence[signal.Signals]  # those that asked this process to end
    choices: Choices  # of settings that the config leaves to the device
    meter: Meter
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was made, in seconds
    saving: Saving | None = None  # the checkpoint that a thread writes

    def take_steps(self, start: int) -> tuple[int, bool]:
        """Train the student that has done `start` steps; returns how many it has done in the end, and whether it is
        ruined then."""
        total = self.run.total_steps
        for line in self.metrics_file.kept:
            self.health.read(line)
        self.rounds.catch_up(start)
        batches = self._batches(start)
        for step in range(start, total):
            ruined = self.validation.after(step, self.metrics_file, self.save_student)
            if ruined and self.run.config.stop_when_ruined:
                return step, True
            if self.rounds.after(step, self.metrics_file, self.save_student, self.save_checkpoint):
                batches = self._batches(step)
            self._take_step(step, next(batches))
        # A signal in the last step stops nothing: the student is written, or steps would have to be taken again.
        ruined = self.validation.after(total, self.metrics_file, self.save_student)
        self.rounds.after(total, self.metrics_file, self.save_student, self.save_checkpoint)
        return total, ruined

    def _batches(self, start: int) -> Iterator[Ready]:
        """Each is read, laid out and sent to the device while the step before is taken."""
        batches = self.inputs.stream.batches(self.run.config.batch_size, start)
        return self.meter.waited_for(prefetch(map(self.run.ready, batches)))

    def _take_step(self, step: int, ready: Ready) -> None:
        """One step with its line of metrics, and a checkpoint where one is due.

        Raises:
            Interrupted: a process was asked to end; the checkpoint is written.
        """
        started = time.monotonic()
        metrics, config = self.run.step(step, ready, self.control_flags), self.run.config
        metrics |= self.meter.of_step(ready.examples, time.monotonic() - started)
        stop, is_old, written = (metrics.pop(flag) for flag in ("stop", "save", "written"))
        done = step + 1
        self.metrics_file.write(step=done, **metrics)
        for finding in self.health.read({"step": done, **metrics}):
            console.info(f"warning: {finding}")
        self.bar.advance(1, {name: f"{metrics[name]:.4g}" for name in SHOWN if name in metrics})
        if written == self.run.processes.count:
            self.commit_saving()
        due = stop or is_old or (config.save_every and done % config.save_every == 0)
        if done == self.run.total_steps or not due:
            return
        self.save_checkpoint(done, background=not stop)
        if stop:
            name = self.signals[0].name if self.signals else "a signal to another process"
            again = "the same command" if config.resume else "the same command without --no-resume"
            raise Interrupted(f"stopped by {name} after step {done}; {again} goes on")

    def control_flags(self) -> StepMetrics:
        """What this process asks for. All of them act on the sums, at the same step."""
        age = time.monotonic() - self.saved_at
        is_old = self.run.processes.first and age > 60 * self.run.config.save_minutes
        is_written = self.saving is not None and self.saving.is_written()
        return {"stop": float(bool(self.signals)), "save": float(is_old), "written": float(is_written)}

    def save_checkpoint(self, steps: int, background: bool = False) -> None:
        """Commit the state of the run after so many steps; all processes call it.

        In the background a thread writes a copy, where the machine has room for one, and a later step commits it.
        """
        self.commit_saving()  # the one before
        processes, position = self.run.processes, Position(steps, self.rounds.switches, self.choices)
        folder, run_id = self.run.config.output / CHECKPOINTS, self.inputs.run_id
        if processes.first:
            self.metrics_file.sync()
        parts = own_parts(self.run.optimizer.tensors(), processes.rank, processes.count)
        if background and copies_fit(parts, processes):
            self.saving = Saving(folder, position, run_id, copied_to_host(parts), processes, background=True)
        else:
            save_state(folder, position, run_id, parts, processes)
            processes.wait()
        self.saved_at = time.monotonic()

    def commit_saving(self) -> None:
        """Commit what a thread writes, as soon as it is written; all processes call it."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.commit()

    def close(self) -> None:
        """Wait for the thread: nobody writes into the output folder of a run that has ended."""
        if self.saving is not None:
            self.saving.wait()

    def save_student(self, folder: Path, steps: int) -> None:
        """Write the student as it is after so many steps; all processes call it."""
        config, inputs = self.run.config, self.inputs
        model, weights = self.run.student.to_save(config, self.run.processes)  # by all of them
        if self.run.processes.first:
            card = student_card(config, inputs.provenance, inputs.dataset, steps, self.best.record)
            save_student(model, inputs.tokenizer, folder, card, weights)

    def finish(self, steps: int, stopped: bool) -> None:
        """Write the student, or where a run was stopped the best one, and then what says that the run is done."""
        config, processes = self.run.config, self.run.processes
        self.commit_saving()
        if not stopped:
            self.save_student(config.output, steps)
        if processes.first:
            if stopped:
                self.best.publish()
            warnings = [{"step": finding.step, "warning": finding.sentence} for finding in self.health.findings]
            record = {
                "run": self.inputs.run_id,
                "steps": steps,
                "best": self.best.record or None,
                "chosen": self.choices,
                "ruined": self._why_stopped(steps) if stopped else None,
                "warnings": warnings,
                **self.inputs.provenance,
            }
            if self.rounds.switches:
                record["rounds"] = self.rounds.switches
            write_json(config.output / RECORD, record)
            shutil.rmtree(config.output / CHECKPOINTS, ignore_errors=True)
        processes.wait()

    def _why_stopped(self, steps: int) -> str:
        """Why a run was stopped, and what it leaves."""
        why = next(finding.sentence for finding in reversed(self.health.findings) if finding.ruined)
        best = self.best.record
        return (
            f"stopped after step {steps} of {self.run.total_steps}: {why}; {self.run.config.output} holds the best "
            f"student by {best['by']}, that after step {best['step']}"
        )


def _is_done(config: TrainConfig, inputs: RunInputs) -> bool:
    """Whether the output folder holds the student of this run."""
    record = find_model(config.output / RECORD, TrainingRecord) if config.resume else None
    if record is None or record.run != inputs.run_id:
        return False  # in the latter case the first process refuses it
    console.info(f"{config.output}: trained already")
    return True


def _result(config: TrainConfig, record: TrainingRecord) -> TrainResult:
    lines = [line for line in read_metrics(config.output / METRICS) if "loss" in line]
    return TrainResult(
        config.output,
        steps=record.steps,
        loss=lines[-1]["loss"] if lines else None,
        best=record.best,
        warnings=tuple(f"step {warning.step}: {warning.warning}" for warning in record.warnings),
    )
