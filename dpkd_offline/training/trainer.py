"""`train`: optimise the student on precomputed pairs. Nothing here can load a teacher."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, Interrupted, MismatchError, StudentRuined
from dpkd_offline.common.files import read_json, write_json
from dpkd_offline.config.base import redacted_dict, write_yaml
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN
from dpkd_offline.models.batch import PromptAndResponses, micro_batches, pair_batch
from dpkd_offline.models.loading import save_student
from dpkd_offline.training import losses, metrics_log
from dpkd_offline.training.checkpoint import Position, load_state, restore_random, save_state
from dpkd_offline.training.deepspeed import ZeroAdamW
from dpkd_offline.training.distributed import Processes, signals_kept
from dpkd_offline.training.export import Best, student_card
from dpkd_offline.training.health import Health
from dpkd_offline.training.metrics_log import trackers
from dpkd_offline.training.objectives import PAIR, StepMetrics, facts_of, objective_of, rows_of, score, word_facts_of
from dpkd_offline.training.optimizer import MasterAdamW, learning_rate_at
from dpkd_offline.training.preflight import RunInputs, corpus_of, preflight
from dpkd_offline.training.regeneration import Rounds
from dpkd_offline.training.stream import Example, prefetch
from dpkd_offline.training.student import Student, load_student
from dpkd_offline.training.validation import Validation

# Of a step's facts, on the console.
SHOWN = ("loss", "reverse_kl", "reward_chosen", "reward_rejected", "margin", "accuracy")


@dataclass
class Run:
    """All that a step needs."""

    config: TrainConfig
    student: Student
    optimiser: MasterAdamW | ZeroAdamW
    processes: Processes
    corpus: Iterator[list[int]] | None
    total_steps: int

    def step(self, step: int, examples: list[Example], wishes: Callable[[], StepMetrics] = dict) -> StepMetrics:
        """One optimiser step on a batch, of which each process takes its part, micro batch by micro batch.

        What is returned is of the whole batch; of `wishes`, asked at the end of the step, it has the sums.
        """
        started = time.monotonic()
        sums = self._objective(examples, last=self.corpus is None)
        if self.corpus is not None:
            sums |= self._language_modelling(list(islice(self.corpus, self.config.lm_batch_size)))
        self.processes.sum_gradients(self.optimiser.gradients())
        learning_rate = learning_rate_at(step, self.total_steps, self.config)
        grad_norm = self.optimiser.step(learning_rate)
        facts = self.processes.sum({**sums, **wishes()})
        tokens, padding = facts.pop("tokens"), facts.pop("padding")
        seconds = time.monotonic() - started
        return {
            "loss": facts["loss_kd"]
            + self.config.chosen_nll_weight * facts.get("loss_nll", 0.0)
            + self.config.lm_weight * facts.get("loss_lm", 0.0),
            **facts,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_per_s": round(tokens / seconds, 1),
            "pairs_per_s": round(len(examples) / seconds, 2),
            "padding": round(padding / (tokens + padding), 4),
        }

    def _parts(self, rows: list[PromptAndResponses]) -> list[list[int]]:
        """The micro batches of this process; all processes have as many."""
        groups = micro_batches(rows, self.student.shares, self.config.micro_batch_tokens, self.processes.count)
        return groups[self.processes.rank :: self.processes.count]

    def _objective(self, examples: list[Example], last: bool) -> StepMetrics:
        """Backward through the objective; what is reported, as this process's part of sums over the batch."""
        objective = objective_of(self.config)
        rows = rows_of(examples, objective)
        read = len(rows) if objective.per == "pair" else sum(len(y) for _, responses in rows for y in responses)
        anchored = objective.per == "pair" and self.config.chosen_nll_weight > 0
        sums: StepMetrics = defaultdict(float)
        parts = self._parts(rows)
        for n, group in enumerate(parts, 1):
            # Where there are fewer examples than processes, one that counts nothing: wrapped models call each other.
            part = [examples[i] for i in group or [0]]
            weight = 1.0 if group else 0.0
            scored = score(self.student, objective, part, self.config)
            loss = objective.loss(scored).sum() * (weight / read)
            sums["loss_kd"] += loss.item()
            if anchored:
                nll = losses.chosen_nll(scored.sums[:, CHOSEN], scored.lengths[:, CHOSEN]).sum() * (weight / read)
                sums["loss_nll"] += nll.item()
                loss = loss + self.config.chosen_nll_weight * nll
            self._backward(loss, part, last and n == len(parts))
            for name, value in facts_of(scored).items():
                sums[name] += value * weight / len(examples)
            for name, value in word_facts_of(scored).items():
                sums[name] += value * weight / read
            sums["tokens"] += scored.batch.tokens * weight
            sums["padding"] += (scored.batch.input_ids.numel() - scored.batch.tokens) * weight
        return sums

    def _language_modelling(self, blocks: list[list[int]]) -> StepMetrics:
        """Backward through λ L_pt, the language-modelling loss on blocks of the pre-training corpus."""
        rows: list[PromptAndResponses] = [(block[:1], [block[1:]]) for block in blocks]
        read = sum(len(block) - 1 for block in blocks)
        total = 0.0
        parts = self._parts(rows)
        for n, group in enumerate(parts, 1):
            batch = pair_batch([rows[i] for i in group or [0]], self.student.shares).to(self.student.device)
            logps, _ = self.student(batch, batch.targets[:, None])
            loss = losses.lm_loss(logps) * (logps.numel() / read if group else 0.0)
            total += loss.item()
            self._backward(loss * self.config.lm_weight, [], n == len(parts))
        return {"loss_lm": total}

    def _backward(self, loss: Tensor, examples: Sequence[Example], last: bool) -> None:
        if not torch.isfinite(loss):
            ids = ", ".join(e.id for e in examples) or "blocks of lm-corpus"
            raise DataError(f"the loss is not finite on {ids}; the last checkpoint is untouched")
        self.optimiser.backward(loss, last)


