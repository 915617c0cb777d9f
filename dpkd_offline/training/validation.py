"""Validation: how the student does on prompts that training never sees, and the best student so far."""

from __future__ import annotations

import heapq
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import CHOSEN
from dpkd_offline.metrics.text import repetition, rouge_l
from dpkd_offline.models.batch import PromptAndResponses, micro_batches, pad_sequences
from dpkd_offline.models.info import context_length, eos_ids
from dpkd_offline.prompts.retokenize import prompts_for
from dpkd_offline.training import metrics_log
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.export import Best
from dpkd_offline.training.health import Health
from dpkd_offline.training.objectives import OBJECTIVES, StepMetrics, facts_of, objective_of, places_of, rows_of, score
from dpkd_offline.training.stream import Example, Stream
from dpkd_offline.training.student import Student

CHUNK = 64  # examples in memory at once
DECODED = 8  # times the tokens of a micro batch are decoded at once, which keeps no activations
# On the console.
SHOWN = ("loss_dpkd", "loss_kd", "margin", "accuracy", "logps_chosen", "forward_kl", "cut_off", "repetition", "rouge_l")
MEASURED = replace(OBJECTIVES["dpkd"], off_policy=False)  # of every objective that reads pairs


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt to answer, and good answers."""

    prompt_ids: list[int]
    references: list[str]


def reference_prompts(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, config: TrainConfig
) -> list[ReferencePrompt]:
    """The held-out prompts of the smallest draws, as many as Rouge-L is asked for, of those with a reference.

    Prompts that leave no room for an answer within `max_length` or the student's positions are left out.

    Raises:
        DataError: there is none.
    """
    longest = min(config.max_length, context_length(config.student, config.trust_remote_code))
    prompts = prompts_for(dataset, tokenizer)
    found: list[tuple[float, int, ReferencePrompt]] = []
    for shard in range(dataset.plan.count if config.validate_rouge else 0):
        rows = prompts.read_arrow(shard, ["id", "prompt_ids", "references"])
        draws = draws_of(rows["id"])
        for row in (draws < config.holdout).nonzero()[0].tolist():
            question = ReferencePrompt(rows["prompt_ids"][row].as_py(), rows["references"][row].as_py())
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
    questions: list[ReferencePrompt]  # for Rouge-L
    examples: list[Example]  # whose prompts are answered, to look at the responses' form
    max_new_tokens: int  # of these responses: as many as the longest that is stored

    @classmethod
    def of(cls, stream: Stream, dataset: Dataset, tokenizer: PreTrainedTokenizerFast, config: TrainConfig) -> HeldOut:
        """Raises DataError where Rouge-L is asked for and no prompt of it is held out."""
        if config.holdout and not stream.held_out:
            console.info(
                f"warning: --holdout {config.holdout} holds out none of {len(stream)} examples: nothing says whether "
                f"the student gets better"
            )
        examples = list(stream.for_validation(config.validate_responses))
        longest = max((len(response) for e in examples for response in e.responses), default=0)
        new = min(config.validate_max_new_tokens, longest)
        room = context_length(config.student, config.trust_remote_code) - new
        examples = [e for e in examples if len(e.prompt_ids) <= room]
        return cls(stream, reference_prompts(dataset, tokenizer, config), examples, new)


@torch.no_grad()
def losses_and_rewards(student: Student, stream: Stream, config: TrainConfig, processes: Processes) -> StepMetrics:
    """Of the held-out examples: what training reports of its own, and eq. 9 of pairs, whatever the objective is.

    `loss_kd` is the objective's loss, the mean over pairs or tokens as in training; `loss_dpkd` that of eq. 9; the
    others are means over examples, and `forward_kl`, where the teacher's likeliest tokens are stored, over the tokens
    of y_t. In nats.
    """
    own = objective_of(config)
    read = MEASURED if own.data == "pairs" else own
    sums: StepMetrics = defaultdict(float)
    examples = stream.for_validation()
    while chunk := list(islice(examples, CHUNK)):
        groups = micro_batches(rows_of(chunk, read), student.shares, config.micro_batch_tokens, processes.count)
        for group in groups[processes.rank :: processes.count]:
            # Where there are fewer examples than processes, one that counts nothing: wrapped models call each other.
            for name, value in _sums(student, [chunk[i] for i in group or [0]], config).items():
                sums[name] += value if group else 0.0
    sums = processes.sum(sums)
    loss, over, count = sums.pop("loss_kd"), sums.pop("over"), sums.pop("examples")
    tokens = sums.pop("kl_tokens", 0.0)
    if tokens:
        sums["forward_kl"] *= count / tokens
    return {"loss_kd": loss / over, **{name: value / count for name, value in sums.items()}}


def _sums(student: Student, examples: Sequence[Example], config: TrainConfig) -> StepMetrics:
    own, pairs = objective_of(config), replace(MEASURED, top_k=bool(examples[0].top))
    if own.data != "pairs":
        scored = score(student, own, examples, config)
        facts, loss = facts_of(scored), own.loss(scored)
    else:
        scored = score(student, pairs, examples, config)
        facts = {"loss_dpkd": float(pairs.loss(scored).sum()), **facts_of(scored)}
        if pairs.top_k:
            kls = scored.forward_kls()[places_of(CHOSEN, pairs, scored.batch)]
            facts |= {"forward_kl": float(kls.sum()), "kl_tokens": float(kls.numel())}
        same = own.sides == pairs.sides and not own.top_k and not own.best
        loss = own.loss(scored if same else score(student, own, examples, config))
    return {**facts, "loss_kd": float(loss.sum()), "over": float(loss.numel()), "examples": float(len(examples))}


@contextmanager
def decoding(student: Student) -> Iterator[None]:
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
def answers_of(
    student: Student,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: Sequence[int],
    config: TrainConfig,
    processes: Processes,
) -> dict[int, list[int]]:
    """The student's greedy answers to this process's part of the prompts, by their place: token ids, with the EOS of
    those that end."""
    rows: list[PromptAndResponses] = [(prompt, [range(max_new_tokens)]) for prompt in prompts]
    groups = micro_batches(rows, False, DECODED * config.micro_batch_tokens, processes.count)
    answers: dict[int, list[int]] = {}
    with decoding(student):
        for group in groups[processes.rank :: processes.count]:
            input_ids, attention_mask = pad_sequences([prompts[i] for i in group or [0]], side="left")
            output = student.generate(
                input_ids.to(student.device),
                attention_mask=attention_mask.to(student.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(eos),
                pad_token_id=eos[0],
                synced_gpus=processes.count > 1,
            )
            rows_of_ids = output[:, input_ids.shape[1] :].tolist()
            answers |= {i: _up_to_eos(ids, eos) for i, ids in zip(group, rows_of_ids, strict=False)}
    return answers


def _up_to_eos(ids: list[int], eos: Sequence[int]) -> list[int]:
    """What follows the first EOS is padding."""
    return ids[: next((n + 1 for n, token in enumerate(ids) if token in eos), None)]


def rouge_of(
    student: Student,
    questions: Sequence[ReferencePrompt],
    tokenizer: PreTrainedTokenizerFast,
    eos: Sequence[int],
    config: TrainConfig,
    processes: Processes,
) -> float:
    """Mean Rouge-L x 100 of the student's greedy answers."""
    prompts = [question.prompt_ids for question in questions]
    answers = answers_of(student, prompts, config.validate_max_new_tokens, eos, config, processes)
    total = 0.0
    for place, ids in answers.items():
        text = str(tokenizer.decode([token for token in ids if token not in eos], skip_special_tokens=True))
        total += rouge_l(text, questions[place].references)
    return processes.sum({"rouge_l": total})["rouge_l"] / len(questions)


