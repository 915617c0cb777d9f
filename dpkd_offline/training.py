"""`train`: optimise the student on precomputed pairs. Nothing here can load a teacher."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpkd_offline import log
from dpkd_offline.batch import response_batch
from dpkd_offline.checkpoint import (
    Position,
    load_model,
    load_state,
    load_tokenizer,
    model_identity,
    save_state,
    save_student,
    tokenizer_fingerprint,
    vocab_size,
)
from dpkd_offline.config import TrainConfig, as_plain, write_yaml
from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError, UsageError
from dpkd_offline.files import fingerprint, read_json, write_json
from dpkd_offline.logps import check_head, token_logps
from dpkd_offline.losses import dpkd_loss, lm_loss
from dpkd_offline.optimiser import MasterAdamW, learning_rate_at
from dpkd_offline.pairs import Example, Stream, corpus_blocks, pair_stream, reference_stream
from dpkd_offline.prompts import read_texts

Facts = dict[str, float]
SHOWN = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy")  # of a step's facts, on the console


def dpkd_objective(model: PreTrainedModel, examples: Sequence[Example], beta: float) -> tuple[Tensor, Facts]:
    """Sum of the losses of eq. 9 over some pairs, with sums of what is reported of them."""
    both = [(e.prompt_ids, e.responses[side]) for side in (0, 1) for e in examples]  # all y_t, then all y_s
    batch = response_batch(both).to(model.device)
    chosen_logps, rejected_logps = batch.sum_by_response(token_logps(model, batch)).chunk(2)
    chosen_lengths, rejected_lengths = batch.lengths.chunk(2)
    teacher = torch.tensor([e.teacher_logps for e in examples], device=model.device).T
    loss = dpkd_loss(chosen_logps, rejected_logps, teacher[0], teacher[1], chosen_lengths, rejected_lengths, beta)
    margins = loss.chosen_rewards - loss.rejected_rewards
    facts = {
        "reward_chosen": float(loss.chosen_rewards.sum()),
        "reward_rejected": float(loss.rejected_rewards.sum()),
        "margin": float(margins.sum()),
        "accuracy": float((margins > 0).sum()),
        "logps_chosen": float((chosen_logps.detach() / chosen_lengths).sum()),
    }
    return loss.losses.sum(), facts


def sft_objective(model: PreTrainedModel, examples: Sequence[Example], tokens: int) -> Tensor:
    """The part of some examples in the mean loss over `tokens` response tokens."""
    batch = response_batch([(e.prompt_ids, e.responses[0]) for e in examples]).to(model.device)
    logps = token_logps(model, batch)
    return lm_loss(logps) * (len(logps) / tokens)


def corpus_loss(model: PreTrainedModel, block: list[int]) -> Tensor:
    """L_pt: the language-modelling loss on one block of the pre-training corpus."""
    return lm_loss(token_logps(model, response_batch([(block[:1], block[1:])]).to(model.device)))


@dataclass
class Run:
    """All that a step needs."""

    config: TrainConfig
    model: PreTrainedModel
    optimiser: MasterAdamW
    corpus: Iterator[list[int]] | None
    total_steps: int

    def step(self, step: int, examples: list[Example]) -> Facts:
        """One optimiser step on a batch, micro batch by micro batch."""
        config, started = self.config, time.monotonic()
        tokens = sum(len(r) for e in examples for r in e.responses)
        # Of one length together, so that little is padded; the sum over the batch does not know the order.
        examples = sorted(examples, key=lambda e: len(e.prompt_ids) + max(map(len, e.responses)), reverse=True)
        size = config.micro_batch_size
        micro_batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        main = lm = 0.0
        facts: Facts = {}
        for micro_batch in micro_batches:
            if config.objective == "sft":
                loss = sft_objective(self.model, micro_batch, tokens)
            else:
                loss, sums = dpkd_objective(self.model, micro_batch, config.beta)
                loss = loss / len(examples)
                for name, value in sums.items():
                    facts[name] = facts.get(name, 0.0) + value / len(examples)
            main += self._backward(loss, micro_batch)
            if self.corpus is not None:
                loss = corpus_loss(self.model, next(self.corpus)) * (config.lm_weight / len(micro_batches))
                lm += self._backward(loss, micro_batch)
        learning_rate = learning_rate_at(step, self.total_steps, config)
        grad_norm = self.optimiser.step(learning_rate)
        parts = {"loss_kd": main} if config.objective == "dpkd" else {}
        if self.corpus is not None:
            parts["loss_lm"] = lm / config.lm_weight if config.lm_weight else 0.0
        rate = round(tokens / (time.monotonic() - started), 1)
        return {
            "loss": main + lm,
            **parts,
            **facts,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "response_tokens_per_s": rate,
        }

    def _backward(self, loss: Tensor, examples: Sequence[Example]) -> float:
        if not torch.isfinite(loss):
            ids = ", ".join(e.id for e in examples)
            raise DataError(f"the loss is not finite on {ids}; the last checkpoint is untouched")
        loss.backward()
        self.optimiser.accumulate()
        return loss.item()


@dataclass(frozen=True)
class Given:
    """What a run is made of, checked before a model is loaded or a file written."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerFast
    stream: Stream
    made: dict[str, Any]  # provenance: student, pairs, settings

    @property
    def run_id(self) -> str:
        """Equal for runs that go through the same weights."""
        return fingerprint(self.made)

    def total_steps(self, config: TrainConfig) -> int:
        return config.max_steps or config.epochs * math.ceil(len(self.stream) / config.batch_size)