def train(config: TrainConfig) -> Path:
    """Train the student; returns its folder, a Hugging Face model.

    The order of the pairs is a function of the seed, so that a run that was killed goes on from its last checkpoint
    to the same weights. A finished run is left as it is.

    Raises:
        DataError: the dataset is incomplete or damaged.
        Interrupted: by a signal, after a checkpoint at the end of the step.
        MismatchError: the student has another tokenizer, or the output folder belongs to another run.
        StorageError: the disk is full or fails; the last checkpoint is untouched.
        StudentRuined: with `stop_when_ruined`; the folder holds the best student, and a repeated call raises it again.
        UnavailableError: the student cannot be loaded.
    """
    with Processes() as processes:
        _train(config, processes)
    if ruined := read_json(config.output / "training.json").get("ruined"):
        raise StudentRuined(ruined if processes.first else "")  # said once
    return config.output


def _train(config: TrainConfig, processes: Processes) -> None:
    given = preflight(config)
    done = config.output / "training.json"
    checkpoints = config.output / "checkpoints"
    if _is_done(config, given):
        shutil.rmtree(checkpoints, ignore_errors=True)  # a run that was killed may have left them
        return

    run, position = set_up(config, given, processes)
    start = position.step
    if processes.first:
        if not config.resume:
            done.unlink(missing_ok=True)
            shutil.rmtree(checkpoints, ignore_errors=True)
        write_yaml(config.output / "train.yaml", {"train": redacted_dict(config)})
    best = Best(config.output, given.run_id, config.resume, processes)
    total = run.total_steps
    health = Health(objective_of(config).sides == PAIR, objective_of(config).measures)
    validation = Validation(config, given.held_out, run.student, given.student, processes, total, best, health)
    first = given.made["round"]
    rounds = Rounds(config, given.dataset, given.stream, run.student, processes, first, total, position.switches)

    def save(folder: Path, steps: int) -> None:
        model, weights = run.student.finished(config, processes)  # by all of them
        if processes.first:
            card = student_card(config, given.made, given.dataset, steps, best.facts)
            save_student(model, given.tokenizer, folder, card, weights)

    saved = time.monotonic()
    with (
        trackers(config, given.run_id, start, processes.first) as tracked,
        metrics_log.MetricsFile(
            config.output / "metrics.jsonl" if processes.first else None, start, tracked
        ) as metrics,
        console.progress(f"train ({config.objective})", run.total_steps, "step", start) as shown,
        signals_kept() as signals,
    ):

        def wishes() -> StepMetrics:
            """Of this process; all of them act on the sums, at the same step."""
            old = processes.first and time.monotonic() - saved > 60 * config.save_minutes
            return {"stop": float(bool(signals)), "save": float(old)}

        def checkpoint(steps: int) -> None:
            nonlocal saved
            tensors = processes.whole(run.optimiser.tensors())
            if processes.first:
                metrics.sync()
                save_state(checkpoints, Position(steps, rounds.switches), given.run_id, tensors)
            processes.wait()
            saved = time.monotonic()

        for line in metrics.kept:
            health.read(line)
        rounds.go_on(start)
        batches = prefetch(given.stream.batches(config.batch_size, start))
        step, ruined = start, False
        for step in range(start, run.total_steps):
            ruined = validation.after(step, metrics, save)
            if ruined and config.stop_when_ruined:
                break
            if rounds.after(step, metrics, save, checkpoint):
                batches = prefetch(given.stream.batches(config.batch_size, step))
            facts = run.step(step, next(batches), wishes)
            stop, old = facts.pop("stop"), facts.pop("save")
            metrics.write(step=step + 1, **facts)
            for finding in health.read({"step": step + 1, **facts}):
                console.info(f"warning: step {finding.step}: {finding.sentence}")
            shown.advance(1, {k: f"{facts[k]:.4g}" for k in SHOWN if k in facts})
            due = (step + 1) % config.save_every == 0 or old
            if step + 1 < run.total_steps and (due or stop):
                checkpoint(step + 1)
                if stop:
                    name = signals[0].name if signals else "a signal to another process"
                    again = "the same command" if config.resume else "the same command without --no-resume"
                    raise Interrupted(f"stopped by {name} after step {step + 1}; {again} goes on")

        else:  # who asks to end after the last step waits for the student, or its steps would be done again
            step = run.total_steps
            ruined = validation.after(step, metrics, save)
            rounds.after(step, metrics, save, checkpoint)
        stopped = ruined and config.stop_when_ruined
        if not stopped:
            save(config.output, step)
        if processes.first:
            if stopped:
                best.publish()
            why = _why_stopped(config, step, run.total_steps, health, best) if stopped else None
            warnings = [{"step": finding.step, "warning": finding.sentence} for finding in health.findings]
            outcome = {"run": given.run_id, "steps": step, "best": best.facts or None, "ruined": why}
            of_rounds = {"rounds": rounds.switches} if rounds.switches else {}
            write_json(done, {**outcome, "warnings": warnings, **given.made, **of_rounds})
            shutil.rmtree(checkpoints, ignore_errors=True)
        processes.wait()