def form_of(
    student: Student, held_out: HeldOut, eos: Sequence[int], config: TrainConfig, processes: Processes
) -> StepMetrics:
    """The form of the student's greedy responses to held-out prompts, and of the responses y_t stored of these.

    Returns means over the prompts: `tokens`; `cut_off`, the share that does not end within the length of the longest
    stored response; `repetition`, the share of a response's 4-grams that it said before. The same of y_t by
    `…_chosen`.
    """
    examples, longest = held_out.examples, held_out.max_new_tokens
    answers = answers_of(student, [e.prompt_ids for e in examples], longest, eos, config, processes)
    sums = processes.sum(_form(list(answers.values()), eos))
    chosen = _form([e.responses[CHOSEN][:longest] for e in examples], eos)
    facts = {**sums, **{f"{name}_chosen": value for name, value in chosen.items()}}
    return {name: value / len(examples) for name, value in facts.items()}


def _form(responses: Sequence[Sequence[int]], eos: Sequence[int]) -> StepMetrics:
    """Sums over the responses."""
    return {
        "tokens": float(sum(map(len, responses))),
        "cut_off": float(sum(ids[-1] not in eos for ids in responses)),
        "repetition": sum(map(repetition, responses)),
    }


class Validation:
    """What training does with held-out prompts: nothing, where none are held out."""

    def __init__(
        self,
        config: TrainConfig,
        held_out: HeldOut,
        student: Student,
        tokenizer: PreTrainedTokenizerFast,
        processes: Processes,
        total_steps: int,
        best: Best,
        health: Health,
    ) -> None:
        self._config, self._held_out, self._processes = config, held_out, processes
        self._student, self._tokenizer = student, tokenizer
        self._total = total_steps
        self._every = config.validate_every or math.ceil(len(held_out.stream) / config.batch_size)
        self._eos = eos_ids(config.student, tokenizer, config.trust_remote_code)
        self._best, self._health = best, health
        if held_out.stream.held_out:
            read = min(held_out.stream.held_out, config.validate_limit)
            answered = f", responses to {len(held_out.examples)} prompts" if held_out.examples else ""
            asked = f", Rouge-L on {len(held_out.questions)} prompts" if held_out.questions else ""
            console.info(f"validation: {read} of {held_out.stream.held_out} held-out examples{answered}{asked}")
        elif processes.first:  # of another run
            shutil.rmtree(best.folder, ignore_errors=True)

    def after(self, step: int, metrics: metrics_log.MetricsFile, save: Callable[[Path, int], None]) -> bool:
        """Validate the student as it is after `step` steps, if it is time: a line of the metrics, and perhaps the best.

        `save` writes the student, after so many steps, into a folder; all processes call it. Returns whether the
        student is ruined: then it is not the best, whatever its numbers.

        Raises:
            DataError: a number that decides which student is best is not finite.
        """
        if not self._held_out.stream.held_out or (step % self._every and step != self._total):
            return False
        facts = {f"val_{name}": value for name, value in self._measure().items()}
        by = self._by(facts)
        if not math.isfinite(facts[by]):
            raise DataError(f"{by} is not finite after step {step}; the last checkpoint is untouched")
        metrics.write(step=step, **facts)
        findings = self._health.read({"step": step, **facts})
        ruined = bool(self._processes.sum({"ruined": float(self._processes.first and self._health.ruined)})["ruined"])
        is_best = not ruined and self._best.offer(step, facts, by, save)
        shown = " ".join(f"{name}={facts[f'val_{name}']:.4g}" for name in SHOWN if f"val_{name}" in facts)
        console.info(f"validation after step {step}: {shown}{f' (the best so far by {by})' if is_best else ''}")
        for finding in findings:
            console.info(f"warning: {finding}")
        return ruined

    def _measure(self) -> StepMetrics:
        config, processes, held_out = self._config, self._processes, self._held_out
        facts = losses_and_rewards(self._student, held_out.stream, config, processes)
        if held_out.examples:
            facts |= form_of(self._student, held_out, self._eos, config, processes)
        if held_out.questions:
            facts["rouge_l"] = rouge_of(
                self._student, held_out.questions, self._tokenizer, self._eos, config, processes
            )
        return facts

    def _by(self, facts: StepMetrics) -> str:
        """What decides which student is best: what it says, or how far it is from what it is taught. E[-log q(y_t)] is
        KL(p‖q) but for a number of the data; a loss of pairs falls while a student is ruined."""
        if "val_rouge_l" in facts:
            return "val_rouge_l"
        if objective_of(self._config).measures:
            return "val_loss_kd"
        return "val_forward_kl" if "val_forward_kl" in facts else "val_logps_chosen"