def train(config: TrainConfig) -> Path:
    """Train the student; returns its folder, a Hugging Face model.

    The order of the pairs is a function of the seed, so that a run that was killed goes on from its last checkpoint
    to the same weights. A finished run is left as it is.

    Raises:
        DataError: the dataset is incomplete or damaged.
        MismatchError: the student has another tokenizer, or the output folder belongs to another run.
        UnavailableError: the student cannot be loaded.
    """
    given = check(config)
    done = config.output / "training.json"
    if config.resume and done.exists() and read_json(done)["run"] == given.run_id:
        log.info(f"{config.output}: trained already")
        return config.output

    run, start = set_up(config, given)
    write_yaml(config.output / "train.yaml", {"train": as_plain(config)})
    with (
        log.MetricsFile(config.output / "metrics.jsonl", start) as metrics,
        log.progress(f"train ({config.objective})", run.total_steps, "step", start) as shown,
    ):
        batches = given.stream.batches(config.batch_size, start)
        for step, examples in zip(range(start, run.total_steps), batches, strict=False):
            facts = run.step(step, examples)
            metrics.write(step=step + 1, **facts)
            shown.advance(1, {k: f"{facts[k]:.4g}" for k in SHOWN if k in facts})
            if (step + 1) % config.save_every == 0 and step + 1 < run.total_steps:
                save_state(config.output / "checkpoints", Position(step + 1), given.run_id, run.optimiser.tensors())

    card = student_card(config, given.made, given.dataset, run.total_steps)
    save_student(run.model, given.tokenizer, config.output, card)
    write_json(done, {"run": given.run_id, "steps": run.total_steps, **given.made})
    shutil.rmtree(config.output / "checkpoints", ignore_errors=True)
    return config.output


def check(config: TrainConfig) -> Given:
    """Open everything that a run needs but the model, and refuse what does not match."""
    dataset = Dataset.open(config.dataset)
    tokenizer = load_tokenizer(config.student, config.trust_remote_code)
    dataset.check_tokenizer(config.student, tokenizer_fingerprint(tokenizer))
    if (config.output / "config.json").exists() and config.output.resolve() == Path(config.student).resolve():
        raise UsageError("--output is the student itself; take another folder")
    round: int | None = None
    known = vocab_size(config.student, config.trust_remote_code)
    if config.objective == "sft":
        stream = reference_stream(dataset, config, tokenizer, known)
    else:
        stream, round = pair_stream(dataset, config, known)
    if not len(stream):
        raise DataError(f"{config.dataset}: no {'reference' if round is None else 'pair'} is left to train on")
    if config.lm_corpus is not None:
        next(_corpus(config, tokenizer))
    # Where things lie and how often they are saved changes no number.
    elsewhere = {"dataset", "student", "output", "resume", "save_every"}
    made = {
        "student": model_identity(config.student),
        "prompt_set": dataset.prompt_set.id,
        "round": round,
        "pairs": dataset.pairs(round).provenance() if round is not None else None,
        "settings": {k: v for k, v in as_plain(config).items() if k not in elsewhere},
    }
    return Given(dataset, tokenizer, stream, made)


def set_up(config: TrainConfig, given: Given) -> tuple[Run, int]:
    """The model and its optimiser, at the last checkpoint if there is one, and the number of steps done."""
    model = load_model(config.student, "float32", config.trust_remote_code)
    check_head(model)
    optimiser = MasterAdamW(model, getattr(torch, config.dtype), config)
    total, start = given.total_steps(config), 0
    if config.resume and (state := load_state(config.output / "checkpoints", given.run_id)):
        start = state[0].step
        optimiser.restore(state[1])
        log.info(f"going on after step {start} of {total}")
    corpus = None
    if config.lm_corpus is not None:
        used = sum(islice(_micro_batches(len(given.stream), config), start))
        corpus = islice(_corpus(config, given.tokenizer), used, None)
    return Run(config, model, optimiser, corpus, total), start


def _corpus(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    assert config.lm_corpus is not None
    source = config.lm_corpus
    return corpus_blocks(lambda: read_texts(source), tokenizer, config.lm_length)


def _micro_batches(examples: int, config: TrainConfig) -> Iterator[int]:
    """How many micro batches each step has, without end."""
    while True:
        for start in range(0, examples, config.batch_size):
            yield math.ceil(min(config.batch_size, examples - start) / config.micro_batch_size)


def student_card(config: TrainConfig, made: dict[str, Any], dataset: Dataset, steps: int) -> str:
    """The model card of a trained student."""
    how = f"{config.objective}, {steps} steps of {config.batch_size}, learning rate {config.learning_rate}"
    teacher = ""
    if made["pairs"] is not None:
        by = made["pairs"]["model"]
        teacher = f"\nTeacher: {by['name']} ({by['revision'][:19]}); β = {config.beta}.\n"
    start = made["student"]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpkd-offline, {config.objective}]\n"
        f"---\n\n# {config.output.name}\n\nA student trained with dpkd-offline (Direct Preference Knowledge "
        f"Distillation, arXiv 2406.19774): {how}.\n\nStarted from: {start['name']} ({start['revision'][:19]}).\n"
        f"{teacher}\nPrompt template: {dataset.prompt_set.template}. All settings are in `train.yaml`, the course of "
        f"the training in `metrics.jsonl`.\n"
    )