def _is_done(config: TrainConfig, given: RunInputs) -> bool:
    """Whether the output folder holds the student of this run; a MismatchError where it is that of another one."""
    path = config.output / "training.json"
    if not config.resume or not path.exists():
        return False
    if read_json(path)["run"] != given.run_id:
        raise MismatchError(
            f"{config.output}: holds a student that was trained with another config, dataset or student; take "
            "another --output, or --no-resume to start over"
        )
    console.info(f"{config.output}: trained already")
    return True


def _why_stopped(config: TrainConfig, step: int, total: int, health: Health, best: Best) -> str:
    """Why a run was stopped, and what it leaves."""
    why = next(finding.sentence for finding in reversed(health.findings) if finding.ruined)
    return (
        f"stopped after step {step} of {total}: {why}; {config.output} holds the best student by "
        f"{best.facts['by']}, that after step {best.facts['step']}"
    )


def set_up(config: TrainConfig, given: RunInputs, processes: Processes) -> tuple[Run, Position]:
    """The model and its optimiser, at the last checkpoint if there is one, and where that is."""
    torch.manual_seed(config.seed)
    student = load_student(config, processes)
    total, position, dtype = given.total_steps(config), Position(0), getattr(torch, config.dtype)
    state = load_state(config.output / "checkpoints", given.run_id) if config.resume else None
    optimiser: MasterAdamW | ZeroAdamW
    if processes.zero:
        optimiser = ZeroAdamW(student, dtype, config, state[1] if state else {})
    else:
        optimiser = MasterAdamW(student, dtype, config)
        if state:
            optimiser.restore(state[1])
    if state:
        position = state[0]
        restore_random(state[1])
        console.info(f"going on after step {position.step} of {total}")
    corpus = None
    if config.lm_corpus is not None:
        corpus = islice(corpus_of(config, given.tokenizer), position.step * config.lm_batch_size, None)
    return Run(config, student, optimiser, processes, corpus, total), position
