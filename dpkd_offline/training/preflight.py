"""All that a run of `train` needs but the model, opened and checked before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.base import in_words, redacted_dict
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.catalog import only_the_first
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import pair_rules, teachers_of
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import rehearse_saving
from dpkd_offline.prompts.sources import read_texts
from dpkd_offline.training.examples import (
    chosen_round,
    corpus_blocks,
    pair_stream,
    reference_stream,
    teacher_stream,
    within_context,
)
from dpkd_offline.training.export import prompts_of_student
from dpkd_offline.training.held_out import HeldOut, read_held_out
from dpkd_offline.training.metrics_log import check_trackers
from dpkd_offline.training.objectives import objective_of
from dpkd_offline.training.stream import Stream

# No number depends on where things lie, how often they are saved, who else hears of them, what is kept in memory.
WITHOUT_EFFECT_ON_NUMBERS = {
    "dataset",
    "student",
    "output",
    "resume",
    "save_every",
    "save_minutes",
    "track",
    "gradient_checkpointing",
    "stop_when_ruined",
}


@dataclass(frozen=True)
class RunInputs:
    """What a run is made of, checked before a model is loaded or a file written."""

    dataset: Dataset
    student: ModelInfo
    stream: Stream
    held_out: HeldOut
    reading: TrainConfig  # the config by which examples are read, also those of later rounds
    provenance: dict[str, Any]  # the student, the prompts, the tables that are read, the settings

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """With the template that the prompts were made with, so that who serves the trained student prompts it so."""
        return self.student.with_chat_template(prompts_of_student(self.dataset).get("chat_template")).tokenizer

    @property
    def run_id(self) -> str:
        """Equal for runs that go through the same weights."""
        return fingerprint(self.provenance)

    def total_steps(self, config: TrainConfig) -> int:
        """Optimizer steps of the whole run."""
        return config.max_steps or config.epochs * self.stream.batches_per_epoch(config.batch_size)


def preflight(config: TrainConfig) -> RunInputs:
    """Open everything that a run needs but the model, and refuse what does not match.

    Raises:
        DataError: the dataset is incomplete or damaged, or nothing of it is left to train on.
        MismatchError: the pairs are in the tokens of another student.
        UnavailableError: the student has no tokenizer here, or a tracker is not installed.
        UsageError: the output is the student itself, or the objective does not go with this dataset.
    """
    check_trackers(config.track)
    dataset = Dataset.open(config.dataset, config.student_name)
    student = ModelInfo.load(config.student, config.trust_remote_code)
    rehearse_saving(student)
    if (config.output / "config.json").exists() and config.output.resolve() == Path(config.student).resolve():
        raise UsageError("--output is the student itself; take another folder")
    reading = within_context(config, student)
    stream, round = _open_stream(reading, dataset, student)
    _check_what_is_left(config, stream, objective_of(config).data)
    held_out = read_held_out(stream, dataset, student, config)
    if config.lm_corpus is not None:
        if config.lm_length > student.context_length:
            raise UsageError(
                f"--lm-length: {config.lm_length} tokens, the context of {config.student} has {student.context_length}"
            )
        next(corpus_of(config, student))
    return RunInputs(dataset, student, stream, held_out, reading, _provenance(config, dataset, student, round))


def _check_what_is_left(config: TrainConfig, stream: Stream, what: str) -> None:
    """Say how many examples are left out, and why; a DataError where none is left to train on."""
    reasons = {**stream.dropped, f"held out (--holdout {config.holdout:g})": stream.held_out.count}
    whys = [f"{count} {why}" for why, count in reasons.items() if count]
    if not len(stream):
        raise DataError(
            f"{config.dataset}: no {what[:-1]} is left to train on: {sum(reasons.values())} of {stream.rows} dropped: "
            f"{', '.join(whys)}"
        )
    dropped = sum(stream.dropped.values())
    if dropped:
        kind = "warning: " if 2 * dropped > stream.rows else ""
        console.info(f"{kind}{dropped} of {stream.rows} {what} are left out: {', '.join(whys[: len(stream.dropped)])}")


def _open_stream(config: TrainConfig, dataset: Dataset, student: ModelInfo) -> tuple[Stream, int | None]:
    """The examples that the objective reads, and of pairs their round."""
    objective = objective_of(config)
    if objective.data == "references":
        return reference_stream(dataset, config, student), None
    if others := only_the_first(dataset):
        console.info(others)
    if objective.data == "responses":
        return teacher_stream(dataset, config, student), None
    _check_tokens(dataset, config, student)
    _check_teachers(dataset, config)
    stream, round = pair_stream(dataset, config, student.vocab_size, objective.top_k, objective.behavior)
    if objective.off_policy and config.off_policy != "none":
        log_correction(dataset, round)
    if (config.regenerates or config.drift_every) and dataset.pairs(round).require_provenance().get("student") is None:
        raise UsageError(
            f"{dataset.pairs(round).folder}: no student sampled these y_s, so that no drift from it can be measured, "
            f"neither for --drift-every nor for rounds; let the student answer the prompts (generate --role student)"
        )
    return stream, round


def _provenance(config: TrainConfig, dataset: Dataset, student: ModelInfo, round: int | None) -> dict[str, Any]:
    """All that the numbers of a run depend on, as training.json holds it."""
    objective = objective_of(config)
    resolved = redacted_dict(config) | {"dtype": config.precision}
    settings = {k: v for k, v in resolved.items() if k not in WITHOUT_EFFECT_ON_NUMBERS}
    return {
        "student": student.identity,
        "prompt_set": dataset.prompt_set.id,
        "round": round,
        "responses": dataset.responses("teacher", 0).provenance() if objective.data == "responses" else None,
        "pairs": dataset.pairs(round).provenance() if round is not None else None,
        "top_k": dataset.top_k(round).provenance() if round is not None and objective.top_k else None,
        "settings": settings,
    }


def _check_tokens(dataset: Dataset, config: TrainConfig, student: ModelInfo) -> None:
    """Refuse pairs that are in another student's tokens, and an objective that compares models token by token where
    the teacher has tokens of its own."""
    table = dataset.pairs(chosen_round(dataset, config))
    provenance, path = table.require_provenance(), table.folder / "_table.json"
    if provenance["tokenizer_fingerprint"] != student.tokenizer_fingerprint:
        other = provenance["student"]["name"] if provenance["student"] else dataset.prompt_set.tokenizer
        raise MismatchError(
            f"{path}: these pairs are in the tokens of {other}, and {config.student} has another "
            f"tokenizer; let it answer the prompts itself, with --student-name NAME of generate and score-teacher"
        )
    if provenance["scored"] == "text" and objective_of(config).top_k:
        raise UsageError(
            f"{path}: teacher and student do not share a tokenizer, and objective '{config.objective}' compares them "
            f"token by token; take one that compares whole responses, such as dpkd"
        )


def _check_teachers(dataset: Dataset, config: TrainConfig) -> None:
    """Refuse what pairs of several teachers cannot serve: an objective that matches one distribution, and new rounds,
    which nobody could score."""
    table = dataset.pairs(chosen_round(dataset, config))
    names = list(teachers_of(provenance := table.require_provenance()).values())
    if not provenance.get("teachers"):
        return
    place = f"{table.provenance_path}: these pairs are of several teachers ({in_words(names)})"
    if objective_of(config).top_k:
        able = in_words([name for name, info in OBJECTIVES.items() if not info.top_k and info.data == "pairs"])
        raise UsageError(
            f"{place}, and objective '{config.objective}' matches the distribution of one; take one that needs no more "
            f"than log p of each pair: {able}"
        )
    if config.regenerates:
        raise UsageError(f"{place}, and a round needs one that scores it; train without rounds")


def log_correction(dataset: Dataset, round: int) -> None:
    """Say where the off-policy correction is not what its name says."""
    table = dataset.pairs(round)
    if table.require_provenance().get("student") is None:
        console.info(
            f"{table.folder}: no student sampled these y_s, so nobody knows how likely they were: the off-policy "
            f"correction is off, and drift cannot be known"
        )
    if "best-worst" in pair_rules(table.require_provenance()):
        console.info(
            f"warning: {table.folder}: y_s are the worst of several samples, and the off-policy correction, drift and "
            f"objective minillm take them for samples"
        )
    sampling = (dataset.responses("student", round).provenance() or {}).get("sampling", {})
    if (sampling.get("temperature", 1.0), sampling.get("top_p", 1.0)) != (1.0, 1.0):
        console.info(
            f"warning: y_s were sampled at temperature {sampling['temperature']}, top-p {sampling['top_p']}; the "
            f"off-policy correction takes them as sampled at 1 and 1, which is what the stored log b is of"
        )


def corpus_of(config: TrainConfig, model: ModelInfo) -> Iterator[list[int]]:
    """The blocks of token ids of lm-corpus, without end."""
    assert config.lm_corpus is not None
    source = config.lm_corpus
    return corpus_blocks(lambda: read_texts(source), model, config.lm_length)
