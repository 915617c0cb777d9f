"""Validation: how the student does on prompts that training never sees, and the best student so far."""

from __future__ import annotations

import heapq
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpkd_offline import log
from dpkd_offline.batch import PromptAndResponses, micro_batches, pad_sequences
from dpkd_offline.checkpoint import context_length, eos_ids
from dpkd_offline.config import TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.files import fsync, read_json, write_json
from dpkd_offline.metrics import rouge_l
from dpkd_offline.objectives import OBJECTIVES, Facts, facts_of, rows_of, score
from dpkd_offline.pairs import Example, Stream, draws_of
from dpkd_offline.processes import Processes
from dpkd_offline.respelling import prompts_for
from dpkd_offline.trainee import Trainee

CHUNK = 64  # examples in memory at once
DECODED = 8  # times the tokens of a micro batch are decoded at once, which keeps no activations
SHOWN = ("loss_dpkd", "loss_kd", "margin", "accuracy", "rouge_l")  # on the console


@dataclass(frozen=True)
class Question:
    """A prompt to answer, and good answers."""

    prompt_ids: list[int]
    references: list[str]


def questions_of(dataset: Dataset, tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> list[Question]:
    """The held-out prompts of the smallest draws, as many as Rouge-L is asked for, of those with a reference.

    Prompts that leave no room for an answer within `max_length` or the student's positions are left out.

    Raises:
        DataError: there is none.
    """
    longest = min(config.max_length, context_length(config.student, config.trust_remote_code))
    prompts = prompts_for(dataset, tokenizer)
    found: list[tuple[float, int, Question]] = []
    for shard in range(dataset.plan.count if config.validate_rouge else 0):
        rows = prompts.read_arrow(shard, ["id", "prompt_ids", "references"])
        draws = draws_of(rows["id"])
        for row in (draws < config.holdout).nonzero()[0].tolist():
            question = Question(rows["prompt_ids"][row].as_py(), rows["references"][row].as_py())
            if question.references and len(question.prompt_ids) + config.validate_max_new_tokens <= longest:
                found.append((draws[row], len(found), question))
        found = heapq.nsmallest(config.validate_rouge, found)
    if config.validate_rouge and not found:
        raise DataError(
            f"{dataset.prompts.folder}: no held-out prompt has a reference and room for "
            f"{config.validate_max_new_tokens} tokens, for --validate-rouge"
        )
    return [question for _, _, question in found]


@dataclass(frozen=True)
class HeldOut:
    """What training never sees."""

    stream: Stream
    questions: list[Question]

    @classmethod
    def of(cls, stream: Stream, dataset: Dataset, tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> HeldOut:
        """Raises DataError where validation is asked for and nothing is held out."""
        if config.holdout and not stream.held_out:
            raise DataError(f"{config.dataset}: --holdout {config.holdout} holds out none of {len(stream)} examples")
        return cls(stream, questions_of(dataset, tokenizer, config))


@torch.no_grad()
def losses_and_rewards(student: Trainee, stream: Stream, config: TrainConfig, processes: Processes) -> Facts:
    """Of the held-out examples: what training reports of its own, and eq. 9 of pairs, whatever the objective is.

    `loss_kd` is the objective's loss, the mean over pairs or tokens as in training; `loss_dpkd` that of eq. 9; the
    others are means over examples. In nats.
    """
    own = OBJECTIVES[config.objective]
    read = OBJECTIVES["dpkd"] if own.data == "pairs" else own
    sums: Facts = defaultdict(float)
    examples = stream.for_validation()
    while chunk := list(islice(examples, CHUNK)):
        groups = micro_batches(rows_of(chunk, read), student.shares, config.micro_batch_tokens, processes.count)
        for group in groups[processes.rank :: processes.count]:
            # Where there are fewer examples than processes, one that counts nothing: wrapped models call each other.
            for name, value in _sums(student, [chunk[i] for i in group or [0]], config).items():
                sums[name] += value if group else 0.0
    sums = processes.sum(sums)
    loss, over, count = sums.pop("loss_kd"), sums.pop("over"), sums.pop("examples")
    return {"loss_kd": loss / over, **{name: value / count for name, value in sums.items()}}


def _sums(student: Trainee, examples: Sequence[Example], config: TrainConfig) -> Facts:
    own, pairs = OBJECTIVES[config.objective], OBJECTIVES["dpkd"]
    if own.data == "references":
        scored = score(student, own, examples, config)
        facts, loss = facts_of(scored), own.loss(scored)
    else:
        scored = score(student, pairs, examples, config)
        facts = {"loss_dpkd": float(pairs.loss(scored).sum()), **facts_of(scored)}
        same = own.sides == pairs.sides and not own.top_k and not own.best
        loss = own.loss(scored if same else score(student, own, examples, config))
    return {**facts, "loss_kd": float(loss.sum()), "over": float(loss.numel()), "examples": float(len(examples))}


@contextmanager
def decoding(student: Trainee) -> Iterator[None]:
    """Inside of this a model writes with an attention that knows a cache, and as it is told, not as it came."""
    model = student.model
    attention, generation = model.config._attn_implementation, model.generation_config
    # On a CPU plain products are the fastest for one token at a time; training may have another one set.
    model.set_attn_implementation("eager" if model.device.type == "cpu" else student.own_attention)
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = generation
        model.set_attn_implementation(attention)


@torch.no_grad()
def rouge_of(
    student: Trainee,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerFast,
    eos: Sequence[int],
    config: TrainConfig,
    processes: Processes,
) -> float:
    """Mean Rouge-L x 100 of the student's greedy answers."""
    answer = range(config.validate_max_new_tokens)
    rows: list[PromptAndResponses] = [(q.prompt_ids, [answer]) for q in questions]
    groups = micro_batches(rows, False, DECODED * config.micro_batch_tokens, processes.count)
    total = 0.0
    with decoding(student):
        for group in groups[processes.rank :: processes.count]:
            input_ids, attention_mask = pad_sequences([questions[i].prompt_ids for i in group or [0]], side="left")
            output = student.generate(
                input_ids.to(student.device),
                attention_mask=attention_mask.to(student.device),
                max_new_tokens=config.validate_max_new_tokens,
                do_sample=False,
                eos_token_id=list(eos),
                pad_token_id=eos[0],
                synced_gpus=processes.count > 1,
            )
            texts = tokenizer.batch_decode(_answers(output[:, input_ids.shape[1] :].tolist(), eos), True)
            total += sum(rouge_l(text, questions[i].references) for i, text in zip(group, texts, strict=False))
    return processes.sum({"rouge_l": total})["rouge_l"] / len(questions)


def _answers(rows: Sequence[list[int]], eos: Sequence[int]) -> list[list[int]]:
    """Each up to its first EOS: what follows is padding."""
    return [row[: next((n for n, token in enumerate(row) if token in eos), None)] for row in rows]


class Best:
    """output/best: the student of the best validation so far, with its numbers in validation.json.

    The folder is replaced by a whole one or not at all, so that a run that goes on from an earlier checkpoint knows
    from it what the best was, and number and weights are always of each other. The first process reads and writes.
    """

    def __init__(self, output: Path, run: str, go_on: bool, processes: Processes) -> None:
        """What is there counts if `run` left it and is to `go_on`."""
        self.folder, self._run, self._processes = output / "best", run, processes
        self._new, self._old = output / ".best-new", output / ".best-old"
        self.facts: dict[str, Any] = {}  # step, by what number it is the best, all numbers; empty before the first
        if processes.first:
            self._mend()
            if go_on and (path := self.folder / "validation.json").exists():
                found = read_json(path)
                self.facts = found if found["run"] == run else {}

    def _mend(self) -> None:
        """After a process that was killed between two renames."""
        for whole in (self._new, self._old):
            if (whole / "validation.json").exists() and not self.folder.exists():
                whole.rename(self.folder)
            shutil.rmtree(whole, ignore_errors=True)

    def offer(self, step: int, facts: Facts, by: str, save: Callable[[Path, int], None]) -> bool:
        """Keep the student as it is now, if it is better by one of its numbers. Returns whether it is."""
        sign = 1 if by == "val_rouge_l" else -1
        better = self._processes.first and (not self.facts or sign * facts[by] > sign * self.facts[by])
        if not self._processes.sum({"better": float(better)})["better"]:
            return False
        self.facts = {"run": self._run, "step": step, "by": by, **facts}
        save(self._new, step)
        if self._processes.first:
            write_json(self._new / "validation.json", self.facts)  # last: with it the folder is whole
            if self.folder.exists():
                self.folder.rename(self._old)
            self._new.rename(self.folder)
            fsync(self.folder.parent)
            shutil.rmtree(self._old, ignore_errors=True)
        return True


class Validation:
    """What training does with held-out prompts: nothing, where none are held out."""

    def __init__(
        self,
        config: TrainConfig,
        held_out: HeldOut,
        student: Trainee,
        tokenizer: PreTrainedTokenizerFast,
        processes: Processes,
        total_steps: int,
        best: Best,
    ) -> None:
        self._config, self._held_out, self._processes = config, held_out, processes
        self._student, self._tokenizer = student, tokenizer
        self._total = total_steps
        self._every = config.validate_every or math.ceil(len(held_out.stream) / config.batch_size)
        self._eos = eos_ids(config.student, tokenizer, config.trust_remote_code)
        if held_out.questions:
            self._by = "val_rouge_l"
        else:
            self._by = "val_loss_kd" if OBJECTIVES[config.objective].data == "references" else "val_loss_dpkd"
        self._best = best
        if config.holdout:
            read = min(held_out.stream.held_out, config.validate_limit)
            asked = f", Rouge-L on {len(held_out.questions)} prompts" if held_out.questions else ""
            log.info(f"validation: {read} of {held_out.stream.held_out} held-out examples{asked}")
        elif processes.first:  # of another run
            shutil.rmtree(best.folder, ignore_errors=True)

    def after(self, step: int, metrics: log.MetricsFile, save: Callable[[Path, int], None]) -> None:
        """Validate the student as it is after `step` steps, if it is time: a line of the metrics, and perhaps the best.

        `save` writes the student, after so many steps, into a folder; all processes call it.

        Raises:
            DataError: a number that decides which student is best is not finite.
        """
        if not self._config.holdout or (step % self._every and step != self._total):
            return
        facts = losses_and_rewards(self._student, self._held_out.stream, self._config, self._processes)
        if questions := self._held_out.questions:
            facts["rouge_l"] = rouge_of(
                self._student, questions, self._tokenizer, self._eos, self._config, self._processes
            )
        shown = " ".join(f"{name}={facts[name]:.4g}" for name in SHOWN if name in facts)
        facts = {f"val_{name}": value for name, value in facts.items()}
        if not math.isfinite(facts[self._by]):
            raise DataError(f"{self._by} is not finite after step {step}; the last checkpoint is untouched")
        metrics.write(step=step, **facts)
        is_best = self._best.offer(step, facts, self._by, save)
        log.info(f"validation after step {step}: {shown}{' (the best so far)' if is_best else ''}")
