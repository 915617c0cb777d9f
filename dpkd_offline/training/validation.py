"""Validation: how the student does on prompts that training never sees, and whether it is the best so far."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN
from dpkd_offline.metrics.text import repetition, rouge_l
from dpkd_offline.models.batch import PromptAndResponses, pad_sequences
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.export import Best
from dpkd_offline.training.health import Health
from dpkd_offline.training.held_out import HeldOut, ReferencePrompt
from dpkd_offline.training.metrics_log import MetricsFile
from dpkd_offline.training.objectives import (
    OBJECTIVES,
    Scored,
    StepMetrics,
    facts_of,
    objective_of,
    places_of,
    rows_of,
    score,
)
from dpkd_offline.training.stream import Example, HeldOutExamples
from dpkd_offline.training.student import Student, student_fault

CHUNK = 64  # examples in memory at once
DECODED = 8  # times the tokens of a micro batch are decoded at once, which keeps no activations
MOST_DECODED = 65_536  # tokens: where micro batches are large, the cache of keys and values is not to be
# On the console.
SHOWN = ("loss_dpkd", "loss_kd", "margin", "accuracy", "logps_chosen", "forward_kl", "cut_off", "repetition", "rouge_l")
MEASURED = replace(OBJECTIVES["dpkd"], off_policy=False)  # of every objective that reads pairs
DISTANCES: dict[str, Callable[[Scored], Tensor]] = {  # between teacher and student at each response token
    "forward_kl": Scored.forward_kls,
    "reverse_kl": Scored.reverse_kls,
    "top_k_mass": Scored.top_masses,
    "acceptance": Scored.acceptances,
}


@torch.no_grad()
def losses_and_rewards(
    student: Student, held_out: HeldOutExamples, config: TrainConfig, processes: Processes
) -> StepMetrics:
    """Of the held-out examples: what training reports of its own, and eq. 9 of pairs, whatever the objective is.

    `loss_kd` is the objective's loss, the mean over pairs or tokens as in training; `loss_dpkd` that of eq. 9; the
    others are means over examples. Of pairs whose teacher's likeliest tokens are stored also `DISTANCES`, means over
    the tokens of y_t, and with `_first` over their first tokens. In nats, but for shares.
    """
    objective = objective_of(config)
    reads = MEASURED if objective.data == "pairs" else objective
    sums: StepMetrics = defaultdict(float)
    examples = held_out.read()
    while chunk := list(islice(examples, CHUNK)):
        rows = rows_of(chunk, reads)
        for group, weight in processes.own_micro_batches(rows, student.shares, processes.micro_batch_tokens(config)):
            for name, value in _sums_over(student, [chunk[i] for i in group], config).items():
                sums[name] += value if weight else 0.0
    sums = processes.sum(sums)
    loss, loss_count, count = sums.pop("loss_kd"), sums.pop("loss_count"), sums.pop("examples")
    tokens = sums.pop("chosen_tokens", 0.0)
    for name in DISTANCES if tokens else ():
        sums[name] *= count / tokens
    return {"loss_kd": loss / loss_count, **{name: value / count for name, value in sums.items()}}


def _sums_over(student: Student, examples: Sequence[Example], config: TrainConfig) -> StepMetrics:
    """The sums of a micro batch, and what they are to be divided by: `examples`, `loss_count` and `chosen_tokens`."""
    objective, pairs = objective_of(config), replace(MEASURED, top_k=bool(examples[0].top))
    if objective.data != "pairs":
        scored = score(student, objective, examples, config)
        facts, loss = facts_of(scored), objective.loss(scored)
    else:
        scored = score(student, pairs, examples, config)
        facts = {"loss_dpkd": pairs.loss(scored).sum(), **facts_of(scored)}
        if pairs.top_k:
            facts |= _distance_sums(scored)
        same = objective.sides == pairs.sides and objective.top_k <= pairs.top_k and not objective.best
        loss = objective.loss(scored if same else score(student, objective, examples, config))
    counts = {"loss_count": float(loss.numel()), "examples": float(len(examples))}
    return {**{name: float(value) for name, value in facts.items()}, "loss_kd": float(loss.sum()), **counts}


def _distance_sums(scored: Scored) -> dict[str, Tensor]:
    """Sums of `DISTANCES` over the tokens of y_t, with `_first` of both KL over first tokens, and `chosen_tokens`.

    All compare p and q over the teacher's K stored tokens and all others as one token, the rest. Merging tokens brings
    two distributions nearer, so that with p_r and q_r what p and q leave to the rest, and D the distance of the two
    within it, the numbers over the whole vocabulary are

        KL(p‖q) = forward_kl + p_r D(p‖q),    KL(q‖p) = reverse_kl + q_r D(q‖p),    D ≥ 0,
        acceptance - min(p_r, q_r) ≤ Σ_v min(p_v, q_v) ≤ acceptance.

    p_r is 1 - `top_k_mass`, and q_r at most p_r + 1 - acceptance. Where K is the vocabulary but for one token, all of
    these are equal. Of float32 log-probs a rest is known to about 1e-6, and is taken as 2⁻²³ at least.
    """
    places = places_of(CHOSEN, MEASURED, scored.batch)
    lengths = scored.batch.lengths.view(-1, len(MEASURED.sides))[:, CHOSEN]
    first = lengths.cumsum(0) - lengths
    distances = {name: measure(scored)[places] for name, measure in DISTANCES.items()}
    sums = {name: distance.sum() for name, distance in distances.items()}
    firsts = {f"{name}_first": distances[name][first].sum() for name in ("forward_kl", "reverse_kl")}
    return {**sums, **firsts, "chosen_tokens": lengths.sum()}


@contextmanager
def decoding(student: Student) -> Iterator[None]:
    """A context in which the model decodes by an attention that has a cache, and without its own generation config."""
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
def generate_greedy(
    student: Student,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: Sequence[int],
    config: TrainConfig,
    processes: Processes,
) -> dict[int, list[int]]:
    """The student's greedy responses to this process's part of the prompts, by the place of each prompt.

    Token ids, with the EOS of those that end within `max_new_tokens`.
    """
    rows: list[PromptAndResponses] = [(prompt, [range(max_new_tokens)]) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    with decoding(student):
        for places, budget in _sampled_together(student, prompts, config, processes):
            own = processes.own_micro_batches([rows[i] for i in places], False, budget)
            for group, weight in (([places[i] for i in group], weight) for group, weight in own):
                input_ids, attention_mask = pad_sequences([prompts[i] for i in group], side="left")
                output = student.generate(
                    input_ids.to(student.device),
                    attention_mask=attention_mask.to(student.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(eos),
                    pad_token_id=eos[0],
                    synced_gpus=processes.count > 1,
                )
                responses = output[:, input_ids.shape[1] :].tolist()
                if weight:
                    answers |= {i: _up_to_eos(ids, eos) for i, ids in zip(group, responses, strict=True)}
    return answers


def _sampled_together(
    student: Student, prompts: Sequence[Sequence[int]], config: TrainConfig, processes: Processes
) -> Iterator[tuple[list[int], int]]:
    """The places of prompts that may be padded to one length, and how many tokens a batch of them may have.

    A sharded model cannot be tried, so that prompts of one length go together where it is not known.
    """
    tried = not (processes.sharded or processes.zero)
    layout = student.sampling_layout() if tried else "padded" if student.shares else "equal"
    budget = 1 if layout == "alone" else min(DECODED * processes.micro_batch_tokens(config), MOST_DECODED)
    together: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        together.setdefault(0 if layout == "padded" else len(prompt), []).append(place)
    yield from ((places, budget) for places in together.values())


def _up_to_eos(ids: list[int], eos: Sequence[int]) -> list[int]:
    """What follows the first EOS is padding."""
    return ids[: next((n + 1 for n, token in enumerate(ids) if token in eos), None)]


def measure_rouge_l(
    student: Student, prompts: Sequence[ReferencePrompt], model: ModelInfo, config: TrainConfig, processes: Processes
) -> StepMetrics:
    """Rouge-L x 100 of the student's greedy answers to some prompts, with the references of each: `rouge_l`, the mean,
    and of several prompts `rouge_l_error`, its standard error."""
    prompt_ids, eos = [prompt.prompt_ids for prompt in prompts], model.eos_ids
    answers = generate_greedy(student, prompt_ids, config.validate_max_new_tokens, eos, config, processes)
    sums = {"rouge_l": 0.0, "squares": 0.0}
    for place, ids in answers.items():
        text = str(model.tokenizer.decode([token for token in ids if token not in eos], skip_special_tokens=True))
        value = rouge_l(text, prompts[place].references)
        sums["rouge_l"] += value
        sums["squares"] += value**2
    sums, n = processes.sum(sums), len(prompts)
    mean = sums["rouge_l"] / n
    error = math.sqrt(max(sums["squares"] / n - mean**2, 0.0) / max(n - 1, 1))
    return {"rouge_l": mean, **({"rouge_l_error": error} if n > 1 else {})}


def response_form(
    student: Student, held_out: HeldOut, eos: Sequence[int], config: TrainConfig, processes: Processes
) -> StepMetrics:
    """The form of the student's greedy responses to held-out prompts, and of the responses y_t stored of these.

    Returns means over the prompts: `tokens`; `cut_off`, the share that does not end within the length of the longest
    stored response; `repetition`, the share of a response's 4-grams that it said before. The same of y_t by
    `…_chosen`.
    """
    examples, longest = held_out.answered, held_out.max_new_tokens
    answers = generate_greedy(student, [e.prompt_ids for e in examples], longest, eos, config, processes)
    own = processes.sum(_form_sums(list(answers.values()), eos))
    chosen = _form_sums([e.responses[CHOSEN][:longest] for e in examples], eos)
    sums = {**own, **{f"{name}_chosen": value for name, value in chosen.items()}}
    return {name: value / len(examples) for name, value in sums.items()}


def _form_sums(responses: Sequence[Sequence[int]], eos: Sequence[int]) -> StepMetrics:
    """Sums over the responses."""
    return {
        "tokens": float(sum(map(len, responses))),
        "cut_off": float(sum(ids[-1] not in eos for ids in responses)),
        "repetition": sum(map(repetition, responses)),
    }


@dataclass(frozen=True)
class Validation:
    """Measures the student on held-out prompts every so many steps, and keeps the best; without any, does nothing."""

    config: TrainConfig
    held_out: HeldOut
    student: Student
    model: ModelInfo  # the student as its files describe it
    processes: Processes
    best: Best
    health: Health
    every: int  # steps
    total_steps: int

    def begin(self) -> None:
        """Say what will be validated; where nothing will be, remove the best student of another run."""
        held_out, count = self.held_out, self.held_out.examples.count
        if count:
            read = min(count, self.config.validate_limit)
            answered = f", responses to {len(held_out.answered)} prompts" if held_out.answered else ""
            rouge = f", Rouge-L on {len(held_out.reference_prompts)} prompts" if held_out.reference_prompts else ""
            console.info(f"validation: {read} of {count} held-out examples{answered}{rouge}")
        elif self.processes.first:
            shutil.rmtree(self.best.folder, ignore_errors=True)

    def after(self, step: int, metrics_file: MetricsFile, save_student: Callable[[Path, int], None]) -> bool:
        """Validate the student as it is after `step` steps, if it is time: a line of the metrics, and perhaps the best.

        `save_student` writes it, after so many steps, into a folder; all processes call it. Returns whether the
        student is ruined: then it is not the best, whatever its numbers.

        Raises:
            DataError: a number that decides which student is best is not finite.
        """
        if not self.held_out.examples.count or (step % self.every and step != self.total_steps):
            return False
        metrics = {f"val_{name}": value for name, value in self._measure().items()}
        by = self._deciding(metrics)
        if not math.isfinite(metrics[by]):
            why = student_fault(self.student, self.config, step, "held-out prompts")
            raise DataError(f"{by} is not finite: {why}; the last checkpoint is untouched")
        metrics_file.write(step=step, **metrics)
        findings = self.health.read({"step": step, **metrics})
        ruined = bool(self.processes.sum({"ruined": float(self.processes.first and self.health.ruined)})["ruined"])
        is_best = not ruined and self.best.offer(step, metrics, by, save_student)
        shown = " ".join(f"{name}={metrics[f'val_{name}']:.4g}" for name in SHOWN if f"val_{name}" in metrics)
        console.info(f"validation after step {step}: {shown}{f' (the best so far by {by})' if is_best else ''}")
        for finding in findings:
            console.info(f"warning: {finding}")
        return ruined

    def _measure(self) -> StepMetrics:
        config, processes, held_out = self.config, self.processes, self.held_out
        metrics = losses_and_rewards(self.student, held_out.examples, config, processes)
        if held_out.answered:
            metrics |= response_form(self.student, held_out, self.model.eos_ids, config, processes)
        if held_out.reference_prompts:
            metrics |= measure_rouge_l(self.student, held_out.reference_prompts, self.model, config, processes)
        return metrics

    def _deciding(self, metrics: StepMetrics) -> str:
        """The name of the number that decides which student is best.

        Rouge-L, where it is measured; else how far the student is from what it is taught. E[-log q(y_t)] is KL(p‖q) but
        for a constant of the data. A loss of pairs does not do: it falls while a student is ruined.
        """
        if "val_rouge_l" in metrics:
            return "val_rouge_l"
        if objective_of(self.config).measures:
            return "val_loss_kd"
        return "val_forward_kl" if "val_forward_kl" in metrics else "val_logps_chosen"
